"""Regions without slopes or outputs next to the image do not keep a search from the other side."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.decision_based import DecisionBased
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Make, generator

SEARCHES: dict[str, Make] = {
    "pgd": partial(PGD, steps=20, stop_early=True),
    "apgd": partial(APGD, steps=20, restarts=1),
    "apgd_t": partial(APGD, steps=20, targets=1, objective="margin"),
    "fab": partial(FAB, steps=20),
    "fab_t": partial(FAB, steps=20, targets=1, restarts=2),
    "square": partial(Square, queries=200),
    "decision_based": partial(DecisionBased, queries=200),
}
GRADIENT = ["pgd", "apgd_t", "apgd", "fab_t", "fab"]
every_norm = pytest.mark.parametrize("norm", list(Norm))
EPS = 0.3


class OneSided(nn.Module):
    """Class 1 wins where t = (first pixel) - 1/2 is below -0.12; something ends at t = 0.02."""

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(1)[:, 0] - 0.5
        return self.ended(torch.stack([0 * t, -t - 0.12], 1), x, t > 0.02)

    def ended(self, logits: Tensor, x: Tensor, beyond: Tensor) -> Tensor:
        raise NotImplementedError


class NoSlope(OneSided):
    """Right of the end no pixel has a slope that is a number; outputs are fine."""

    def ended(self, logits: Tensor, x: Tensor, beyond: Tensor) -> Tensor:
        there = x[beyond].flatten(1)
        term = torch.zeros_like(logits)
        term[beyond, 0] = 0 * (there - there.detach()).sqrt().sum(1)
        return logits + term


class NoOutput(OneSided):
    """Right of the end the outputs are no numbers, and their slopes are zero."""

    def ended(self, logits: Tensor, x: Tensor, beyond: Tensor) -> Tensor:
        return torch.where(beyond[:, None], torch.nan, logits)


def images() -> tuple[Tensor, Tensor]:
    return torch.full((16, 1, 2, 3), 0.5, dtype=torch.float64), torch.zeros(16, dtype=torch.int64)


def test_the_models_are_what_they_are_said_to_be() -> None:
    x, _ = images()
    for model, outputs in ((NoSlope(), True), (NoOutput(), False)):
        point = (x + 0.1).requires_grad_()
        logits = model(point)
        assert logits.isfinite().all() == outputs
        (slope,) = torch.autograd.grad(logits.sum(), point)
        assert slope.isnan().all() == outputs
        assert model(x).isfinite().all()
        assert torch.autograd.grad(model(point - 0.1).sum(), point)[0].isfinite().all()


@pytest.mark.parametrize("make", [SEARCHES[key] for key in GRADIENT], ids=GRADIENT)
@every_norm
def test_the_side_with_slopes_is_found(make: Make, norm: Norm) -> None:
    """Most random starts are on the wrong side."""
    model, (x, y) = NoSlope(), images()
    x_adv = make(norm=norm, eps=EPS)(model, x, y, generator=generator())
    assert (model(x_adv).argmax(1) == 1).all()
    assert (ball(Threat(norm, EPS)).norm(x_adv - x) <= EPS * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", GRADIENT[::2])
@every_norm
def test_the_side_with_outputs_is_found(name: str, norm: Norm) -> None:
    """Away from a label no output is success enough; what a target needs is on the other side."""
    model, (x, y) = NoOutput(), images()
    attack = SEARCHES[name](norm=norm, eps=EPS, label=Label.least_likely)
    x_adv = attack(model, x, y, generator=generator())
    assert (model(x_adv).argmax(1) == 1).all()
    assert model(x_adv).isfinite().all()


def test_a_search_by_outputs_alone_finds_the_side_with_outputs() -> None:
    """All corners of the ball on the other side are without output."""
    model, (x, y) = NoOutput(), images()
    attack = Square(eps=EPS, queries=200, label=Label.least_likely)
    assert (model(attack(model, x, y, generator=generator())).argmax(1) == 1).all()


@pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES.keys())
@every_norm
def test_no_attack_returns_a_point_that_is_no_number(make: Make, norm: Norm) -> None:
    """Also for images that have no output from the beginning, and without any slope at all."""

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            t = x.flatten(1)[:, 0] * 0
            return torch.stack([t + 5, t], 1)

    x, y = images()
    for model in (NoOutput(), Dead()):
        x_adv = make(norm=norm, eps=EPS)(model, x + 0.1, y, generator=generator())
        assert x_adv.isfinite().all()
