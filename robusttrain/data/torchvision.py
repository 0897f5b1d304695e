"""The usual benchmark data sets, read by torchvision."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from robusttrain import ranges
from robusttrain.data._base import _Base
from robusttrain.data.split import Info, Split
from robusttrain.errors import InputError

DIGITS = tuple("0123456789")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


class _Source(NamedTuple):
    """How torchvision stores and reads a data set.

    Parameters
    ----------
    reader
        Its class in `torchvision.datasets`.
    files
        Its files, relative to `data_dir`.
    image_shape, class_names
        As in `Info`.
    parts
        Second argument of the class for the training and for the test set.
    labels
        Attribute of the labels.
    """

    reader: str
    files: tuple[str, ...]
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    parts: tuple[bool, bool] | tuple[str, str] = (True, False)
    labels: str = "targets"


def _mnist_like(reader: str, class_names: tuple[str, ...]) -> _Source:
    kinds = ("images-idx3", "labels-idx1")
    files = (f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds)
    paths = tuple(f"{reader}/raw/{file}" for file in files)
    return _Source(reader, paths, (1, 28, 28), class_names)


def _cifar_like(reader: str, folder: str, files: str, class_names: str) -> _Source:
    paths = tuple(f"{folder}/{file}" for file in files.split())
    return _Source(reader, paths, (3, 32, 32), tuple(class_names.split()))


_CIFAR10_FILES = (
    "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch batches.meta"
)
_SOURCES = {
    "mnist": _mnist_like("MNIST", DIGITS),
    "fashion_mnist": _mnist_like("FashionMNIST", FASHION),
    "kmnist": _mnist_like("KMNIST", KUZUSHIJI),
    "cifar10": _cifar_like("CIFAR10", "cifar-10-batches-py", _CIFAR10_FILES, CIFAR10),
    "cifar100": _cifar_like("CIFAR100", "cifar-100-python", "train test meta", CIFAR100),
    "svhn": _Source(
        "SVHN",
        ("train_32x32.mat", "test_32x32.mat"),
        (3, 32, 32),
        DIGITS,
        parts=("train", "test"),
        labels="labels",
    ),
}


@dataclass
class Torchvision(_Base):
    """A data set that torchvision downloads: mnist, fashion_mnist, kmnist, cifar10, cifar100, svhn.

    Parameters
    ----------
    name
        One of these six names.
    data_dir
        The folder of the data sets, in which torchvision chooses the subfolder.
    download
        Whether to download missing files. If all are there, nothing is written.
    """

    name: str
    data_dir: str = "data"
    download: bool = True
    _: KW_ONLY
    validation: float = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges.one_of(tuple(_SOURCES), name=self.name)

    def info(self) -> Info:
        source = _SOURCES[self.name]
        return Info(source.image_shape, len(source.class_names), source.class_names)

    def load(self) -> tuple[Split, Split]:
        missing = not self._is_there()
        if missing and not self.download:
            problem = f"holds no {self.name} and download=false"
            allowed = "put it there or set download=true"
            raise InputError("data_dir", self.data_dir, allowed, problem)
        # torchvision and its decoders have no common exception; whatever they raise is due to the
        # files or the network.
        try:
            train, test = (self._read(part, missing) for part in _SOURCES[self.name].parts)
        except Exception as error:
            raise self._failure(error) from error
        return train, test

    def _is_there(self) -> bool:
        root = Path(self.data_dir).expanduser()
        return all((root / file).is_file() for file in _SOURCES[self.name].files)

    def _read(self, part: bool | str, download: bool) -> Split:
        from torchvision import datasets

        source = _SOURCES[self.name]
        read = getattr(datasets, source.reader)(self.data_dir, part, download=download)
        labels = torch.as_tensor(getattr(read, source.labels)).long()
        split = Split(_channels_first(torch.as_tensor(read.data)), labels)
        self._check(split)
        return split

    def _check(self, split: Split) -> None:
        """Check that images and labels fit together, since most formats have no checksum."""
        info = self.info()
        if tuple(split.images.shape) != (split.size, *info.image_shape):
            shape = tuple(split.images.shape)
            raise ValueError(f"images of shape {shape} do not fit {split.size} labels")
        if int(split.labels.max()) >= info.num_classes:
            raise ValueError(f"label {int(split.labels.max())} of {info.num_classes} classes")

    def _failure(self, error: Exception) -> InputError:
        # Assertions in torchvision have no message.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")
        # If the files exist by now, the download did not fail.
        if self._is_there():
            what, remedy = "read", "delete it and download again"
        else:
            what, remedy = "downloaded", "check the network or put it there"
        problem = f"has no {self.name} that can be {what} ({reason})"
        return InputError("data_dir", self.data_dir, remedy, problem)


def _channels_first(images: Tensor) -> Tensor:
    if images.dim() == 3:
        return images.unsqueeze(1)
    last = images.shape[-1] == 3
    return (images.permute(0, 3, 1, 2) if last else images).contiguous()
