"""Train image classifiers against adversarial examples, and evaluate them honestly.

For a program: `evaluate` and `train` a model, `run` an experiment, `load_run` its results. A name
is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from robusttrain._version import __version__

# Where each name is defined. All are imported on first use: torch alone takes seconds.
_DEFINED = {
    "InputError": "robusttrain.errors",
    "Result": "robusttrain.report.result",
    "Run": "robusttrain.api.running",
    "attacks": "",
    "defenses": "",
    "evaluate": "robusttrain.api.evaluation",
    "load_model": "robusttrain.runs.saved_model",
    "load_pretrained": "robusttrain.runs.saved_model",
    "load_run": "robusttrain.api.running",
    "run": "robusttrain.api.running",
    "train": "robusttrain.api.training",
}

__all__ = [
    "InputError", "Result", "Run", "__version__", "attacks", "defenses", "evaluate", "load_model",
    "load_pretrained", "load_run", "run", "train",
]  # fmt: skip

if TYPE_CHECKING:
    from robusttrain import attacks, defenses
    from robusttrain.api.evaluation import evaluate
    from robusttrain.api.running import Run, load_run, run
    from robusttrain.api.training import train
    from robusttrain.errors import InputError
    from robusttrain.report.result import Result
    from robusttrain.runs.saved_model import load_model, load_pretrained
else:

    def __getattr__(name: str) -> object:
        """Import a public name on first use."""
        if name not in _DEFINED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _DEFINED[name]
        return getattr(import_module(home), name) if home else import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        """The public names, also those that are not imported yet."""
        return sorted([*globals(), *_DEFINED])
