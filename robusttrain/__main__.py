"""Entry point of `robusttrain` and `python -m robusttrain`: choose the command."""

import sys
import warnings

from robusttrain.cli import about
from robusttrain.errors import IdentityWarning
from robusttrain.exit_codes import ExitCode

_with_place = warnings.formatwarning


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of robusttrain in one line; others keep their place in the code."""
    if issubclass(category, IdentityWarning):
        return f"robusttrain: warning: {message}\n"
    return _with_place(message, category, filename, lineno, line)


def main() -> None:
    """Run a command of its own, or print the help; hand any other words to Hydra."""
    # Only this function reads the command line; all others take its words as arguments.
    program, *given = sys.argv
    warnings.formatwarning = _formatted
    command = given[0] if given else ""
    # Each command is imported here, so that none waits for what another needs.
    try:
        if command == "compare":
            from robusttrain.cli import compare

            compare.compare(given[1:])
        elif command == "report":
            from robusttrain.cli import report

            report.report(given[1:])
        elif command == "export":
            from robusttrain.cli import export

            export.export(given[1:])
        elif command == "rerun":
            from robusttrain.cli import main as cli

            sys.exit(cli.rerun(program, given[1:]))
        elif about.is_asked(given):
            about.answer(given)
        else:
            from robusttrain.cli import main as cli

            sys.exit(cli.main(program, given))
    except KeyboardInterrupt:
        # Ctrl+C during the imports, which take seconds: no work has started.
        sys.exit(ExitCode.interrupted)


if __name__ == "__main__":
    main()
