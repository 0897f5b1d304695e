"""Arrays of the user's own: what is read is what was saved, and each mistake has one message."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from robusttrain.data import Mapped, Split, batches
from robusttrain.data.arrays import Arrays
from robusttrain.errors import InputError
from robusttrain.runtime import free_memory
from robusttrain.seeding import generator_for

Array = NDArray[Any]


def pixels(count: int = 12, shape: tuple[int, ...] = (4, 5, 3)) -> Array:
    """Images of noise, (N, H, W, C) if `shape` is not another one."""
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int = 12, classes: int = 3) -> Array:
    return np.arange(count) % classes


def saved(place: Path, **arrays: Array) -> str:
    np.savez(place / "data.npz", **arrays)
    return str(place / "data.npz")


def both(place: Path, x: Array, y: Array) -> Arrays:
    return Arrays(saved(place, x_train=x, y_train=y, x_test=x[:6], y_test=y[:6]))


def refusal(dataset: Arrays) -> str:
    with pytest.raises(InputError) as caught:
        dataset.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "y_train", "X_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_a_file_with_both_splits_is_read_in_order(names: tuple[str, ...], tmp_path: Path) -> None:
    parts = pixels(12), labels(12), pixels(6)[::-1], labels(6)[::-1]
    dataset = Arrays(saved(tmp_path, **dict(zip(names, parts, strict=True))))
    train, test = dataset.load()
    assert dataset.info() == ((3, 4, 5), 3, ("0", "1", "2"))
    for split, x, y in ((train, *parts[:2]), (test, *parts[2:])):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.permute(0, 2, 3, 1).tolist() == x.tolist()
        assert split.labels.tolist() == y.tolist()


@pytest.mark.parametrize(
    "names", [("x", "y"), ("X", "y"), ("images", "labels"), ("data", "labels")]
)
def test_each_split_may_have_its_file(names: tuple[str, str], tmp_path: Path) -> None:
    files = {}
    for part, count in (("train", 12), ("test", 6)):
        (tmp_path / part).mkdir()
        arrays = dict(zip(names, (pixels(count), labels(count)), strict=True))
        files[part] = saved(tmp_path / part, **arrays)
    train, test = Arrays(**files).load()
    assert (train.size, test.size) == (12, 6)


def npy(place: Path, x: Array, y: Array, **settings: Any) -> Arrays:
    for name, array in {"x": x, "y": y}.items():
        np.save(place / f"{name}.npy", array)
    files = [str(place / f"{name}.npy") for name in "xy"]
    return Arrays(files[0], train_labels=files[1], **settings)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_images_that_stay_in_their_file_are_those_of_memory(dtype: type, tmp_path: Path) -> None:
    x = pixels(60) if dtype is np.uint8 else (pixels(60) / 255).astype(dtype)
    inside = Arrays(saved(tmp_path, x=x, y=labels(60))).load()
    outside = npy(tmp_path, x, labels(60), stream=True).load()
    for split, mapped in zip(inside, outside, strict=True):
        assert isinstance(split, Split)
        assert isinstance(mapped.to("cpu"), Mapped)
        assert mapped.digest() == split.digest()
        assert mapped.image_shape == split.image_shape
        assert mapped.decoded_bytes == split.images.nbytes
        ours, theirs = (
            list(batches(part, 7, generator_for(0, "order"))) for part in (mapped, split)
        )
        for some, others in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, some, others))
        rows = torch.tensor([5, 2, 2])
        assert mapped.take(rows).digest() == split.take(rows).digest()


@pytest.mark.parametrize(
    ("setting", "free", "stays"),
    # The training part has 48 images of 60 bytes.
    [("auto", 5760, False), ("auto", 5759, True), (True, 1e9, True), (False, 1, False)],
)
def test_images_stay_in_their_file_if_they_take_more_than_half_of_the_memory(
    setting: bool | str, free: float, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "available", lambda: free)
    train, _ = npy(tmp_path, pixels(60), labels(60), stream=setting).load()
    assert isinstance(train.to("cpu"), Mapped) is stays


def test_npy_files_hold_the_same_as_npz(tmp_path: Path) -> None:
    for name, array in {"x": pixels(), "y": labels()}.items():
        np.save(tmp_path / f"{name}.npy", array)
    file, beside = (str(tmp_path / f"{name}.npy") for name in "xy")
    dataset = Arrays(file, file, beside, beside)
    expected = both(tmp_path, pixels(), labels()).load()[0]
    assert all(part.digest() == expected.digest() for part in dataset.load())


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.transpose(0, 3, 1, 2),
    "NHW": lambda x: x[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [True, False])
def test_every_layout_gives_the_same_images(given: bool, layout: str, tmp_path: Path) -> None:
    dataset = both(tmp_path, LAYOUTS[layout](pixels()), labels())
    dataset.layout = layout if given else "auto"
    images = dataset.load()[0].images
    expected = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
    assert torch.equal(images, expected[:, : images.shape[1]])
    assert images.is_contiguous()


@pytest.mark.parametrize("shape", [(3, 4, 3), (1, 4, 3), (4, 5, 6), (2, 5, 2)])
def test_a_layout_that_two_axes_or_none_could_have_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    dataset = both(tmp_path, pixels(12, shape), labels())
    assert "set dataset.layout=NHWC (channels last) or NCHW" in refusal(dataset)
    chosen = Arrays(dataset.train, layout="NCHW")
    assert chosen.info().image_shape == shape


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_stay_floats(dtype: type, tmp_path: Path) -> None:
    x = (pixels() / 255).astype(dtype)
    images = both(tmp_path, x, labels()).load()[0].images
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2))


def test_names_are_labels_in_the_order_of_the_alphabet_or_as_given(tmp_path: Path) -> None:
    names = np.array(["dog", "ant", "cat"] * 4)
    dataset = both(tmp_path, pixels(), names)
    assert dataset.info().class_names == ("ant", "cat", "dog")
    assert dataset.load()[0].labels.tolist() == [2, 0, 1] * 4
    given = Arrays(dataset.train, class_names=["dog", "bee", "cat", "ant"])
    assert given.info()[1:] == (4, ("dog", "bee", "cat", "ant"))
    assert given.load()[0].labels.tolist() == [0, 3, 2] * 4


def test_classes_may_have_names_a_number_and_no_images(tmp_path: Path) -> None:
    file = saved(tmp_path, x=pixels(), y=labels())
    assert Arrays(file, class_names=list("abcd")).info()[1:] == (4, tuple("abcd"))
    assert Arrays(file, num_classes=5).info()[1:] == (5, tuple("01234"))
    assert sum(part.size for part in Arrays(file, num_classes=5).load()) == 12


def test_a_column_of_labels_is_a_vector(tmp_path: Path) -> None:
    assert both(tmp_path, pixels(), labels()[:, None]).load()[0].labels.tolist() == [0, 1, 2] * 4


def test_the_test_share_is_a_partition_of_each_class(tmp_path: Path) -> None:
    x = np.arange(30, dtype=np.uint8)[:, None, None] + np.zeros((1, 4, 4), np.uint8)
    file = saved(tmp_path, x=x, y=labels(30))
    train, test = Arrays(file, test_share=0.3).load()
    assert test.labels.bincount().tolist() == [3, 3, 3]

    def values(part: Split) -> list[int]:
        return part.images[:, 0, 0, 0].tolist()

    assert sorted(values(train) + values(test)) == list(range(30))
    for part in (train, test):
        assert [value % 3 for value in values(part)] == part.labels.tolist()
        assert values(part) == sorted(values(part))
    assert Arrays(file, test_share=0.3).test_positions().tolist() == values(test)
    again, other = (Arrays(file, test_share=0.3, seed=seed).load()[1] for seed in (0, 1))
    assert again.digest() == test.digest() != other.digest()


def test_settings_without_effect_are_known(tmp_path: Path) -> None:
    both(tmp_path, pixels(), labels())
    whole = str(tmp_path / "data.npz")
    assert Arrays(whole).unused() == {
        "seed": "train", "test_share": "train", "train_labels": "train", "test_labels": "test",
        "stream": "train",
    }  # fmt: skip
    alone = Arrays("x.npy", "y.npy", class_names=["a", "b"])
    assert alone.unused() == {"seed": "test", "test_share": "test", "num_classes": "class_names"}
    assert Arrays("x.npy").unused() == {"test_labels": "test"}


BAD_PIXELS: dict[str, tuple[Array, str]] = {
    "NaN": (np.full((12, 4, 4), np.nan), "has images of float64 with values from nan to nan"),
    "normalised": (np.linspace(-2, 2, 192).reshape(12, 4, 4), "with values from -2 to 2"),
    "float bytes": (pixels(12, (4, 4)) * 1.0, "with values from 0 to 2"),
    "cast to bytes": (pixels(12, (4, 4)) // 255, "multiply by 255"),
    "int64": (pixels(12, (4, 4)).astype(np.int64), "has images of type int64: bytes (uint8)"),
    "complex": (pixels(12, (4, 4)) * 1j, "has images of type complex128"),
    "flat": (pixels(12, (16,)), "has images of shape 12x16: expected NHWC or NCHW or NHW"),
    "empty": (pixels(12, (0, 4)), "has images of shape 12x0x4"),
    "fewer": (pixels(11, (4, 4)), "has 11 images and 12 labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PIXELS)
def test_what_stands_for_no_image_is_refused(name: str, tmp_path: Path) -> None:
    x, phrase = BAD_PIXELS[name]
    message = refusal(Arrays(saved(tmp_path, x=x, y=labels())))
    assert message.startswith(f"dataset.train={tmp_path}/data.npz ")
    assert phrase in message


BAD_LABELS: dict[str, tuple[Array, str]] = {
    "floats": (labels() * 1.0, "has labels of type float64 and shape 12: integers"),
    "one-hot": (np.eye(3, dtype=int)[labels()], "shape 12x3: integers from 0"),
    "a number": (np.array(3), "a single number"),
    "negative": (labels() - 1, "has labels from -1 to 1: from 0 to 1"),
    "from 1": (labels() + 1, "has labels up to 3, but no image of class 0: count classes from 0"),
    "one class": (labels() * 0, "has labels up to 0, but no image of class 1"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_what_is_no_label_is_refused(name: str, tmp_path: Path) -> None:
    y, phrase = BAD_LABELS[name]
    assert phrase in refusal(Arrays(saved(tmp_path, x=pixels(), y=y)))


def test_a_test_set_of_another_shape_or_class_is_refused(tmp_path: Path) -> None:
    parts = {"x_train": pixels(), "y_train": labels(), "y_test": labels()}
    message = refusal(Arrays(saved(tmp_path, **parts, x_test=pixels(12, (4, 4)))))
    assert "has images of 1x4x4 (channels, height, width): 3x4x5, as in training" in message
    parts = {"x_train": pixels(), "x_test": pixels(), "y_train": labels()}
    message = refusal(Arrays(saved(tmp_path, **parts, y_test=labels(12, 4))))
    assert "has labels from 0 to 3: from 0 to 2" in message
    names = np.array(["a", "b"] * 6)
    parts |= {"y_train": names, "y_test": np.array(["a", "c"] * 6)}
    assert "has labels that are no class: c: one of a, b" in refusal(
        Arrays(saved(tmp_path, **parts))
    )


def test_a_class_with_one_image_cannot_be_divided(tmp_path: Path) -> None:
    y = np.array([0] * 11 + [1])
    assert "has one image of class 1" in refusal(Arrays(saved(tmp_path, x=pixels(), y=y)))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, x=pixels(), z=labels())
    assert "has no images with labels, but x, z: expected x_train and y_train" in refusal(
        Arrays(file)
    )
    whole = Path(saved(tmp_path, x=pixels(), y=labels())).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        Path(file).write_bytes(whole[:length])
        assert f"dataset.train={file} is damaged" in refusal(Arrays(file))
    np.save(tmp_path / "x.npy", pixels())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:200])
    assert "is damaged" in refusal(Arrays(str(tmp_path / "cut.npy")))
    assert "holds images alone: give their labels with dataset.train_labels=FILE" in refusal(
        Arrays(str(tmp_path / "x.npy"))
    )
    assert "is not a file" in refusal(Arrays(str(tmp_path / "none.npz")))
    assert "it must be a file .npz or .npy" in refusal(Arrays(str(tmp_path / "x.pt")))


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("a pickle was read",)

    objects = np.array([Opened()] * 12, object)
    file = saved(tmp_path, x=pixels(), y=objects)
    assert "holds Python objects (pickles), which can run code and are not read" in refusal(
        Arrays(file)
    )
    np.save(tmp_path / "x.npy", objects)
    assert "holds Python objects" in refusal(Arrays(str(tmp_path / "x.npy")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layout": "HWC"}, "layout=HWC .* one of auto, NHWC, NCHW, NHW"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"class_names": ["a", "a"]}, "class_names="),
        ({"test_share": 1.0}, "test_share=1.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Arrays("x.npz", **setting)
