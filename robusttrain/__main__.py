"""Entry point of `robusttrain` and `python -m robusttrain`: choose the command."""

import sys

from robusttrain.cli import about


def main() -> None:
    """Run `compare` or `rerun`, or print the help; hand any other command line to Hydra."""
    # Only this function reads the command line; all others take its words as arguments.
    program, *given = sys.argv
    command = given[0] if given else ""
    # Each command is imported here, so that none waits for what another needs.
    try:
        if command == "compare":
            from robusttrain.cli import compare

            compare.compare(given[1:])
        elif command == "rerun":
            from robusttrain.cli import main as cli

            cli.rerun(program, given[1:])
        elif about.is_asked(given):
            about.answer(given)
        else:
            from robusttrain.cli import main as cli

            cli.main(program, given)
    except KeyboardInterrupt:
        # Ctrl+C during the imports, which take seconds: no work has started.
        sys.exit(130)


if __name__ == "__main__":
    main()
