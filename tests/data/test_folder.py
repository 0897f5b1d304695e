"""Image folders: layouts, decoding, and one clear message for each mistake."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from robusttrain.data import Split
from robusttrain.data.folder import IMAGE_EXTENSIONS, Folder
from robusttrain.errors import InputError


def save(path: Path, value: int | Sequence[int], size: tuple[int, int] = (6, 4)) -> Path:
    """An image of one colour, `size` = (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if isinstance(value, int) else "RGB"
    Image.new(mode, size, value if isinstance(value, int) else tuple(value)).save(path)
    return path


def classes(root: Path, count: int = 5, size: tuple[int, int] = (6, 4)) -> Path:
    """Classes a and b with `count` images each; the brightness of an image is unique in `root`."""
    for label, name in enumerate("ab"):
        for number in range(count):
            save(root / name / f"{number:03}.png", 100 * label + number, size)
    return root


def brightness(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def load(folder: Folder) -> tuple[Split, Split]:
    train, test = folder.load()
    return train.loaded(), test.loaded()


def refusal(folder: Folder) -> str:
    with pytest.raises(InputError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_train_and_test_folders_are_read_in_order(tmp_path: Path) -> None:
    classes(tmp_path / "train", 70)
    classes(tmp_path / "test", 3)
    train, test = load(Folder(str(tmp_path)))
    assert brightness(train.images) == [*range(70), *range(100, 170)]
    assert train.labels.tolist() == [0] * 70 + [1] * 70
    assert brightness(test.images) == [0, 1, 2, 100, 101, 102]
    assert train.images.shape == (140, 3, 4, 6)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64


def test_info_has_shape_and_names(tmp_path: Path) -> None:
    classes(tmp_path)
    info = Folder(str(tmp_path), channels=1).info()
    assert info == ((1, 4, 6), 2, ("a", "b"))
    assert Folder(str(tmp_path), image_size=9).info().image_shape == (3, 9, 9)


def test_info_reads_one_image_at_most(tmp_path: Path) -> None:
    classes(tmp_path)
    for file in list(tmp_path.rglob("*.png"))[1:]:
        if file.parent.name == "b":
            file.write_bytes(b"no image")
    assert Folder(str(tmp_path)).info().num_classes == 2


def test_the_test_share_is_a_partition_of_each_class(tmp_path: Path) -> None:
    classes(tmp_path, 10)
    train, test = load(Folder(str(tmp_path), test_share=0.3))
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    everything = sorted(brightness(train.images) + brightness(test.images))
    assert everything == [*range(10), *range(100, 110)]
    for part in (train, test):
        assert [value // 100 for value in brightness(part.images)] == part.labels.tolist()


def test_the_seed_alone_draws_the_test_share(tmp_path: Path) -> None:
    classes(tmp_path, 30)
    first = load(Folder(str(tmp_path), seed=1))[1]
    assert load(Folder(str(tmp_path), seed=1))[1].digest() == first.digest()
    assert load(Folder(str(tmp_path), seed=2))[1].digest() != first.digest()


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_each_class_is_in_both_parts(share: float, tmp_path: Path) -> None:
    classes(tmp_path, 2)
    for part in load(Folder(str(tmp_path), test_share=share)):
        assert part.labels.tolist() == [0, 1]


def test_colours_keep_their_channels_and_grey_is_their_luminance(tmp_path: Path) -> None:
    for name in "ab":
        for number in range(2):
            save(tmp_path / name / f"{number}.png", (200, 100, 50))
    colour, grey = (load(Folder(str(tmp_path), channels=n))[0].images for n in (3, 1))
    assert colour[0, :, 2, 3].tolist() == [200, 100, 50]
    assert int(grey[0, 0, 2, 3]) == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (8, 8), (36, 12), (2, 6)])
def test_the_shorter_side_is_resized_and_the_centre_kept(
    size: tuple[int, int], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for file in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / file)
    images = load(Folder(str(tmp_path), image_size=4))[0].images
    width, height = (4 * side // min(size) for side in size)
    left, top = (width - 4) // 2, (height - 4) // 2
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + 4, top + 4))).astype(int)
    # Two ways to resize may round a half differently.
    assert np.abs(images[0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_sizes_may_differ_if_image_size_is_given(tmp_path: Path) -> None:
    classes(tmp_path)
    save(tmp_path / "b" / "tall.png", 7, (3, 50))
    train, test = load(Folder(str(tmp_path), image_size=5))
    assert train.size + test.size == 11
    assert train.images.shape[1:] == (3, 5, 5)


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("notes")
    (tmp_path / "a" / "._000.png").write_bytes(b"left by a Mac")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about")
    save(tmp_path / "b" / "LOUD.PNG", 42)
    train, test = load(Folder(str(tmp_path)))
    assert train.size + test.size == 11


def test_the_extensions_are_torchvisions() -> None:
    assert sorted(IMAGE_EXTENSIONS) == sorted(IMG_EXTENSIONS)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    message = refusal(Folder(f"{tmp_path}/nowhere"))
    assert f"dataset.path={tmp_path}/nowhere is not a folder" in message


@pytest.mark.parametrize("names", [[], ["a"]])
def test_too_few_class_folders_are_refused(names: list[str], tmp_path: Path) -> None:
    for name in names:
        save(tmp_path / name / "0.png", 0)
    message = refusal(Folder(str(tmp_path)))
    assert f"dataset.path={tmp_path} needs two class folders or more" in message
    assert f"has {len(names)}: expected <path>/<class>/*" in message


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    (classes(tmp_path) / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("no image")
    message = refusal(Folder(str(tmp_path)))
    assert f"dataset.path={tmp_path} has an empty image folder {tmp_path / 'c'}" in message


def test_classes_of_train_and_test_must_agree(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "test")
    save(tmp_path / "test" / "zebra" / "0.png", 0)
    message = refusal(Folder(str(tmp_path)))
    assert f"dataset.path={tmp_path} has different classes in train and test" in message
    assert message.endswith("in one alone: zebra")


def test_a_class_of_one_image_cannot_be_shared(tmp_path: Path) -> None:
    save(classes(tmp_path) / "lonely" / "0.png", 0)
    assert "has one image of class lonely" in refusal(Folder(str(tmp_path)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("image_size", [None, 5])
def test_an_unreadable_image_is_named(suffix: str, image_size: int | None, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    bad = classes(tmp_path, size=(60, 40)) / "b" / f"bad.{suffix}"
    Image.fromarray(noise).save(bad)
    whole = bad.read_bytes()
    for content in (b"", b"no image", whole[:20], whole[: len(whole) // 2]):
        bad.write_bytes(content)
        message = refusal(Folder(str(tmp_path), image_size=image_size, test_share=0.1))
        assert message.startswith(f"{bad} is an unreadable image (")


def test_of_several_bad_images_the_first_is_named(tmp_path: Path) -> None:
    classes(tmp_path / "train", 200)
    classes(tmp_path / "test", 1)
    for number in (170, 90, 199):
        (tmp_path / "train" / "a" / f"{number:03}.png").write_bytes(b"no image")
    for _ in range(5):
        assert "090.png" in refusal(Folder(str(tmp_path)))


def test_different_sizes_are_named_with_a_way_out(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "test")
    odd = save(tmp_path / "train" / "b" / "odd.png", 0, (9, 8))
    message = refusal(Folder(str(tmp_path)))
    assert message.startswith(f"{odd} has 9x8 pixels, the first image has 6x4")
    assert "dataset.image_size=4" in message


def test_deep_images_are_refused_not_clipped(tmp_path: Path) -> None:
    deep = classes(tmp_path) / "b" / "deep.png"
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(deep)
    message = refusal(Folder(str(tmp_path)))
    assert re.match(rf"{re.escape(str(deep))} has pixels of mode I.*8 bits", message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size=0 "),
        ({"channels": 2}, "channels=2 .*1 or 3"),
        ({"test_share": 0.0}, "test_share=0.0 "),
        ({"test_share": 1.0}, "test_share=1.0 "),
        ({"validation": -1.0}, "validation=-1.0 "),
        ({"stream": "maybe"}, "stream=maybe .*true, false or auto"),
        ({"workers": -1}, "workers=-1 "),
    ],
)
def test_impossible_fields_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Folder("anywhere", **values)
