"""Mistakes that public attack code makes; each test names the one that it would catch."""

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label, cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.model_view import predictions
from robusttrain.attacks.pgd import PGD
from robusttrain.models.normalize import Normalize
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import (
    ATTACKS,
    GRADIENT_FREE,
    Affine,
    Make,
    everywhere,
    generator,
    interior,
    tanh_network,
)

SEARCHES = {key: make for key, make in ATTACKS.items() if key not in GRADIENT_FREE}
every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS.keys())
every_search = pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES.keys())
every_norm = pytest.mark.parametrize("norm", list(Norm))
every_l2_search = pytest.mark.parametrize(
    "make", [FGSM, PGD, SEARCHES["fgsm_rs"]], ids=["fgsm", "pgd", "fgsm_rs"]
)


class Steep(nn.Module):
    """A linear model that adds a term of value 0 and slope NaN in the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = Affine(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, :1]
        logits: Tensor = self.affine(x) + 0 * (first - first.detach()).sqrt()
        return logits


@every_search
@every_norm
def test_a_slope_that_is_no_number_does_not_stop_the_other_pixels(make: Make, norm: Norm) -> None:
    model, x = Steep(), interior(4, 1, 3, 4)
    y = model(x).argmax(1)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    assert slope.isnan().flatten(1).sum(1).tolist() == [1, 1, 1, 1]
    x_adv = make(norm=norm, eps=0.1)(model, x, y, generator=generator())
    assert x_adv.isfinite().all()
    clean, attacked = (cross_entropy(model(z), y) for z in (x, x_adv))
    assert (attacked > clean).all()


class Undefined(nn.Module):
    """A linear model that outputs NaN where the first pixel is above 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = Affine(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.affine(x)
        return torch.where(x.flatten(1)[:, :1] > 0.5, torch.nan, logits)


def undefined_for_one_of(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model is not defined around the first image, and defined around all others."""
    model, x = Undefined(), interior(count, 1, 3, 4)
    x.flatten(1)[:, 0] = 0.1
    x.flatten(1)[0, 0] = 0.9
    return model, x, model.affine(x).argmax(1)


@every_search
@every_norm
def test_an_output_that_is_no_number_does_not_spoil_its_neighbours(make: Make, norm: Norm) -> None:
    model, x, y = undefined_for_one_of(5)
    x_adv = make(norm=norm, eps=0.2)(model, x, y, generator=generator())
    assert x_adv.isfinite().all()
    clean, attacked = (cross_entropy(model(z)[1:], y[1:]) for z in (x, x_adv))
    assert (attacked > clean).all()


@pytest.mark.parametrize("make", [SEARCHES["pgd_best"], LBFGS], ids=["pgd_best", "lbfgs"])
def test_an_output_that_is_no_number_counts_as_broken_and_is_kept(make: Make) -> None:
    model, x, y = undefined_for_one_of(5)
    x_adv = make(eps=0.05)(model, x, y, generator=generator())
    assert predictions(model(x_adv))[0] == -1


def test_a_point_without_output_on_the_way_is_kept_although_its_loss_is_no_number() -> None:
    """Comparing losses never prefers NaN; leaving the right class does."""

    class Gap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            t = x.flatten(1)[:, 0]
            logits = torch.stack([0 * t, 0.1 * t - 1], 1)
            return torch.where(((t > 0.58) & (t < 0.62))[:, None], torch.nan, logits)

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    attack = PGD(eps=0.3, steps=3, step_size=0.1, random_start=False, keep_best=True)
    assert attack(Gap(), x, y).item() == pytest.approx(0.6)


@pytest.mark.parametrize("name", [key for key in SEARCHES if key not in ("lbfgs", "apgd_t")])
def test_a_loss_that_is_no_number_does_not_send_the_images_back(name: str) -> None:
    """A surrogate loss may be NaN where the outputs are fine; only L-BFGS has to compare it.

    APGD-T climbs a loss of its own.
    """

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits, y) + torch.nan

    model, x = Affine(2, 12), interior(4, 1, 3, 4)
    y = model(x).argmax(1)
    x_adv = SEARCHES[name](eps=0.1)(model, x, y, loss=loss, generator=generator())
    assert not (x_adv == x).flatten(1).all(1).any()


@every_norm
@every_l2_search
def test_a_confident_model_is_attacked_all_the_same(make: Make, norm: Norm) -> None:
    """At a logit gap of 50 the gradients are 1e-22, which is not a reason to stay."""
    model = Affine(2, 12).float()
    x = interior(4, 1, 3, 4, dtype=torch.float32)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([50.0, 0]) - model.weight @ x[0].flatten())
    y = torch.zeros(4, dtype=torch.int64)
    x_adv = make(norm=norm, eps=0.3)(model, x, y, generator=generator())
    assert (ball(Threat(norm, 0.3)).norm(x_adv - x) > 0.25).all()
    clean, attacked = (model(z)[:, 0] - model(z)[:, 1] for z in (x, x_adv))
    assert (attacked < clean).all()


@every_attack
@every_norm
@pytest.mark.parametrize("std", [0.05, 5.0])
def test_eps_means_pixels_although_the_model_normalises(make: Make, norm: Norm, std: float) -> None:
    normalise = Normalize([0.2, 0.5, 0.7], [std, 2 * std, std / 2], 3).double()
    model, x = nn.Sequential(normalise, tanh_network(36, 3)), interior(3, 3, 3, 4)
    x_adv = make(norm=norm, eps=0.1)(model, x, torch.tensor([0, 1, 2]), generator=generator())
    assert (ball(Threat(norm, 0.1)).norm(x_adv - x) <= 0.1 + 1e-9).all()


def test_every_channel_moves_by_the_same_eps() -> None:
    normalise = Normalize([0.2, 0.5, 0.7], [0.1, 1.0, 10.0], 3).double()
    model, x = nn.Sequential(normalise, Affine(2, 36)), interior(3, 3, 3, 4)
    x_adv = FGSM(eps=0.1)(model, x, torch.tensor([0, 1, 1]))
    assert torch.allclose((x_adv - x).abs(), torch.tensor(0.1).double())


@every_attack
@every_norm
@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3, 1.0])
def test_no_pixel_is_outside_the_box_by_a_rounding_error(
    make: Make, norm: Norm, eps: float
) -> None:
    model = tanh_network(192, 3).float()
    x = (everywhere(6, 3, 8, 8) * 255).round().div(255).float()
    x_adv = make(norm=norm, eps=eps)(model, x, torch.tensor([0, 1, 2] * 2), generator=generator())
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@every_attack
@every_norm
@pytest.mark.parametrize("label", list(Label))
def test_two_classes_are_enough_for_every_label(make: Make, norm: Norm, label: Label) -> None:
    model, x = tanh_network(12, 2, gain=1.0), interior(6, 1, 3, 4)
    y = model(x).argmax(1)
    x_adv = make(norm=norm, eps=0.1, label=label)(model, x, y, generator=generator())
    assert x_adv.shape == x.shape
    if make in SEARCHES.values():
        clean, attacked = (cross_entropy(model(z), y) for z in (x, x_adv))
        assert (attacked > clean).all()
