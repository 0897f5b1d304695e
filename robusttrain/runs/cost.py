"""What the stages of a run cost: seconds, passes through the network, memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from robusttrain.config.run_config import Stage
from robusttrain.models.passes import Passes
from robusttrain.runtime import distributed
from robusttrain.runtime.peak_memory import peak_meter

NAMES = {Stage.train: "training", Stage.evaluate: "evaluation"}


class Work(NamedTuple):
    """What a stage has done: images, passes, and its seconds if not all were in this process."""

    images: int
    passes: Passes
    seconds: float | None = None


class Costs:
    """The cost of each stage; a stage that fails has none.

    Parameters
    ----------
    device
        The device of the network.

    Attributes
    ----------
    seconds
        The seconds that each stage took in this process, by its name.
    stages
        The cost of each stage, as in `manifest.json`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.stages: dict[str, dict[str, Any]] = {}

    @contextmanager
    def measuring(self, stage: Stage) -> Iterator[Callable[[Work], None]]:
        """Measure the block, which states the work that it has done.

        All processes of a run measure together: passes are summed over them.
        """
        done: list[Work] = []
        started, peak = time.perf_counter(), peak_meter(self.device)
        yield done.append
        elapsed = self.seconds[stage.value] = time.perf_counter() - started
        (work,) = done
        seconds = elapsed if work.seconds is None else work.seconds
        self.stages[NAMES[stage]] = {
            "seconds": seconds,
            "images_per_second": work.images / seconds if seconds else None,
            "passes": distributed.summed({"all": work.passes.total})["all"],
            "peak_memory_mib": peak(),
        }
