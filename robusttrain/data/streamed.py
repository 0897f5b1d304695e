"""Images that stay in their files, and are decoded on demand by worker processes."""

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

from robusttrain.data.decoding import Decoder, refused
from robusttrain.data.split import Split
from robusttrain.errors import InputError
from robusttrain.runtime import free_memory
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.runtime.signals import SIGNALS

# Few enough to keep all threads busy to the end, and enough to amortise the overhead of a task.
FILES_PER_TASK = 64

# From prctl(2): sets the signal that a process receives when its parent dies.
PR_SET_PDEATHSIG = 1

# Elsewhere workers would be spawned, and would receive every signal that their parent receives.
FORKS = sys.platform == "linux"
MOST_WORKERS = 8

T = TypeVar("T")


def default_workers() -> int:
    """One worker for each core of this process, at most `MOST_WORKERS`."""
    if not FORKS:
        return 0
    # torchrun sets this variable; its processes share the cores.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // processes))


class Paths:
    """A sequence of many paths, stored in a few objects.

    Each access to a Python string changes its reference count. A list of a million strings would
    therefore be copied, page by page, into every forked worker.

    Parameters
    ----------
    folders
        Pairs of a folder and the names of its files, in order.
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
    """Images in files; only their names and labels are in memory.

    Parameters
    ----------
    paths
        The paths of all files of the data set.
    rows
        Indices of these samples in `paths`, (N,).
    labels
        The class of each sample, int64 of shape (N,), on the CPU.
    decoder
        Decodes a file to an image.
    stream
        Whether the images stay in their files for use. None decides by the free memory.
    workers
        Processes that decode batches in advance. With 0, this process decodes each batch on demand.
    device
        The device of the batches.
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
    def decoded_bytes(self) -> int:
        """The bytes that all images take in memory."""
        return self.size * prod(self.image_shape)

    def to(self, device: torch.device | str, advance: Advance = unreported) -> "Split | Streamed":
        """The same samples for use on `device`, as a `Split` there unless they stay in files.

        Raises
        ------
        InputError
            If the images are loaded, and one cannot be decoded.
        """
        moved = self._replace(device=torch.device(device))
        stream = self.stream
        if stream is None:
            stream = not free_memory.fits(self.decoded_bytes, moved.device)
        return moved if stream else moved.loaded(advance)

    def take(self, indices: Tensor) -> "Streamed":
        """The samples at `indices`, int64 of shape (M,) on any device, in that order."""
        here = indices.cpu()
        return self._replace(rows=self.rows[here.numpy()], labels=self.labels[here])

    def loaded(self, advance: Advance = unreported) -> Split:
        """All samples, decoded, on `device`.

        Raises
        ------
        InputError
            If images cannot be decoded; the message names these files.
        """
        pixels = np.empty((self.size, *self.image_shape), np.uint8)

        def decode(row: int) -> None:
            pixels[row] = self.decoder.pixels(self._path(row))

        for done in self._map(decode):
            advance(len(done))
        return Split(torch.from_numpy(pixels).to(self.device), self.labels.to(self.device))

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `parts`, indices on the CPU, the images and labels, on `device`.

        They do not depend on the number of workers.

        Raises
        ------
        InputError
            If an image cannot be decoded, or a worker has died.
        """
        # Arrays, since a tensor that is a view would be sent with all of its storage.
        wanted = [part.numpy() for part in parts]
        for part, images in zip(wanted, self._decoded(wanted), strict=True):
            y = self.labels[torch.from_numpy(part)]
            yield images.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def digest(self, advance: Advance = unreported) -> str:
        """`files:` and a SHA-256, in hexadecimal, of the label and the head of every file.

        The head is the length of the file and its first 16 KiB, so that large files are not read
        in full. Names do not enter.

        Raises
        ------
        InputError
            If headers of files show that they cannot be decoded; the message names these files.
        """

        def head_digest(row: int) -> bytes:
            return hashlib.sha256(self.decoder.head(self._path(row))).digest()

        sha = hashlib.sha256(self.labels.numpy().data)
        for heads in self._map(head_digest):
            sha.update(b"".join(heads))
            advance(len(heads))
        return f"files:{sha.hexdigest()}"

    def _path(self, row: int) -> str:
        return self.paths[int(self.rows[row])]

    def _map(self, work: Callable[[int], T]) -> Iterator[list[T]]:
        """The results of `work` for all rows, in order, in lists of `FILES_PER_TASK`.

        Raises
        ------
        InputError
            At the end, for all rows for which `work` has raised one.
        """

        def attempt(row: int) -> T | InputError:
            try:
                return work(row)
            except InputError as error:
                return error

        def some(start: int) -> list[T | InputError]:
            return [attempt(row) for row in range(start, min(start + FILES_PER_TASK, self.size))]

        errors: list[InputError] = []
        with ThreadPoolExecutor() as pool:
            for results in pool.map(some, range(0, self.size, FILES_PER_TASK)):
                errors += [result for result in results if isinstance(result, InputError)]
                yield [result for result in results if not isinstance(result, InputError)]
        if errors:
            raise refused(errors)

    def _decoded(self, wanted: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        """The images at each of `wanted`, as bytes on the CPU."""
        workers = min(self.workers, len(wanted))
        loader = DataLoader(
            _BatchReader(self),
            sampler=wanted,
            batch_size=None,
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=self.device.type == "cuda",
            # By default the loader draws from torch's global stream.
            generator=torch.Generator(),
            worker_init_fn=partial(_exit_with_parent, os.getpid()) if FORKS else None,
            multiprocessing_context="fork" if FORKS and workers else None,
        )
        try:
            for images in _iterate(loader):
                # Returned, since an error that a worker raises has its traceback in the message.
                if isinstance(images, InputError):
                    raise images
                yield images
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            problem = f"has failed ({str(error).splitlines()[0]})"
            allowed = "if memory or /dev/shm is short, use fewer workers, or 0"
            raise InputError("dataset.workers", self.workers, allowed, problem) from error


class _BatchReader(Dataset[Any]):
    """Decodes one batch for each item, in a worker."""

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


def _identity(batch: Any) -> Any:
    return batch


def _iterate(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Start the workers of `loader`, if any, and return its iterator."""
    if not FORKS or loader.num_workers == 0:
        return cast("Iterator[Any]", iter(loader))
    # Workers inherit the mask; only this process handles signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return cast("Iterator[Any]", iter(loader))
    finally:
        # Remove torch's handler, which raises wherever the program is when a worker dies, even
        # while a checkpoint is written. The next batch raises in any case.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent(parent: int, worker: int) -> None:
    """Make this worker exit when its parent dies, or sends it SIGTERM."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_exit_on_sigterm_from, args=(parent,), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    """Exit on a SIGTERM from the parent, but not on one that is sent to all processes of a job."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
