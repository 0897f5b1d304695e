"""TensorBoard: event files in the directory of the run, read by `tensorboard --logdir outputs`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robusttrain.loggers import Figures, Record, require


@dataclass
class TensorBoard:
    """Writes to the folder `tensorboard` of the run: figures as scalars, the configuration as text.

    TensorBoard keeps scalars in float32.
    """

    def check(self) -> None:
        """Raise `InputError` if TensorBoard is not installed."""
        require("tensorboard", "torch.utils.tensorboard")

    @contextmanager
    def record(self, run_dir: Path, parameters: Mapping[str, Any]) -> Iterator[Record]:
        """An event file, which is there from the first figures on."""
        from torch.utils.tensorboard import SummaryWriter

        # Not before there is something to write: a run that is refused leaves no files.
        @cache
        def writer() -> Any:
            made = SummaryWriter(str(run_dir / "tensorboard"))
            # Indented, Markdown shows them line by line and as they are.
            lines = [f"    {key}: {value}" for key, value in parameters.items()]
            made.add_text("parameters", "\n".join(lines))
            return made

        def write(figures: Figures, epoch: int) -> None:
            for name, value in figures.items():
                writer().add_scalar(name, value, epoch)
            # Whoever watches the run need not wait for a buffer to be full.
            writer().flush()

        try:
            yield write
        finally:
            if writer.cache_info().currsize:
                writer().close()
