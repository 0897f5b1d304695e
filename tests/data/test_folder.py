"""Image folders: layouts, decoding, and one clear message for each mistake."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from robusttrain.data import FromFiles, Split
from robusttrain.data.folder import Folder
from robusttrain.data.listing import IMAGE_EXTENSIONS
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


def test_hidden_and_other_files_are_counted_and_not_read(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("notes")
    (tmp_path / "a" / "Makefile").write_text("all:")
    (tmp_path / "a" / "._000.png").write_bytes(b"left by a Mac")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about")
    save(tmp_path / "b" / ".thumbnails" / "000.png", 42)
    save(tmp_path / "b" / "LOUD.PNG", 42)
    folder = Folder(str(tmp_path))
    train, test = load(folder)
    assert train.size + test.size == 11
    counts = {"hidden": 3, ".md": 1, ".txt": 1, "without extension": 1}
    assert folder.contents() == {"passed_over": counts, "unreadable": []}
    assert "; not read: 1 .md, 1 .txt, 3 hidden, 1 without extension" in folder.summary()


def test_the_extensions_are_torchvisions_and_more() -> None:
    assert set(IMAGE_EXTENSIONS) > set(IMG_EXTENSIONS)


def test_nested_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["a/z.png", "a/sub/y.png", "a/sub/deep/x.png", "a/sub.png", "a/Sub/w.png", "b/0/v.png",
         "b/1/v.png", "b/u.JPG"]
    ):  # fmt: skip
        for part in ("train", "test"):
            save(tmp_path / part / name, 30 * number)
    folder = Folder(str(tmp_path))
    theirs = ImageFolder(str(tmp_path / "test")).samples
    _, test = load(folder)
    assert [str(tmp_path / name) for name in folder.test_files()] == [path for path, _ in theirs]
    assert test.labels.tolist() == [label for _, label in theirs]
    colours = [Image.open(path).convert("L").getpixel((0, 0)) for path, _ in theirs]
    assert brightness(test.images) == colours


@pytest.mark.parametrize("names", [["train", "val"], ["Train", "valid"], ["test", "validation"]])
def test_splits_are_not_taken_for_classes(names: list[str], tmp_path: Path) -> None:
    for name in names:
        classes(tmp_path / name)
    assert f"has the folders {', '.join(names)}, which look like splits" in refusal(
        Folder(str(tmp_path))
    )


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    classes(tmp_path)
    save(tmp_path / "train" / "0.png", 1)
    save(tmp_path / "train" / "nested" / "1.png", 2)
    assert Folder(str(tmp_path)).info().class_names == ("a", "b", "train")


def test_a_folder_beside_train_and_test_is_named(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        classes(tmp_path / part)
    folder = Folder(str(tmp_path))
    assert folder.summary() == (
        f"dataset.path={tmp_path} has 2 classes (a, b); 10 training and 10 test images; "
        "not read: 1 folder val"
    )


def test_the_line_has_counts_and_how_the_test_set_was_drawn(tmp_path: Path) -> None:
    for number in range(7):
        classes(tmp_path / "x", 10).joinpath("a").rename(tmp_path / f"class{number}")
        shutil.rmtree(tmp_path / "x")
    folder = Folder(str(tmp_path), test_share=0.3)
    assert isinstance(folder, FromFiles)
    assert folder.summary() == (
        f"dataset.path={tmp_path} has 7 classes (class0, class1, class2, class3, class4, ...); "
        "49 training and 21 test images (dataset.test_share=0.3 of each class)"
    )
    assert len(folder.test_files()) == 21


# --- pictures as they are meant to be seen -------------------------------------------------------

# What the camera stored, from what is seen, by the tag's definition.
STORED = {
    1: lambda seen: seen,
    2: np.fliplr,
    3: lambda seen: np.rot90(seen, 2),
    4: np.flipud,
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.rot90(seen, 2).transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}


def pictures(root: Path, picture: Image.Image, suffix: str, **options: Any) -> Path:
    """A folder of two classes with two copies of one picture each."""
    for name in ("a/0", "a/1", "b/0", "b/1"):
        (root / name).parent.mkdir(exist_ok=True)
        picture.save(root / f"{name}.{suffix}", **options)
    return root


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_pictures_are_turned_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    # Blocks, of which JPEG keeps the middle.
    seen = noise.repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(STORED[orientation](seen)))
    options = {"lossless": True} if suffix == "webp" else {}
    pictures(tmp_path, picture, suffix, exif=exif, **options)
    folder = Folder(str(tmp_path))
    assert folder.info().image_shape == (3, 32, 48)
    train, _ = folder.load()
    assert train.digest()
    middle = train.loaded().images[0].permute(1, 2, 0).numpy()[8::16, 8::16]
    assert np.abs(middle.astype(int) - noise).max() <= (40 if suffix == "jpg" else 0)
    small = load(Folder(str(tmp_path), image_size=2))[0].images[0]
    assert small.shape == (3, 2, 2)


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    picture = Image.new("L", (6, 4), 90)
    pictures(tmp_path, picture, "jpg", exif=b"Exif\0\0no tags at all")
    assert load(Folder(str(tmp_path)))[0].images.shape == (2, 3, 4, 6)


def transparent(mode: str) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A picture, and what it is made of: colours (4, 6, 3), and their opacity (4, 6, 1) of 1."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    alpha = generator.integers(0, 256, (4, 6, 1), dtype=np.uint8)
    if mode == "RGBA":
        picture = Image.fromarray(np.concatenate([colours, alpha], 2))
    elif mode == "LA":
        colours = colours[:, :, :1].repeat(3, 2)
        picture = Image.fromarray(np.concatenate([colours[:, :, :1], alpha], 2), "LA")
    elif mode == "P":
        table = generator.integers(0, 256, (256, 3), dtype=np.uint8)
        index = generator.integers(0, 200, (4, 6), dtype=np.uint8)
        picture = Image.fromarray(index, "P")
        picture.putpalette(table.tobytes())
        opacities = generator.integers(0, 256, 200, dtype=np.uint8)
        picture.info["transparency"] = opacities.tobytes()
        colours, alpha = table[index], opacities[index][:, :, None]
    else:
        alpha = np.full((4, 6, 1), 255, np.uint8)
        alpha[2, 3] = 0
        picture = Image.fromarray(colours)
        picture.info["transparency"] = tuple(int(value) for value in colours[2, 3])
    return picture, colours.astype(float), alpha / 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("background", [0.0, 0.6, 1.0])
def test_transparent_pictures_are_shown_on_the_background(
    mode: str, background: float, tmp_path: Path
) -> None:
    picture, colours, opacity = transparent(mode)
    pictures(tmp_path, picture, "png", transparency=picture.info.get("transparency"))
    expected = opacity * colours + (1 - opacity) * 255 * background
    images = load(Folder(str(tmp_path), background=background))[0].images
    assert np.abs(images[0].permute(1, 2, 0).numpy() - expected).max() <= 1
    grey = load(Folder(str(tmp_path), background=background, channels=1))[0].images
    luminance = expected @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[0, 0].numpy() - luminance).max() <= 2


def test_a_moving_picture_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (6, 4), shade) for shade in (200, 10, 60)]
    pictures(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:])
    assert load(Folder(str(tmp_path)))[0].images.unique().tolist() == [200]


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


def test_all_bad_images_are_named_at_once(tmp_path: Path) -> None:
    classes(tmp_path / "train", 200)
    classes(tmp_path / "test", 1)
    bad = [tmp_path / "train" / "a" / f"{number:03}.png" for number in (90, 170, 199)]
    for path in bad[:2]:
        path.write_bytes(b"no image")
    save(bad[2], 0, (9, 9))
    train, _ = Folder(str(tmp_path)).load()
    for work in (train.digest, train.loaded):
        with pytest.raises(InputError) as caught:
            work()
        message = str(caught.value)
        assert message.startswith(f"3 images cannot be used: {bad[0]} is an unreadable image (")
        assert [str(path) in message for path in bad] == [True] * 3
        assert f"{bad[2]} has 9x9 pixels, the first image has 6x4" in message
        assert "replace or delete it, or give dataset.skip_unreadable=true" in message
        assert "\n" not in message


@pytest.mark.parametrize("count", [1, 3, 10])
def test_bad_images_at_the_beginning_are_named_like_others(count: int, tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "test", 1)
    bad = sorted((tmp_path / "train").rglob("*.png"))[:count]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        Folder(str(tmp_path)).load()[0].digest()
    assert all(str(path) in str(caught.value) for path in bad)


def test_of_many_bad_images_twenty_are_named(tmp_path: Path) -> None:
    classes(tmp_path / "train", 30)
    classes(tmp_path / "test", 1)
    for path in (tmp_path / "train" / "a").iterdir():
        if path.name != "000.png":
            path.write_bytes(b"no image")
    message = refusal(Folder(str(tmp_path)))
    assert message.startswith("29 images cannot be used: ")
    assert message.count("is an unreadable image") == 20
    assert "; and 9 more: replace" in message


def spoilt(root: Path) -> list[Path]:
    """Images of the folder that cannot be decoded, each in another way."""
    (root / "a" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "b" / "004.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    half = root / "b" / "nested" / "half.png"
    half.parent.mkdir()
    Image.fromarray(noise).save(half)
    half.write_bytes(half.read_bytes()[:70])
    return [root / "a" / "photo.heic", root / "b" / "004.png", half]


@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_images_are_skipped_and_counted_if_set(stream: bool, tmp_path: Path) -> None:
    """The data set is the one without these files, whatever first image they would have been."""
    bad = spoilt(classes(tmp_path))
    (tmp_path / "a" / "000.png").write_bytes(b"first")
    bad.insert(0, tmp_path / "a" / "000.png")
    assert "unreadable" in refusal(Folder(str(tmp_path)))
    folder = Folder(str(tmp_path), skip_unreadable=True, stream=stream)
    sets = load(folder)
    assert sorted(folder.contents()["unreadable"]) == sorted(map(str, bad))
    assert f"; skipped as unreadable: 4 ({bad[0]}, " in folder.summary()
    for path in bad:
        path.unlink()
    for ours, theirs in zip(sets, load(Folder(str(tmp_path))), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_a_class_without_readable_images_is_refused(tmp_path: Path) -> None:
    (classes(tmp_path) / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(b"")
    message = refusal(Folder(str(tmp_path), skip_unreadable=True))
    assert f"has no readable image in {tmp_path / 'c'}" in message


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
        ({"background": 1.5}, "background=1.5 .* from 0 to 1"),
    ],
)
def test_impossible_fields_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Folder("anywhere", **values)
