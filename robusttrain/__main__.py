"""`robusttrain` and `python -m robusttrain`: which command line it is."""

import sys


def main() -> None:
    """Run `robusttrain compare` or `rerun`, or the job that Hydra makes of anything else."""
    # Each is imported where it is run: a comparison need not wait for torch.
    try:
        if sys.argv[1:2] == ["compare"]:
            from robusttrain.cli import compare

            compare.compare(sys.argv[2:])
        else:
            from robusttrain.cli import main as cli

            if sys.argv[1:2] == ["rerun"]:
                cli.rerun(sys.argv[2:])
            else:
                cli.main()
    except KeyboardInterrupt:
        # Imports take seconds, and nothing has begun by then.
        sys.exit(130)


if __name__ == "__main__":
    main()
