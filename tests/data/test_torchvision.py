"""The data sets of torchvision, on tiny files in their formats."""

import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from robusttrain.data.torchvision import Torchvision
from robusttrain.errors import InputError

MNIST_LIKE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
NAMES = [*MNIST_LIKE, "cifar10", "cifar100", "svhn"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def idx(values: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The IDX format: magic number with type and rank, sizes, bytes; all big-endian."""
    head = bytes([0, 0, 8, values.ndim])
    return head + b"".join(size.to_bytes(4, "big") for size in values.shape) + values.tobytes()


def random_bytes(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


def mnist_files(sizes: dict[str, int]) -> dict[str, bytes]:
    files = {}
    for part, size in sizes.items():
        files[f"{part}-images-idx3-ubyte"] = idx(random_bytes(size, 28, 28))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(size, dtype=np.uint8) % 10)
    return files


def write_mnist(root: Path, reader: str = "MNIST") -> Path:
    """12 training and 5 test images below `root`; returns the folder of the files."""
    raw = root / reader / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist_files({"train": 12, "t10k": 5}).items():
        (raw / name).write_bytes(content)
    return raw


def write_cifar10(root: Path) -> Path:
    """Two images in each of the six files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        batch = {"data": random_bytes(2, 3072), "labels": [number, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return folder


def forget_checksums(monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    for name in ("train_list", "test_list"):
        files = [[file, None] for file, _ in getattr(reader, name)]
        monkeypatch.setattr(reader, name, files)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": None})


def refuse(*args: object, **kwargs: object) -> None:
    raise URLError("no network in a test")


@pytest.mark.parametrize("name", NAMES)
def test_info_needs_no_files(name: str, tmp_path: Path) -> None:
    info = Torchvision(name, str(tmp_path / "nowhere"), download=False).info()
    assert info.num_classes == len(set(info.class_names)) == (100 if name == "cifar100" else 10)
    assert info.image_shape == ((1, 28, 28) if name in MNIST_LIKE else (3, 32, 32))


def test_cifar100_names_are_in_the_order_of_its_labels() -> None:
    # Its labels are numbered alphabetically.
    names = Torchvision("cifar100").info().class_names
    assert list(names) == sorted(names)


def test_class_names_are_those_that_torchvision_knows() -> None:
    for name in ("fashion_mnist", "kmnist"):
        known = getattr(datasets, MNIST_LIKE[name]).classes
        assert list(Torchvision(name).info().class_names) == known


@pytest.mark.parametrize(("name", "reader"), MNIST_LIKE.items())
def test_idx_files_arrive_byte_for_byte(name: str, reader: str, tmp_path: Path) -> None:
    write_mnist(tmp_path, reader)
    train, test = Torchvision(name, str(tmp_path), download=False).load()
    assert train.images.shape == (12, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert np.array_equal(train.images[:, 0].numpy(), random_bytes(12, 28, 28))
    assert np.array_equal(test.images[:, 0].numpy(), random_bytes(5, 28, 28))


def test_cifar10_has_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    forget_checksums(monkeypatch, datasets.CIFAR10)
    train, test = Torchvision("cifar10", str(tmp_path), download=False).load()
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert train.images.is_contiguous()
    assert np.array_equal(test.images.numpy(), random_bytes(2, 3072).reshape(2, 3, 32, 32))


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, label in (("train", 99), ("test", 4)):
        batch = {"data": random_bytes(1, 3072), "coarse_labels": [3], "fine_labels": [label]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": []}))
    forget_checksums(monkeypatch, datasets.CIFAR100)
    train, test = Torchvision("cifar100", str(tmp_path), download=False).load()
    assert (train.labels.tolist(), test.labels.tolist()) == ([99], [4])


def test_svhn_counts_from_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = random_bytes(32, 32, 3, 4)
    for part in ("train", "test"):
        labels = np.array([[10], [1], [2], [9]], dtype=np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pictures, "y": labels})
    files = {key: [url, file, None] for key, (url, file, _) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", files)
    train, _ = Torchvision("svhn", str(tmp_path), download=False).load()
    assert train.labels.tolist() == [0, 1, 2, 9]
    assert np.array_equal(train.images.numpy(), pictures.transpose(3, 2, 0, 1))
    assert train.images.is_contiguous()


def test_files_that_are_there_are_neither_fetched_nor_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", refuse)

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = state()
    Torchvision("mnist", str(tmp_path), download=True).load()
    assert state() == before


def test_missing_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = mnist_files({"train": 3, "t10k": 2})

    def deliver(url: str, download_root: str, filename: str, md5: str) -> None:
        name = filename.removesuffix(".gz")
        (Path(download_root) / name).write_bytes(files[name])

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", deliver)
    train, test = Torchvision("mnist", str(tmp_path / "new"), download=True).load()
    assert (train.size, test.size) == (3, 2)


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_without_download_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Torchvision(name, str(tmp_path), download=False).load()
    assert str(caught.value) == (
        f"data_dir={tmp_path} holds no {name} and download=false: put it there or set download=true"
    )


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", refuse)
    monkeypatch.setattr(datasets.svhn, "download_url", refuse)
    for name in ("mnist", "svhn"):
        with pytest.raises(InputError) as caught:
            Torchvision(name, str(tmp_path), download=True).load()
        message = str(caught.value)
        assert message.startswith(f"data_dir={tmp_path} has no {name} that can be downloaded (")
        assert message.endswith("): check the network or put it there")
        assert "\n" not in message


@pytest.mark.parametrize("kept", [0, 3, 10, 20, -1])
@pytest.mark.parametrize(
    "file",
    [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_a_truncated_file_says_what_to_do(
    file: str, kept: int, download: bool, tmp_path: Path
) -> None:
    path = write_mnist(tmp_path) / file
    whole = path.read_bytes()
    path.write_bytes(whole[:kept] if kept < len(whole) - 1 else whole[:-1])
    with pytest.raises(InputError) as caught:
        Torchvision("mnist", str(tmp_path), download).load()
    message = str(caught.value)
    assert message.startswith(f"data_dir={tmp_path} has no mnist that can be read (")
    assert message.endswith("): delete it and download again")
    assert "\n" not in message


def test_a_wrong_checksum_says_what_to_do(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with pytest.raises(
        InputError, match=r"cifar10 that can be read .*delete it and download again"
    ):
        Torchvision("cifar10", str(tmp_path), download=True).load()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-labels-idx1-ubyte", idx(np.zeros(11, np.uint8))),
        ("train-labels-idx1-ubyte", idx(np.full(12, 10, np.uint8))),
        ("train-images-idx3-ubyte", idx(np.zeros((12, 27, 28), np.uint8))),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    file: str, content: bytes, tmp_path: Path
) -> None:
    (write_mnist(tmp_path) / file).write_bytes(content)
    with pytest.raises(InputError, match="mnist that can be read"):
        Torchvision("mnist", str(tmp_path)).load()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"name=imagenet .*mnist, .*svhn"):
        Torchvision("imagenet")


@pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason="no shared copy of MNIST")
def test_mnist_is_mnist() -> None:
    train, test = Torchvision("mnist", str(SHARED), download=False).load()
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.labels.bincount().tolist() == counts
    assert test.labels.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert int(test.labels[0]) == 7
    assert float(train.images.float().mean() / 255) == pytest.approx(0.1307, abs=1e-4)
