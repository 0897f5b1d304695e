"""Images that stay in their files: decoded when they are needed, by processes beside training."""

import ctypes
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robusttrain.data.decoding import Decoder
from robusttrain.data.split import Split
from robusttrain.errors import InputError
from robusttrain.runtime import free_memory
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.runtime.signals import SIGNALS

# Few enough to keep all threads busy to the end, many enough to hide the cost of a task.
FILES_PER_TASK = 64

# Of prctl(2): the signal that a process gets when its parent has died.
PR_SET_PDEATHSIG = 1

# Elsewhere workers are started afresh and get every signal that their parent gets.
FORKS = sys.platform == "linux"
MOST_WORKERS = 8

T = TypeVar("T")


def default_workers() -> int:
    """A worker for each core that is this process's share, and not too many."""
    if not FORKS:
        return 0
    # Set by torchrun.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // processes))


class Paths:
    """Many paths as few objects.

    A Python string is written to, in its count of references, by whoever looks at it; a million of
    them would be copied page by page into every worker.

    Parameters
    ----------
    folders
        (folder, names of the files in it), in order.
    """

    def __init__(self, folders: Iterable[tuple[str, Sequence[str]]]) -> None:
        self._folders: list[str] = []
        texts, lengths, ends = [], [np.zeros(0, np.int64)], [0]
        for folder, names in folders:
            encoded = [os.fsencode(name) for name in names]
            self._folders.append(folder)
            texts.append(b"".join(encoded))
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            ends.append(ends[-1] + len(encoded))
        self._text = b"".join(texts)
        self._name_ends = np.cumsum(np.concatenate(lengths))
        self._folder_ends = np.array(ends[1:])

    def __len__(self) -> int:
        return len(self._name_ends)

    def __getitem__(self, place: int) -> str:
        folder = self._folders[np.searchsorted(self._folder_ends, place, side="right")]
        start = self._name_ends[place - 1] if place else 0
        return f"{folder}/{os.fsdecode(self._text[start : self._name_ends[place]])}"


class Streamed(NamedTuple):
    """Images in files, of which nothing but names and labels is held.

    Parameters
    ----------
    paths
        The files, and perhaps others.
    rows
        Which of them, (N,).
    labels
        The class of each row, int64 of shape (N,), on the CPU.
    decoder
        How files become images.
    stream
        Whether they stay files where they are used; None where memory decides.
    workers
        Processes that decode batches in advance; 0 decodes when a batch is asked for.
    device
        Where batches go.
    """

    paths: Paths
    rows: NDArray[np.int64]
    labels: Tensor
    decoder: Decoder
    stream: bool | None
    workers: int
    device: torch.device = torch.device("cpu")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return self.decoder.shape

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self.rows)

    @property
    def decoded(self) -> int:
        """The bytes that all images take in memory."""
        return self.size * prod(self.image_shape)

    def to(self, device: torch.device | str, advance: Advance = unreported) -> "Split | Streamed":
        """The same samples for use on `device`: a `Split` there unless they are to stay files.

        Raises
        ------
        InputError
            If all are decoded, and one cannot be.
        """
        there = self._replace(device=torch.device(device))
        stay = self.stream
        if stay is None:
            stay = not free_memory.fits(self.decoded, there.device)
        return there if stay else there.loaded(advance)

    def take(self, indices: Tensor) -> "Streamed":
        """Those at `indices`, int64 of shape (M,) on any device, in their order."""
        here = indices.cpu()
        return self._replace(rows=self.rows[here.numpy()], labels=self.labels[here])

    def loaded(self, advance: Advance = unreported) -> Split:
        """All of them, decoded, on `device`.

        Raises
        ------
        InputError
            If one cannot be decoded; of several the first is named.
        """
        pixels = np.empty((self.size, *self.image_shape), np.uint8)

        def decode(row: int) -> None:
            pixels[row] = self.decoder.pixels(self._path(row))

        for done in self._all(decode):
            advance(len(done))
        return Split(torch.from_numpy(pixels).to(self.device), self.labels.to(self.device))

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at each of `parts`, indices on the CPU, on `device`.

        They are the same whatever the number of workers.

        Raises
        ------
        InputError
            If an image cannot be decoded, or a worker has died.
        """
        # Arrays, as a tensor would take along all that it is a view of.
        wanted = [part.numpy() for part in parts]
        for part, images in zip(wanted, self._delivered(wanted), strict=True):
            y = self.labels[torch.from_numpy(part)]
            yield images.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def digest(self, advance: Advance = unreported) -> str:
        """`files:` and a SHA-256, in hexadecimal, of what is quickly read of every file.

        That is its label, its length and its first 16 KiB: all of a small file. Names do not count.

        Raises
        ------
        InputError
            If the head of a file shows that it cannot be decoded; of several the first is named.
        """

        def of_head(row: int) -> bytes:
            return hashlib.sha256(self.decoder.head(self._path(row))).digest()

        sha = hashlib.sha256(self.labels.numpy().data)
        for heads in self._all(of_head):
            sha.update(b"".join(heads))
            advance(len(heads))
        return f"files:{sha.hexdigest()}"

    def _path(self, row: int) -> str:
        return self.paths[int(self.rows[row])]

    def _all(self, work: Callable[[int], T]) -> Iterator[list[T]]:
        """What `work` returns for each row, in order, in lists of a few."""

        def some(start: int) -> list[T]:
            return [work(row) for row in range(start, min(start + FILES_PER_TASK, self.size))]

        with ThreadPoolExecutor() as pool:
            yield from pool.map(some, range(0, self.size, FILES_PER_TASK))

    def _delivered(self, wanted: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        workers = min(self.workers, len(wanted))
        loader = DataLoader(
            _Reader(self),
            sampler=wanted,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            # Without one of its own it would draw from torch's global stream.
            generator=torch.Generator(),
            worker_init_fn=partial(_live_for, os.getpid()) if FORKS else None,
            multiprocessing_context="fork" if FORKS and workers else None,
        )
        try:
            for images in _started(loader):
                # In a worker it would have been raised with the worker's traceback in its message.
                if isinstance(images, InputError):
                    raise images
                yield images
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            problem = f"has failed ({str(error).splitlines()[0]})"
            allowed = "where memory or /dev/shm is short, give fewer, or 0 for none"
            raise InputError("dataset.workers", self.workers, allowed, problem) from error


class _Reader(Dataset[Any]):
    """What a worker does for each batch."""

    def __init__(self, samples: Streamed) -> None:
        self.samples = samples

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor | InputError:
        samples = self.samples
        pixels = np.empty((len(rows), *samples.image_shape), np.uint8)
        try:
            for place, row in enumerate(rows):
                pixels[place] = samples.decoder.pixels(samples._path(row))
        except InputError as error:
            return error
        return torch.from_numpy(pixels)


def _as_it_is(batch: Any) -> Any:
    return batch


def _started(loader: "DataLoader[Any]") -> Iterator[Any]:
    """An iterator over `loader`, whose workers run by now where it has any."""
    if not FORKS or loader.num_workers == 0:
        return cast("Iterator[Any]", iter(loader))
    # Workers inherit the mask; only this process handles signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return cast("Iterator[Any]", iter(loader))
    finally:
        # Torch's own handler raises wherever the program is when a worker dies, be it in the middle
        # of a checkpoint. Whoever waits for a batch sees that, too.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live_for(parent: int, worker: int) -> None:
    """Have this worker end with its parent, however that ends, and when its parent says so."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_leave_when_told_by, args=(parent,), daemon=True).start()


def _leave_when_told_by(parent: int) -> None:
    """Wait for a SIGTERM of the parent; one that all processes of a job get is not for workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
