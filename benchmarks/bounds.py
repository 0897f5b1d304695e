"""How much closer linear bounds come to a network's margins than intervals: a factor.

    python benchmarks/bounds.py pretrained:digits-linf-0.1 --eps 0.1 --images 20

prints, for the first test images of the digits (of MNIST with `--data-dir`), the mean gap between
the margins of an image and their bounds over S(x) in linf, by intervals and by linear bounds, the
ratio of the gaps, and the number of images that each proves. `--no-refine` skips the linear bounds
of hidden layers. With `--seconds 60`, branch and bound decides the images that linear bounds leave
open.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from robusttrain.bounds.branching import decide
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.linear import margins
from robusttrain.data import Split
from robusttrain.data.digits import Digits
from robusttrain.data.torchvision import Torchvision
from robusttrain.runs.saved_model import load_model, load_pretrained
from robusttrain.threat import Norm, Threat

PRETRAINED = "pretrained:"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a run, or pretrained:NAME")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--data-dir", type=Path, help="directory of MNIST")
    parser.add_argument("--optimise", type=int, default=0)
    parser.add_argument("--no-refine", dest="refine", action="store_false")
    parser.add_argument("--seconds", type=float, default=0.0)
    return parser.parse_args()


def proven(bounds: Tensor) -> int:
    return int((bounds.amin(1) > 0).sum())


def test_images(data_dir: Path | None) -> Split:
    source = Digits() if data_dir is None else Torchvision("mnist", str(data_dir), download=False)
    return source.load()[1]


def by_intervals(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    outputs = cast(Interval, model(Interval.around(x, eps)))
    return (-outputs.margins(y)).scatter(1, y[:, None], torch.inf)


def main() -> None:
    given = arguments()
    named = given.model.startswith(PRETRAINED)
    load = load_pretrained if named else load_model
    model = load(given.model.removeprefix(PRETRAINED)).eval()
    test = test_images(given.data_dir)
    x, y = test.images[: given.images].float() / 255, test.labels[: given.images]
    threat = Threat(Norm.linf, given.eps)
    with torch.no_grad():
        logits = model(x)
        right = logits.argmax(1) == y
        x, y, logits = x[right], y[right], logits[right]
        clean = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)
        intervals = by_intervals(model, x, y, given.eps)
    linear = margins(model, x, y, threat, optimise=given.optimise, refine=given.refine)
    others = clean.isfinite()
    gaps = [float((clean - bounds)[others].mean()) for bounds in (intervals, linear)]
    print(f"{len(x)} images: gap of intervals {gaps[0]:.4g}, of linear bounds {gaps[1]:.4g}")
    print(f"factor {gaps[0] / gaps[1]:.3g}; proven {proven(intervals)} and {proven(linear)}")
    if given.seconds:
        left = [row for row in range(len(x)) if not bool(linear[row].min() > 0)]
        found = [
            decide(
                model,
                x[row : row + 1],
                y[row : row + 1],
                threat,
                seconds=given.seconds,
                generator=torch.Generator().manual_seed(0),
            )
            for row in left
        ]
        print(Counter(f"{each.status} {each.reason.value}".strip() for each in found))
        print("seconds:", [round(each.seconds, 1) for each in found])


if __name__ == "__main__":
    main()
