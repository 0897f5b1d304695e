"""`robusttrain` and `python -m robusttrain`: which command line it is."""

import sys


def main() -> None:
    """Run `robusttrain compare` or `rerun`, or the job that Hydra makes of anything else."""
    # The one place that reads the command line; all others are handed its words.
    program, *given = sys.argv
    command = given[0] if given else ""
    # Each is imported where it is run: a comparison need not wait for torch.
    try:
        if command == "compare":
            from robusttrain.cli import compare

            compare.compare(given[1:])
        elif command == "rerun":
            from robusttrain.cli import main as cli

            cli.rerun(program, given[1:])
        else:
            from robusttrain.cli import main as cli

            cli.main(program, given)
    except KeyboardInterrupt:
        # Imports take seconds, and nothing has begun by then.
        sys.exit(130)


if __name__ == "__main__":
    main()
