"""Attacks on linear models, whose worst case over a ball is known in closed form."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.threat import Norm
from toys.attacks import Affine, Make, everywhere, generator, interior

EPS = {Norm.linf: 0.05, Norm.l2: 0.1, Norm.l1: 0.2}
DUAL_ORDER = {Norm.linf: 1, Norm.l2: 2, Norm.l1: float("inf")}
SHAPE = (8, 1, 3, 4)

EXACT: dict[str, Make] = {
    "fgsm": FGSM,
    "pgd": lambda **keys: PGD(steps=60, step_size=keys["eps"], **keys),
    "lbfgs": partial(LBFGS, c=0.0, steps=30),
}
every_exact = pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
# L-BFGS searches the linf ball, so that only there it is sure to end in a corner.
every_exact_and_norm = pytest.mark.parametrize(
    ("make", "norm"),
    [
        pytest.param(make, norm, id=f"{name}-{norm}")
        for name, make in EXACT.items()
        for norm in ([Norm.linf] if name == "lbfgs" else Norm)
    ],
)
every_norm = pytest.mark.parametrize("norm", list(Norm))


def margins(logits: Tensor, y: Tensor, other: Tensor) -> Tensor:
    rows = torch.arange(len(y))
    return logits[rows, y] - logits[rows, other]


def two_classes() -> tuple[Affine, Tensor, Tensor]:
    x = interior(*SHAPE)
    return Affine(2, 12), x, torch.arange(len(x)) % 2


@every_exact_and_norm
def test_the_worst_two_class_loss_is_reached(make: Make, norm: Norm) -> None:
    """min over the ball of the margin <w, x> + b is its value at x minus eps |w|_dual."""
    model, x, y = two_classes()
    x_adv = make(norm=norm, eps=EPS[norm])(model, x, y, generator=generator())
    slope = torch.linalg.vector_norm(model.weight[0] - model.weight[1], ord=DUAL_ORDER[norm])
    worst = margins(model(x), y, 1 - y) - EPS[norm] * slope
    reached = margins(model(x_adv), y, 1 - y)
    assert torch.allclose(reached, worst, rtol=0, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(model(x_adv), y, reduction="none")
    assert torch.allclose(loss, softplus(-worst), rtol=0, atol=1e-5)


@every_norm
def test_keeping_the_best_fools_exactly_the_images_that_can_be_fooled(norm: Norm) -> None:
    """An image that is fooled early keeps that iterate; all others reach the worst case."""
    model, x, y = two_classes()
    attack = PGD(norm=norm, eps=EPS[norm], steps=60, step_size=EPS[norm], keep_best=True)
    reached = margins(model(attack(model, x, y, generator=generator())), y, 1 - y)
    slope = torch.linalg.vector_norm(model.weight[0] - model.weight[1], ord=DUAL_ORDER[norm])
    worst = margins(model(x), y, 1 - y) - EPS[norm] * slope
    assert torch.equal(reached < 0, worst < 0)
    assert torch.allclose(reached[worst > 0], worst[worst > 0], rtol=0, atol=1e-5)
    assert 0 < (worst < 0).sum() < len(x)


@every_norm
def test_softmax_linearisation_knows_the_only_way_between_two_classes(norm: Norm) -> None:
    model, x, y = two_classes()
    x_adv = SoftmaxLinearisation(norm=norm, eps=EPS[norm])(model, x, y)
    assert torch.allclose(x_adv, FGSM(norm=norm, eps=EPS[norm])(model, x, y), rtol=0, atol=1e-7)


@every_exact_and_norm
def test_a_given_loss_is_the_one_that_is_climbed(make: Make, norm: Norm) -> None:
    """With z_3 - z_y as the loss, four classes are as linear as two."""
    model, x = Affine(4, 12), interior(*SHAPE)
    other = torch.full((len(x),), 3)
    # L-BFGS prefers small perturbations to high losses once the model is fooled; here it never is.
    model.bias.data += 100 * torch.tensor([0, 0, 0, -1])
    labels = model(x).argmax(1)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return -margins(logits, labels, other)

    x_adv = make(norm=norm, eps=EPS[norm])(model, x, labels, loss=loss, generator=generator())
    slopes = torch.linalg.vector_norm(
        model.weight[labels] - model.weight[3], ord=DUAL_ORDER[norm], dim=1
    )
    worst = margins(model(x), labels, other) - EPS[norm] * slopes
    assert torch.allclose(margins(model(x_adv), labels, other), worst, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.1, 0.4, 1.0])
@every_exact
def test_the_worst_linf_loss_with_an_active_box_is_reached(make: Make, eps: float) -> None:
    """Each pixel goes to the end of its interval [max(0, x - eps), min(1, x + eps)]."""
    model, x = Affine(2, 12), everywhere(*SHAPE)
    y = torch.arange(len(x)) % 2
    x_adv = make(norm=Norm.linf, eps=eps)(model, x, y, generator=generator())
    flat, slope = x.flatten(1), model.weight[1 - y] - model.weight[y]
    ends = torch.where(slope > 0, (flat + eps).clamp_max(1), (flat - eps).clamp_min(0))
    gain = (slope * (ends - flat)).sum(1)
    worst = margins(model(x), y, 1 - y) - gain
    assert torch.allclose(margins(model(x_adv), y, 1 - y), worst, rtol=0, atol=1e-5)


def knapsack(slope: list[float], x: list[float], budget: float) -> float:
    """The gain of spending `budget` on the steepest pixel until its face, then on the next."""
    gain = 0.0
    for s, value in sorted(zip(slope, x, strict=True), key=lambda pair: -abs(pair[0])):
        spent = min(budget, 1 - value if s > 0 else value)
        gain, budget = gain + abs(s) * spent, budget - spent
    return gain


@pytest.mark.parametrize("eps", [0.05, 0.7, 3.0, 50.0])
def test_fgsm_in_l1_is_the_fractional_knapsack(eps: float) -> None:
    model, x = Affine(2, 12), everywhere(*SHAPE)
    y = torch.arange(len(x)) % 2
    x_adv = FGSM(norm=Norm.l1, eps=eps)(model, x, y)
    slopes = (model.weight[1 - y] - model.weight[y]).tolist()
    gains = [knapsack(s, row, eps) for s, row in zip(slopes, x.flatten(1).tolist(), strict=True)]
    worst = margins(model(x), y, 1 - y) - torch.tensor(gains, dtype=torch.float64)
    assert torch.allclose(margins(model(x_adv), y, 1 - y), worst, rtol=0, atol=1e-9)


@every_exact_and_norm
def test_a_targeted_attack_of_two_classes_is_the_untargeted_one(make: Make, norm: Norm) -> None:
    """The least likely class of two is the one that is not predicted."""
    model, x, _ = two_classes()
    y = model(x).argmax(1)
    free = make(norm=norm, eps=EPS[norm])(model, x, y, generator=generator())
    targeted = make(norm=norm, eps=EPS[norm], label=Label.least_likely)(
        model, x, y, generator=generator()
    )
    assert torch.allclose(free, targeted, rtol=0, atol=1e-6)
