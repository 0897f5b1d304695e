"""No logger."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robusttrain.loggers import Figures, Record


@dataclass
class NoLogger:
    """No logger: figures only go to the files of the run."""

    def check(self) -> None:
        """Do nothing, since no package is needed."""

    def record(
        self, run_dir: Path, parameters: Mapping[str, Any]
    ) -> AbstractContextManager[Record]:
        """A context whose `Record` ignores figures."""
        return nullcontext(_ignore)


def _ignore(figures: Figures, epoch: int) -> None:
    pass
