"""Curves of accuracy on a model whose robust radius is known image by image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import open_session
from robusttrain.evaluation.cache import NO_CACHE, Cache, FolderCache
from robusttrain.evaluation.curves import Probe, over_eps, over_steps
from robusttrain.report.ledger import Row
from robusttrain.runtime.progress import unreported
from robusttrain.threat import Norm, Threat

# No byte is a multiple of a quarter of it away from the threshold.
EPS = 0.11


class Threshold(nn.Module):
    """Class 1 where the one pixel is above 1/2: an image is robust iff it is eps away from that."""

    def forward(self, x: Tensor) -> Tensor:
        score = 8 * (x.flatten(1) - 0.5)
        return torch.cat([-score, score], 1)


def everywhere(count: int = 203, wrong: int = 7) -> Split:
    pixels = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(0))
    labels = (pixels > 127).long()
    labels[:wrong] = 1 - labels[:wrong]
    return Split(pixels.to(torch.uint8).view(-1, 1, 1, 1), labels)


def probe_of(attack: PGD, saved: Cache = NO_CACHE) -> Probe:
    _, subject = open_session(Threshold().eval(), everywhere(), Evaluation(batch_size=50), 0)
    return Probe(replace(subject, saved=saved), attack)


def robust(eps: float) -> float:
    """The share of images that no attack of this radius breaks."""
    data = everywhere()
    pixel = data.images.flatten().numpy() / 255
    right = (pixel > 0.5) == data.labels.numpy().astype(bool)
    return float((right & (np.abs(pixel - 0.5) > eps)).mean())


@pytest.mark.parametrize("stop_early", [True, False])
def test_the_curve_over_eps_is_exact(stop_early: bool) -> None:
    done: list[int] = []
    points = over_eps(probe_of(PGD(eps=EPS, stop_early=stop_early)), done.append)
    multiples = [0, 1 / 4, 1 / 2, 1, 3 / 2, 2, 4]
    assert [p.row.threat.eps for p in points] == pytest.approx([m * EPS for m in multiples])
    expected = [robust(m * EPS) for m in multiples]
    assert len(set(expected)) == 7
    assert [p.row.accuracy for p in points] == pytest.approx(expected)
    assert {(p.curve, p.steps, p.eot, p.row.n) for p in points} == {("eps", 10, 1, 203)}
    assert done == [1] * 7


def test_in_linf_the_curve_over_eps_ends_at_the_side_of_the_box() -> None:
    done: list[int] = []
    points = over_eps(probe_of(PGD(eps=0.6)), done.append)
    assert [p.row.threat.eps for p in points] == pytest.approx([0, 0.15, 0.3, 0.6, 0.9, 1])
    assert done == [1] * 7
    assert len(over_eps(probe_of(PGD(eps=0.0)), unreported)) == 7
    far = over_eps(probe_of(PGD(norm=Norm.l2, eps=0.6)), unreported)
    assert far[-1].row.threat.eps == pytest.approx(2.4)


def test_the_curve_over_steps_ends_at_what_is_robust() -> None:
    points = over_steps(probe_of(PGD(eps=EPS, stop_early=True)), unreported)
    assert [p.steps for p in points] == [1, 2, 5, 10, 20, 40, 80]
    assert {p.row.threat.eps for p in points} == {EPS}
    accuracies = [p.row.accuracy for p in points]
    assert accuracies[-1] == pytest.approx(robust(EPS))
    assert min(accuracies) == accuracies[-1]


def test_steps_are_as_long_as_their_number_asks_for() -> None:
    """A length that was chosen for one number of steps is too short for fewer."""
    points = over_steps(probe_of(PGD(eps=EPS, random_start=False, step_size=1e-4)), unreported)
    assert [p.row.accuracy for p in points] == pytest.approx([robust(EPS)] * 7)


def test_a_point_has_the_interval_of_its_accuracy() -> None:
    point = over_eps(probe_of(PGD(eps=EPS)), unreported)[3].row
    data = np.arange(203) >= round(203 * robust(EPS))
    counted = Row.counted("", Threat(Norm.linf, EPS), data)
    assert (point.ci_low, point.ci_high) == (counted.ci_low, counted.ci_high)
    assert point.threat.norm == "linf"


def test_points_that_are_kept_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    """With 20 steps of 1e-4 the curve over eps stays where it is, that over steps does not."""
    attack = PGD(eps=EPS, steps=20, step_size=1e-4, random_start=False)
    curves = [
        [*over_eps(probe, unreported), *over_steps(probe, unreported)]
        for probe in (probe_of(attack), probe_of(attack, FolderCache(tmp_path / "pieces", "")))
    ]
    assert curves[0] == curves[1]
    assert curves[0][3].row.accuracy > robust(EPS) + 0.1
