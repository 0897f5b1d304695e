"""Data sets of the package `datasets`, from folders that the tests make."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from robusttrain.data import Split
from robusttrain.data.huggingface import HuggingFace
from robusttrain.errors import InputError

datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")

NAMES = ["ant", "bee"]


def pictures(count: int, size: tuple[int, int] = (6, 4)) -> list[Image.Image]:
    """Images of one colour each, `size` = (width, height); the red of an image is its number."""
    return [Image.new("RGB", size, (number, 100, 200)) for number in range(count)]


def table(count: int, labels: Sequence[object] | None = None, kind: Any = None, **more: Any) -> Any:
    """A data set with the columns `picture` and `kind`; its labels alternate if not given."""
    values = [number % 2 for number in range(count)] if labels is None else labels
    kinds = {"picture": datasets.Image(), "kind": kind or datasets.ClassLabel(names=NAMES)}
    columns = {"picture": pictures(count), "kind": values}
    return datasets.Dataset.from_dict(columns | more, features=datasets.Features(kinds))


def saved(data: Any, place: Path) -> str:
    data.save_to_disk(str(place / "saved"))
    return str(place / "saved")


def of(place: Path, **settings: Any) -> HuggingFace:
    settings = {"path": str(place), "data_dir": str(place.parent / "cache")} | settings
    return HuggingFace(**settings)


def red(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def refusal(dataset: HuggingFace) -> str:
    with pytest.raises(InputError) as caught:
        dataset.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def on_disk(place: Path) -> None:
    splits = {"train": table(10), "test": table(4)}
    datasets.DatasetDict(splits).save_to_disk(str(place))


def parquet(place: Path) -> None:
    place.mkdir()
    for name, count in {"train": 10, "test": 4}.items():
        table(count).to_parquet(str(place / f"{name}-0.parquet"))


def folders(place: Path) -> None:
    for split, count in {"train": 10, "test": 4}.items():
        for number, picture in enumerate(pictures(count)):
            file = place / split / NAMES[number % 2] / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)


@pytest.mark.parametrize("write", [on_disk, parquet, folders])
def test_every_kind_of_folder_has_the_same_images(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "photos")
    dataset = of(tmp_path / "photos")
    assert dataset.info() == ((3, 4, 6), 2, ("ant", "bee"))
    for split, count in zip(dataset.load(), (10, 4), strict=True):
        assert split.images.dtype == torch.uint8
        assert sorted(red(split)) == list(range(count))
        assert [value % 2 for value in red(split)] == split.labels.tolist()
        assert split.images[0, 1:, 0, 0].tolist() == [100, 200]
    assert dataset.test_positions().tolist() == [0, 1, 2, 3]
    assert {
        "seed": "path",
        "test_share": "path",
        "name": "path",
    }.items() <= dataset.unused().items()


def test_without_another_split_the_test_images_are_drawn(tmp_path: Path) -> None:
    path = saved(table(20), tmp_path)
    dataset = of(Path(path), test_share=0.3)
    train, test = dataset.load()
    assert test.labels.bincount().tolist() == [3, 3]
    assert sorted(red(train) + red(test)) == list(range(20))
    assert dataset.test_positions().tolist() == red(test)
    assert red(of(Path(path), test_share=0.3, seed=1).load()[1]) != red(test)
    assert "seed" not in dataset.unused()


def test_images_have_the_size_and_channels_that_are_asked_for(tmp_path: Path) -> None:
    path = Path(saved(table(10), tmp_path))
    assert of(path, image_size=3).load()[0].images.shape[1:] == (3, 3, 3)
    grey = of(path, channels=1).load()[0]
    luminance = 0.299 * red(of(path).load()[0])[0] + 0.587 * 100 + 0.114 * 200
    assert float(grey.images[0, 0, 0, 0]) == pytest.approx(luminance, abs=1)


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([0, 1, 2] * 3, "int64", ("0", "1", "2")),
        (["b", "c", "a"] * 3, "string", ("a", "b", "c")),
    ],
)
def test_labels_may_be_numbers_or_text(
    labels: list[Any], kind: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    data = table(9, labels, datasets.Value(kind))
    dataset = of(Path(saved(data, tmp_path)), label_column="kind")
    assert dataset.info().class_names == names
    train = dataset.load()[0]
    assert [str(labels[value]) for value in red(train)] == [names[y] for y in train.labels.tolist()]


def test_a_column_called_label_is_found(tmp_path: Path) -> None:
    data = table(10, None, datasets.Value("int64")).rename_column("kind", "label")
    assert of(Path(saved(data, tmp_path))).info().num_classes == 2


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no split": (lambda: table(4), {"train_split": "x", "test_split": "y"}, "dataset.test_split=y"),
    "no label": (
        lambda: table(4, None, datasets.Value("int64")), {},
        "has no column for labels: choose a column with dataset.label_column",
    ),
    "no such column": (
        lambda: table(4), {"label_column": "x"},
        "dataset.label_column=x is not allowed: it must be one of picture, kind",
    ),
    "no image": (lambda: table(4), {"image_column": "kind"}, "it must be one of picture"),
    "two images": (
        lambda: datasets.concatenate_datasets(
            [table(4), table(4).select_columns("picture").rename_column("picture", "other")], axis=1
        ), {},
        "has picture, other for images: choose a column with dataset.image_column",
    ),
    "unlabelled": (lambda: table(4, [0, 1, -1, 0]), {}, "has labels from -1 to 1: from 0 to 1"),
    "missing label": (lambda: table(4, [0, 1, None, 0]), {}, "integers from 0 or text"),
    "gap": (
        lambda: table(4, [1, 2, 1, 2], datasets.Value("int64")), {"label_column": "kind"},
        "no image of class 0: count classes from 0 without gaps",
    ),
    "one image": (lambda: table(4, [0, 0, 0, 1]), {}, "has one image of class bee"),
    "missing image": (
        lambda: table(8, None, None, picture=[*pictures(7), None]), {}, "has no image in row 7",
    ),
    "other sizes": (
        lambda: table(8, None, None, picture=[*pictures(7), *pictures(1, (9, 9))]), {},
        "row 7, has 9x9 pixels, the first image has 6x4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, settings, phrase = REFUSED[name]
    assert phrase in refusal(of(Path(saved(make(), tmp_path)), **settings))


def test_a_damaged_image_is_named_by_its_row(tmp_path: Path) -> None:
    folders(tmp_path / "photos")
    (tmp_path / "photos/test/ant/00.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    assert "has an unreadable image in row 0" in refusal(of(tmp_path / "photos"))


def test_splits_have_to_be_chosen_if_none_is_called_test(tmp_path: Path) -> None:
    splits = {"train": table(6), "validation": table(4)}
    path = Path(saved(datasets.DatasetDict(splits), tmp_path))
    assert "has no split test, but validation: give dataset.test_split=validation" in refusal(
        of(path)
    )
    assert of(path, test_split="validation").load()[1].size == 4
    assert "train_split=x is not allowed: it must be one of train, validation" in refusal(
        of(path, train_split="x")
    )


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    assert f"dataset.path={tmp_path} cannot be read by the package datasets" in refusal(
        of(tmp_path)
    )


class Hub:
    """The Hub, which counts its downloads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def _load(self, path: str, name: str | None, revision: str | None, cache_dir: str) -> Any:
        self.asked.append((path, name, revision))
        if path != "zoo/animals":
            raise ConnectionError("no such data set\nat all")
        return datasets.DatasetDict(train=table(10), test=table(4))


def test_a_data_set_of_the_hub_is_downloaded_once_and_only_if_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, keys = Hub(monkeypatch), {"path": "zoo/animals", "data_dir": str(tmp_path)}
    assert "is no folder, is not in" in refusal(HuggingFace(**keys, download=False))
    assert hub.asked == []
    first = HuggingFace(**keys).load()
    again = HuggingFace(**keys, download=False).load()
    assert [part.digest() for part in first] == [part.digest() for part in again]
    HuggingFace(**keys, name="small", revision="v1").load()
    assert hub.asked == [("zoo/animals", None, None), ("zoo/animals", "small", "v1")]


def test_a_failed_download_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch)
    dataset = HuggingFace("zoo/plants", data_dir=str(tmp_path))
    assert "is no folder, and cannot be downloaded (no such data set): check" in refusal(dataset)
    assert not [path for path in (tmp_path / "huggingface").iterdir() if path.is_dir()]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal(HuggingFace("photos"))
    assert message.startswith("dataset=huggingface needs a package that is not installed")
    assert message.endswith("pip install 'robusttrain[huggingface]'")


def test_progress_bars_are_as_before(tmp_path: Path) -> None:
    on_disk(tmp_path / "photos")
    before = datasets.are_progress_bars_disabled()
    of(tmp_path / "photos").load()
    assert datasets.are_progress_bars_disabled() == before


def test_images_that_do_not_fit_in_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk(tmp_path / "photos")
    fits = SimpleNamespace(fits=lambda size, device, share: size < 10 * 4 * 6 * 3)
    monkeypatch.setattr("robusttrain.data.huggingface.free_memory", fits)
    assert "more than the free memory" in refusal(of(tmp_path / "photos"))
