"""The settings that all data sets share."""

from dataclasses import dataclass

from robusttrain import ranges


@dataclass(kw_only=True)
class _Base:
    """Settings of every data set.

    Parameters
    ----------
    validation
        Part of the training set that is held out to choose `best.pt`: a share from 0 to below 1, or
        a whole number of images.
    crop
        Pixels, 0 or more, by which training images are shifted at random.
    flip
        Whether training images are mirrored at random, left to right.
    extra
        A file of extra images for training, such as generated ones: `.npz` with images and labels,
        or `.npy` with images, as `dataset=arrays` reads them.
    extra_labels
        The `.npy` file of the labels, if `extra` is such a file.
    extra_share
        Share of extra images in each batch, between 0 and 1, rounded to whole images. An epoch is
        still one pass over the training images, with accordingly more batches.
    """

    validation: float = 0.1
    crop: int = 0
    flip: bool = False
    extra: str | None = None
    extra_labels: str | None = None
    extra_share: float = 0.5

    def __post_init__(self) -> None:
        ranges.at_least(0, validation=self.validation, crop=self.crop)
        ranges.inside(0, 1, extra_share=self.extra_share)
        share_or_count = self.validation < 1 or self.validation == int(self.validation)
        allowed = "a share below 1 or a whole number of images"
        ranges.require(share_or_count, "validation", self.validation, allowed)
