"""Images that stay in files: any number of workers reads the same, and all workers exit."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from robusttrain.data import Split, Streamed, batches, portions, streamed
from robusttrain.data import batching as batching_module
from robusttrain.data.folder import Folder
from robusttrain.data.streamed import Paths
from robusttrain.errors import InputError
from robusttrain.runtime import free_memory
from robusttrain.seeding import generator_for
from toys.command_line import PATIENCE

COUNT = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of `COUNT` images of noise each."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in "ab":
        (root / name).mkdir()
        for number in range(COUNT):
            pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def of(root: Path, **settings: Any) -> Streamed:
    """The training part of a folder, to stay in files."""
    return Folder(str(root), **{"stream": True, "workers": 0, **settings}).load()[0]


def order(samples: Streamed | Split, batch_size: int = 4, first: int = 0) -> list[Tensor]:
    made = batches(samples, batch_size, generator_for(0, "order"), first=first)
    return [tensor for batch in made for tensor in batch]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# Paths


NAME = st.binary(min_size=1, max_size=12).filter(lambda name: not {0, 47} & set(name))


@given(st.lists(st.lists(NAME.map(os.fsdecode), min_size=1, max_size=5), max_size=5))
def test_paths_are_those_that_were_given_whatever_their_bytes(names: list[list[str]]) -> None:
    folders = [(f"/data/{number}", each) for number, each in enumerate(names)]
    paths = Paths(folders)
    expected = [f"{folder}/{name}" for folder, each in folders for name in each]
    assert [paths[place] for place in range(len(paths))] == expected


def test_a_million_paths_are_a_handful_of_objects() -> None:
    paths = Paths([("/data", [f"{number:07}.jpg" for number in range(10_000)])])
    members = list(vars(paths).values())
    assert len(members) < 6
    assert [len(member) for member in members if isinstance(member, list)] == [1]


# What is read


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_from_memory_for_any_number_of_workers(
    workers: int, pictures: Path
) -> None:
    samples = of(pictures, workers=workers)
    assert equal(order(samples), order(samples.loaded()))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_resumed_in_its_middle(workers: int, pictures: Path) -> None:
    whole = order(of(pictures))
    assert equal(order(of(pictures, workers=workers), first=2), whole[4:])
    assert order(of(pictures, workers=workers), first=5) == []


def test_what_is_taken_is_what_memory_would_give(pictures: Path) -> None:
    samples = of(pictures)
    rows = torch.tensor([7, 0, 7, 12])
    ours, theirs = samples.take(rows), samples.loaded().take(rows)
    assert isinstance(ours, Streamed)
    assert equal(list(ours.loaded()), list(theirs))
    again = torch.tensor([3, 1])
    assert equal(list(ours.take(again).loaded()), list(theirs.take(again)))


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_the_global_random_stream_alone(workers: int, pictures: Path) -> None:
    before = torch.get_rng_state()
    order(of(pictures, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_portions_are_all_samples_in_their_order(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = of(pictures)
    monkeypatch.setattr(batching_module, "PORTION", 7 * 3 * 5 * 6)
    parts = [part.loaded() for part in portions(samples, 4)]
    assert max(part.size for part in parts) == 7
    assert max(part.size for part in portions(samples, 9)) == 9
    assert torch.equal(torch.cat([part.images for part in parts]), samples.loaded().images)


# Memory or files


@pytest.mark.parametrize(
    ("setting", "free", "stays"),
    [(True, 1e9, True), (False, 1, False), ("auto", 1, True), ("auto", 1e9, False)],
)
def test_images_stay_in_files_if_set_or_if_memory_is_short(
    setting: bool | str, free: float, stays: bool, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "available", lambda: free)
    assert isinstance(of(pictures, stream=setting).to("cpu"), Streamed) is stays


def test_half_of_the_free_memory_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "available", lambda: 1000.0)
    cpu = torch.device("cpu")
    assert free_memory.fits(500, cpu)
    assert not free_memory.fits(501, cpu)
    assert free_memory.fits(1000, cpu, share=1)


MACHINE = SimpleNamespace(available=5000 * 1024)


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/\n", {}, 5000 * 1024),
        (
            "0::/job/step\n",
            {
                "job/memory.max": "3000\n",
                "job/memory.current": "2500\n",
                "job/memory.stat": "anon 100\nfile 400\n",
                "job/step/memory.max": "max\n",
                "job/step/memory.current": "10\n",
                "job/step/memory.stat": "anon 1\nfile 2\n",
            },
            900,
        ),
        (
            "9:cpu:/x\n4:memory:/y\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "800\n",
                "memory/memory.usage_in_bytes": "700\n",
                "memory/memory.stat": "total_cache 50\n",
            },
            150,
        ),
    ],
)
def test_free_memory_is_the_least_that_machine_and_groups_leave(
    groups: str,
    files: dict[str, str],
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in {"groups": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "virtual_memory", lambda: MACHINE)
    monkeypatch.setattr(free_memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(free_memory, "GROUP_ROOT", tmp_path)
    assert free_memory.available() == free


# Digests


@pytest.fixture
def copy(pictures: Path, tmp_path: Path) -> Path:
    for file in pictures.rglob("*.png"):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        (tmp_path / file.parent.name / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_the_digest_depends_on_the_data_alone(pictures: Path, copy: Path) -> None:
    digest = of(pictures).digest()
    assert digest.startswith("files:")
    assert of(pictures, stream=False, workers=2).digest() == digest
    assert of(copy).digest() == digest
    for file in copy.rglob("*.png"):
        os.utime(file, (0, 0))
    assert of(copy).digest() == digest


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def another(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("change", [longer, another, Path.unlink])
def test_the_digest_changes_with_a_file(
    change: Callable[[Path], None], pictures: Path, copy: Path
) -> None:
    names = [Path(of(copy).paths[int(row)]) for row in of(copy).rows]
    change(names[3])
    assert of(copy).digest() != of(pictures).digest()


def test_the_digest_changes_with_a_label(pictures: Path) -> None:
    samples = of(pictures)
    other = samples._replace(labels=samples.labels.flip(0))
    assert other.digest() != samples.digest()


def test_progress_counts_all_images(pictures: Path) -> None:
    samples = of(pictures)
    for work in (samples.digest, samples.loaded):
        told: list[int] = []
        work(told.append)
        assert sum(told) == samples.size


# Unreadable files


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_named_when_it_is_decoded(workers: int, copy: Path) -> None:
    samples = of(copy, workers=workers)
    bad = Path(samples.paths[int(samples.rows[-1])])
    bad.write_bytes(bad.read_bytes()[:70])
    assert samples.digest()
    with pytest.raises(InputError) as caught:
        order(samples)
    assert str(caught.value).startswith(f"{bad} is an unreadable image (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{bad} is an unreadable image ("),
        (b"no image", "{bad} is an unreadable image ("),
        (Image.new("RGB", (6, 9)), "{bad} has 6x9 pixels, the first image has 6x5"),
        (Image.fromarray(np.zeros((5, 6), np.uint16)), "{bad} has pixels of mode I"),
    ],
)
def test_a_bad_header_is_reported_without_decoding(
    content: bytes | Image.Image, message: str, copy: Path
) -> None:
    samples = of(copy)
    bad = Path(samples.paths[int(samples.rows[-1])])
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        content.save(bad)
    with pytest.raises(InputError) as caught:
        samples.digest()
    assert str(caught.value).startswith(message.format(bad=bad))


def test_a_dead_worker_is_reported_with_the_key_to_change(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(loader: object) -> Iterator[Tensor]:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nMore")

    monkeypatch.setattr(streamed, "_iterate", broken)
    with pytest.raises(InputError, match=r"workers=1 has failed \(DataLoader worker \(pid 7\)"):
        order(of(pictures, workers=1))


# Workers


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], within: float) -> bool:
    end = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(alive, pids))


class Reading:
    """A process that reads a batch with two workers, and then follows commands."""

    def __init__(self, samples: Streamed) -> None:
        said, says = os.pipe()
        hears, self._tells = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._read(samples, says, hears)
        self.workers: list[int] = json.loads(os.read(said, 1000))

    def _read(self, samples: Streamed, says: int, hears: int) -> None:
        code = 1
        try:
            made = batches(samples, 2, None)
            next(made)
            tasks = Path("/proc/self/task").glob("*/children")
            workers = [int(word) for task in tasks for word in task.read_text().split()]
            os.write(says, json.dumps(workers).encode())
            word = os.read(hears, 10)
            if word == b"go on":
                assert len(list(made)) == COUNT - 2
            elif word == b"tell":
                for worker in multiprocessing.active_children():
                    worker.terminate()
                    worker.join(2)
                    assert worker.exitcode == 0
            else:
                made.close()
            code = 0
        finally:
            os._exit(code)

    def kill(self) -> None:
        """Kill the process, unless it was waited for."""
        if alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def end(self, word: bytes) -> int:
        os.write(self._tells, word)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def reading(pictures: Path) -> Iterator[Reading]:
    samples = of(pictures, workers=2, test_share=0.1)
    assert samples.size == 2 * COUNT - 2
    process = Reading(samples)
    assert len(process.workers) == 2
    assert all(map(alive, process.workers))
    yield process
    process.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_their_parent(signum: int, reading: Reading) -> None:
    for worker in reading.workers:
        os.kill(worker, signum)
    time.sleep(0.1)
    assert all(map(alive, reading.workers))
    # It has read the ten remaining batches.
    assert reading.end(b"go on") == 0
    assert gone(reading.workers, within=PATIENCE)


def test_workers_die_with_their_parent(reading: Reading) -> None:
    os.kill(reading.pid, signal.SIGKILL)
    os.waitpid(reading.pid, 0)
    # Without the signal, they would check for their parent only after five seconds.
    assert gone(reading.workers, within=4)


def test_workers_exit_on_sigterm_from_their_parent(reading: Reading) -> None:
    """A parent that ends by an error sends it before it waits for them."""
    assert reading.end(b"tell") == 0
    assert gone(reading.workers, within=PATIENCE)


def test_workers_end_with_an_interrupted_epoch(reading: Reading) -> None:
    assert reading.end(b"leave") == 0
    assert gone(reading.workers, within=PATIENCE)
