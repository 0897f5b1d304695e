"""No logger: the files of the run are enough."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusttrain.loggers import Figures, Record


@dataclass
class NoLogger:
    """Takes figures and keeps none."""

    def check(self) -> None:
        """Nothing is needed."""

    def record(
        self, run_dir: Path, parameters: Mapping[str, Any]
    ) -> AbstractContextManager[Record]:
        """Something that forgets."""
        return nullcontext(_forget)


def _forget(figures: Figures, epoch: int) -> None:
    """Do nothing."""
