"""`python -m robusttrain`."""

from robusttrain.cli import main

if __name__ == "__main__":
    main()
