"""TensorBoard: event files in the run directory; view them by `tensorboard --logdir outputs`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robusttrain.loggers import Figures, Record, require
from robusttrain.run_directory import TENSORBOARD


@dataclass
class TensorBoard:
    """Writes to the folder `tensorboard` of the run: figures as scalars, the configuration as text.

    TensorBoard stores scalars in float32.
    """

    def check(self) -> None:
        """Raise `InputError` if TensorBoard is not installed."""
        require("tensorboard", "torch.utils.tensorboard")

    @contextmanager
    def record(self, run_dir: Path, parameters: Mapping[str, Any]) -> Iterator[Record]:
        """A context with an event file, which is created when the first figures are written."""
        from torch.utils.tensorboard import SummaryWriter

        # Created late, so that a refused run leaves no files.
        @cache
        def writer() -> Any:
            made = SummaryWriter(str(run_dir / TENSORBOARD))
            # Indentation makes Markdown show them as code, line by line.
            lines = [f"    {key}: {value}" for key, value in parameters.items()]
            made.add_text("parameters", "\n".join(lines))
            return made

        def write(figures: Figures, epoch: int) -> None:
            for name, value in figures.items():
                writer().add_scalar(name, value, epoch)
            # Figures then appear at once, not only when a buffer is full.
            writer().flush()

        try:
            yield write
        finally:
            if writer.cache_info().currsize:
                writer().close()
