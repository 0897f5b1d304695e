"""Images of a gallery as a page shows them: clean, perturbation, adversarial."""

import base64
import math
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robusttrain.report.run.examples import BROKEN, CONFIDENT, RESISTED
from robusttrain.report.run.tables import Missing, Tables

TITLES = {
    BROKEN: "Broken with the least change",
    CONFIDENT: "The surest errors under attack",
    RESISTED: "Images that resisted",
}
EXPLAINED = {
    BROKEN: "Correct without an attack, and broken by the smallest perturbations. Where all have "
    "the same size, the model was surest of the first.",
    CONFIDENT: "Errors with the most negative margin, among all images.",
    RESISTED: "No attack changed the prediction. Each is shown at the worst point that was found; "
    "those with the largest margin there come first.",
}


class Tile(NamedTuple):
    """An image of a gallery: three pictures as data URIs, and what is known of it."""

    clean: str
    perturbation: str
    adversarial: str
    place: int
    label: str
    clean_prediction: str
    prediction: str
    clean_margin: float
    margin: float
    size: float
    factor: float
    norm: str


class Group(NamedTuple):
    """The tiles of a group, with its title and what it shows."""

    title: str
    explained: str
    tiles: list[Tile]


def gallery(tables: Tables) -> list[Group]:
    """The groups that have images, or raise `Missing`."""
    stored = tables.gallery
    if not stored:
        raise Missing("There are no examples: the run has no gallery.npz.")
    groups = []
    for group, title in TITLES.items():
        rows = np.flatnonzero(stored["group"] == group).tolist()
        if rows:
            tiles = [_tile(tables, stored, row) for row in rows]
            groups.append(Group(title, EXPLAINED[group], tiles))
    return groups


def _tile(tables: Tables, stored: Any, row: int) -> Tile:
    clean = stored["clean"][row] / 255
    perturbation = stored["perturbation"][row].astype(np.float64)
    factor = magnification(perturbation)
    name = tables.class_name
    return Tile(
        data_uri(clean), data_uri(0.5 + factor * perturbation), data_uri(clean + perturbation),
        int(stored["index"][row]), name(int(stored["label"][row])),
        name(int(stored["clean_prediction"][row])), name(int(stored["prediction"][row])),
        float(stored["clean_margin"][row]), float(stored["margin"][row]),
        float(stored["size"][row]), factor, str(stored["norm"]),
    )  # fmt: skip


def magnification(perturbation: NDArray[np.float64]) -> float:
    """The largest of 1, 2, 5, 10, ... that keeps a magnified perturbation between black and white.

    Grey is no change; half the range of pixels stands for either direction.
    """
    largest = float(np.abs(perturbation).max())
    if largest == 0:
        return 1.0
    room = 0.5 / largest * (1 + 1e-3)
    decade = 10.0 ** math.floor(math.log10(room))
    return max(1.0, next(each * decade for each in (5, 2, 1) if each * decade <= room))


def data_uri(image: NDArray[np.float64]) -> str:
    """An image (C, H, W) in [0, 1] as a PNG: in colour with three channels, otherwise the first."""
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    drawn = Image.fromarray(np.moveaxis(pixels, 0, 2) if len(pixels) == 3 else pixels[0])
    written = BytesIO()
    drawn.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
