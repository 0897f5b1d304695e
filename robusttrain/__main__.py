"""Entry point of `robusttrain` and `python -m robusttrain`: choose the command."""

import sys

from robusttrain.exit_codes import ExitCode


def main() -> None:
    """Run `compare` or `rerun`; hand any other command line to Hydra."""
    # Only this function reads the command line; all others take its words as arguments.
    program, *given = sys.argv
    command = given[0] if given else ""
    # Imported here, so that `compare` does not wait for torch.
    try:
        if command == "compare":
            from robusttrain.cli import compare

            compare.compare(given[1:])
        elif command == "rerun":
            from robusttrain.cli import main as cli

            sys.exit(cli.rerun(program, given[1:]))
        else:
            from robusttrain.cli import main as cli

            sys.exit(cli.main(program, given))
    except KeyboardInterrupt:
        # Ctrl+C during the imports, which take seconds: no work has started.
        sys.exit(ExitCode.interrupted)


if __name__ == "__main__":
    main()
