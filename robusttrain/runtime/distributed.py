"""Process group of a run: rank, size and collectives.

torchrun starts the processes. Without it there is one process, of rank 0, and the functions here
return at once. All processes have to call the collectives, in the same order.

A command line uses this module before it needs torch, which is therefore imported where it is used.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Time to wait for the other processes in a step of training, and in anything else: one process may
# have the hardest images of an evaluation.
STEP_TIMEOUT, SLOW_TIMEOUT = timedelta(minutes=10), timedelta(days=7)

LOST = "another process of this run has ended or does not respond"

# Environment variables that torchrun sets for its processes.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Job:
    """The process group, and the place of this process in it.

    Parameters
    ----------
    rank, size
        Number of this process, from 0 on, and the number of processes.
    local_rank
        Number of this process among those on its machine.
    store
        torch's key-value store of the group.
    slow_group
        A gloo group with `SLOW_TIMEOUT`, for everything but the steps of training.
    """

    rank: int
    size: int
    local_rank: int
    store: Any
    slow_group: Any


_job: _Job | None = None


@contextmanager
def torchrun_group() -> Iterator[None]:
    """Join the process group of torchrun for the block, if torchrun has started this process."""
    if (
        not all(name in os.environ for name in TORCHRUN_VARIABLES)
        or os.environ["WORLD_SIZE"] == "1"
    ):
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=STEP_TIMEOUT))
    with join_group(store, rank, size, int(os.environ.get("LOCAL_RANK", rank))):
        yield


@contextmanager
def join_group(store: Any, rank: int, size: int, local_rank: int = 0) -> Iterator[None]:
    """Join a group of `size` processes that share `store`, as number `rank`, for the block."""
    global _job
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    slow_group = dist.new_group(backend="gloo", timeout=SLOW_TIMEOUT)
    _job = _Job(rank, size, local_rank, store, slow_group)
    try:
        yield
        # Not after an error: peers may be gone, and this would wait for them.
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
    """The number of this process among those on its machine, from 0 on."""
    return 0 if _job is None else _job.local_rank


def size() -> int:
    """The number of processes."""
    return 1 if _job is None else _job.size


def is_main() -> bool:
    """Whether this is the first process, which writes the files and prints."""
    return rank() == 0


def own_seed(seed: int) -> int:
    """The seed of this process's own draws, which is `seed` in the first process."""
    from robusttrain.seeding import derived_seed

    return seed if is_main() else derived_seed(seed, f"process {rank()}")


def suffix() -> str:
    """The suffix of this process's own files, which is empty in the first process."""
    return "" if is_main() else f".{rank()}"


def share(count: int) -> slice:
    """The share of this process in `count` items: every `size`-th one, from its rank on."""
    return slice(rank(), None, size())


def broadcast(action: Callable[[], T]) -> T:
    """Call `action` in the first process only, and return its result in all of them."""
    if _job is None:
        return action()
    import torch.distributed as dist

    given = [action() if is_main() else None]
    dist.broadcast_object_list(given, src=0, group=_job.slow_group)
    return cast(T, given[0])


def gather(value: T) -> list[T] | None:
    """The values of all processes by rank in the first process; None in the others."""
    if _job is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] | None = [None] * size() if is_main() else None
    dist.gather_object(value, values, dst=0, group=_job.slow_group)
    return values


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if _job is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value, group=_job.slow_group)
    return values


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes of the values under each name."""
    gathered = all_gather(dict(values))
    return {name: sum(each[name] for each in gathered) for name in values}


def in_turns(action: Callable[[], T]) -> T:
    """Call `action` in all processes: in the first one, then in one per machine, then in the rest.

    A download then takes place only once.
    """
    if _job is None:
        return action()
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    results: list[T] = []
    for current in range(3):
        if current == turn:
            results.append(action())
        barrier()
    return results[0]


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if _job is not None:
        import torch.distributed as dist

        dist.barrier(group=_job.slow_group)


def all_reduce_sum(values: "Tensor") -> None:
    """Replace `values` by their sum over the processes of a training."""
    import torch.distributed as dist

    dist.all_reduce(values)


def all_true(flag: "Tensor") -> "Tensor":
    """Whether `flag`, a scalar on the device, is true in all processes of a training."""
    if _job is None:
        return flag
    import torch.distributed as dist

    held = flag.float()
    dist.all_reduce(held, dist.ReduceOp.MIN)
    return held.bool()


class DelayedMax:
    """A maximum over processes that is returned one call later.

    Between two batches, waiting for the other processes would cost time. By the next call the
    reduction has long finished.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, *values: int) -> list[int]:
        """The maxima over processes of the previous call's values, at first zeros.

        A single process gets the values of this call.
        """
        if _job is None:
            return list(values)
        previous, self._pending = self._pending, self._start(values)
        return [0] * len(values) if previous is None else self._result(previous)

    def last(self, *values: int) -> list[int]:
        """The maxima over processes of the values of this call."""
        return list(values) if _job is None else self._result(self._start(values))

    def _start(self, values: tuple[int, ...]) -> "tuple[Tensor, Any]":
        import torch
        import torch.distributed as dist

        assert _job is not None
        largest = torch.tensor(values)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=_job.slow_group, async_op=True)
        return largest, work

    def _result(self, started: "tuple[Tensor, Any]") -> list[int]:
        largest, work = started
        work.wait()
        return [int(value) for value in largest]


def set_device(device: "torch.device") -> None:
    """Make `device` the current device of this process, if it is one of several."""
    if _job is not None and device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


def command() -> str:
    """The beginning of a command line that starts the same processes."""
    if _job is None:
        return "robusttrain"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    machines = f"--nnodes={size() // here} " if here < size() else ""
    return f"torchrun {machines}--nproc_per_node={here} -m robusttrain"


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error`, or an error behind it, means that another process ended or does not answer.

    gloo and nccl raise plain RuntimeErrors in some cases, which are recognised by their message.
    """
    if _job is None:
        return False
    from torch.distributed import DistError

    text = str(error).lower()
    named = isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
    behind = error.__context__
    return isinstance(error, DistError) or named or (behind is not None and is_lost_peer(behind))


def exit_message(message: str) -> str | int:
    """The argument of `sys.exit` for a failure with `message`.

    Of several processes, only the first to fail prints its message, with its rank. The others fail
    because that one is gone.
    """
    if _job is None:
        return message
    first = True
    # The process that holds the store may be gone, too.
    with suppress(RuntimeError):
        first = _job.store.add("robusttrain failed", 1) == 1
        if not first:
            # torchrun kills all processes as soon as one exits, so wait until the message is out.
            _job.store.wait(["robusttrain printed"], timedelta(seconds=5))
    if first:
        prefix, _, rest = message.partition(": ")
        print(f"{prefix}: process {rank()} of {size()}: {rest}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            _job.store.set("robusttrain printed", "1")
    return 1
