"""Process group of a run: rank, size and collectives.

torchrun starts them. A process by itself is the first of one, and nothing here costs it anything.
What a function says of all processes, each of them has to call, in the same order.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from robusttrain.seeding import derived_seed

T = TypeVar("T")

# How long a step of training may wait for the others, and how long anything else, such as the share
# of an evaluation that has the hardest images.
STEP, ANYTHING = timedelta(minutes=10), timedelta(days=7)

# What torchrun tells the processes that it starts.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Job:
    """The place of this process among all: its number of `size`, and its number on its machine."""

    rank: int
    size: int
    local_rank: int
    store: Any
    patient: Any


_job: _Job | None = None


@contextmanager
def joined() -> Iterator[None]:
    """Belong to the processes that torchrun has started beside this one, for the block."""
    if (
        not all(name in os.environ for name in TORCHRUN_VARIABLES)
        or os.environ["WORLD_SIZE"] == "1"
    ):
        yield
        return
    store, rank, size = next(rendezvous("env://", timeout=STEP))
    with join_group(store, rank, size, int(os.environ.get("LOCAL_RANK", rank))):
        yield


@contextmanager
def join_group(store: Any, rank: int, size: int, local_rank: int = 0) -> Iterator[None]:
    """Be number `rank` of `size` processes that meet at `store`, for the block."""
    global _job
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
    patient = dist.new_group(backend="gloo", timeout=ANYTHING)
    _job = _Job(rank, size, local_rank, store, patient)
    try:
        yield
        # Skip this after an error: peers may be gone and would block it.
        dist.destroy_process_group()
    except Exception as error:
        error.add_note(f"(in process {rank} of {size})")
        raise
    finally:
        _job = None


def rank() -> int:
    """The number of this process, from 0 on."""
    return 0 if _job is None else _job.rank


def local_rank() -> int:
    """Its number among those on the same machine."""
    return 0 if _job is None else _job.local_rank


def size() -> int:
    """How many processes there are."""
    return 1 if _job is None else _job.size


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return rank() == 0


def own_seed(seed: int) -> int:
    """A seed for what each process draws for itself; that of the first is `seed`."""
    return seed if is_main() else derived_seed(seed, f"process {rank()}")


def suffix() -> str:
    """What sets a file of this process apart from that of the first."""
    return "" if is_main() else f".{rank()}"


def share(count: int) -> slice:
    """Which of `count` things this process takes on: every `size`-th, beginning at its number."""
    return slice(rank(), None, size())


def broadcast(action: Callable[[], T]) -> T:
    """What `action` gives in the first process, which alone does it, for all."""
    if _job is None:
        return action()
    given = [action() if is_main() else None]
    dist.broadcast_object_list(given, src=0, group=_job.patient)
    return cast(T, given[0])


def gather(value: T) -> list[T] | None:
    """In the first process the values of all, in their order; None in the others."""
    if _job is None:
        return [value]
    values: list[Any] | None = [None] * size() if is_main() else None
    dist.gather_object(value, values, dst=0, group=_job.patient)
    return values


def all_gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if _job is None:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value, group=_job.patient)
    return values


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sum over all processes of what each has under the same name."""
    everyone = all_gather(dict(values))
    return {name: sum(each[name] for each in everyone) for name in values}


def in_turns(action: Callable[[], T]) -> T:
    """What `action` gives here, after the first process has done it, and one on this machine.

    What is downloaded is then downloaded once.
    """
    if _job is None:
        return action()
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    done: list[T] = []
    for present in range(3):
        if present == turn:
            done.append(action())
        barrier()
    return done[0]


def barrier() -> None:
    """Wait until all processes have come here."""
    if _job is not None:
        dist.barrier(group=_job.patient)


def all_reduce_sum(values: Tensor) -> None:
    """Replace `values` by their sum over all processes, which train barrier."""
    dist.all_reduce(values)


def all_true(flag: Tensor) -> Tensor:
    """Whether `flag`, a scalar on the device, holds in all processes, which train barrier."""
    if _job is None:
        return flag
    held = flag.float()
    dist.all_reduce(held, dist.ReduceOp.MIN)
    return held.bool()


class DelayedMax:
    """What all processes come to agree on between one batch and the next.

    Waiting for each other there would cost time at every batch; a vote is counted at the next one,
    until when it has long arrived.
    """

    def __init__(self) -> None:
        self._cast: tuple[Tensor, Any] | None = None

    def __call__(self, *values: int) -> list[int]:
        """The largest values that any process gave at the call before (by itself: gives now)."""
        if _job is None:
            return list(values)
        before, self._cast = self._cast, self._begun(values)
        return [0] * len(values) if before is None else self._counted(before)

    def last(self, *values: int) -> list[int]:
        """The largest values that any process gives now."""
        return list(values) if _job is None else self._counted(self._begun(values))

    def _begun(self, values: tuple[int, ...]) -> tuple[Tensor, Any]:
        assert _job is not None
        ballot = torch.tensor(values)
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=_job.patient, async_op=True)
        return ballot, work

    def _counted(self, begun: tuple[Tensor, Any]) -> list[int]:
        ballot, work = begun
        work.wait()
        return [int(value) for value in ballot]


def set_device(device: torch.device) -> None:
    """Let this process compute on `device` where it is one of several."""
    if _job is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def command() -> str:
    """How a command line of the same processes begins."""
    if _job is None:
        return "robusttrain"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    machines = f"--nnodes={size() // here} " if here < size() else ""
    return f"torchrun {machines}--nproc_per_node={here} -m robusttrain"


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error`, or what it came from, is that another process has gone or is silent."""
    text = str(error).lower()
    named = isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
    behind = error.__context__
    return (
        isinstance(error, dist.DistError) or named or (behind is not None and is_lost_peer(behind))
    )


def exit_message(message: str) -> str | int:
    """What to leave with, in the sense of `sys.exit`, because of `message`.

    Of several processes the first to fail says so, with its number: the others fail after it, as
    it is gone.
    """
    if _job is None:
        return message
    first = True
    # The store may be gone, too.
    with suppress(RuntimeError):
        first = _job.store.add("robusttrain failed", 1) == 1
        if not first:
            # Whoever leaves first is the end of the others, also of one that is about to speak.
            _job.store.wait(["robusttrain said"], timedelta(seconds=5))
    if first:
        prefix, _, rest = message.partition(": ")
        print(f"{prefix}: process {rank()} of {size()}: {rest}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            _job.store.set("robusttrain said", "1")
    return 1
