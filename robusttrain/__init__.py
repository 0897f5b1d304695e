"""Train image classifiers against adversarial examples, and evaluate them honestly."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["load_model"]

if TYPE_CHECKING:
    from robusttrain.runs.saved_model import load_model
else:

    def __getattr__(name: str) -> object:
        """Import `load_model` on first use: it needs torch, whose import takes seconds."""
        if name == "load_model":
            from robusttrain.runs.saved_model import load_model

            return load_model
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
