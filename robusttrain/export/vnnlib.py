"""Local robustness of images as VNNLIB files, for verifiers that read networks as ONNX.

VNNLIB is the format of the competition of verifiers (Brix et al. 2023, "First three years of the
International Verification of Neural Networks Competition"). A file describes a counterexample:
pixels within the box, for which another class gets a logit at least as large as the label's. A
verifier answers `sat` if there is one, and `unsat` if the image is proven to be robust.
"""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from robusttrain.report.files import whole

INSTANCES = "instances.csv"


def specification(image: Tensor, label: int, num_classes: int, eps: float, title: str) -> str:
    """The text of a VNNLIB file.

    Parameters
    ----------
    image
        Pixels (C, H, W) in [0, 1].
    label
        The class of the image.
    num_classes
        The number of logits.
    eps
        The radius in linf. The box is that of all images with values in [0, 1] within it.
    title
        What the file is about, for its first line.
    """
    return "\n".join([f"; {title}", *_statements(image, label, num_classes, eps), ""])


def _statements(image: Tensor, label: int, num_classes: int, eps: float) -> Iterator[str]:
    pixels = image.flatten().double().tolist()
    yield from (f"(declare-const X_{i} Real)" for i in range(len(pixels)))
    yield from (f"(declare-const Y_{k} Real)" for k in range(num_classes))
    for i, pixel in enumerate(pixels):
        # `repr` gives the shortest text of a float64; the exponent is not part of the format.
        yield f"(assert (>= X_{i} {_decimal(max(0.0, pixel - eps))}))"
        yield f"(assert (<= X_{i} {_decimal(min(1.0, pixel + eps))}))"
    others = (f"(and (>= Y_{k} Y_{label}))" for k in range(num_classes) if k != label)
    yield f"(assert (or {' '.join(others)}))"


def _decimal(value: float) -> str:
    # 17 digits after the point tell all float64 in [0, 1] apart that are not tiny.
    return f"{value:.17f}"


def write(
    folder: Path, specifications: Sequence[tuple[str, str]], network: Path, seconds: int
) -> None:
    """Write files by name, and the list of all instances: network, file, seconds.

    `network` is the ONNX file. The list names it and the files as seen from `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    for name, text in specifications:
        with whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        rows.writerow([os.path.relpath(network, folder), name, seconds])
    with whole(folder / INSTANCES) as temporary:
        temporary.write_text(lines.getvalue(), encoding="utf-8")
