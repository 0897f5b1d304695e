"""The attack of Carlini and Wagner against exact minima and another implementation."""

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.carlini_wagner import CarliniWagner
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from toys.attacks import Affine, everywhere, interior, tanh_network

# Large enough to cut nothing.
ANYWHERE = {"eps": 10.0}

# Fewer and larger steps than usual, which come as close on a linear model: to 0.2 %.
DESCENT = {"steps": 100, "lr": 0.03}


def lengths(delta: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def distances(model: Affine, x: Tensor, y: Tensor) -> Tensor:
    """The l2 distances to the planes between class y and each class, inf for y itself, (N, K)."""
    logits, weight = model(x), model.weight.detach()
    gaps = logits.gather(1, y[:, None]) - logits
    steepness = (weight[y][:, None] - weight).norm(dim=2)
    return torch.where(steepness > 0, gaps / steepness, torch.inf).detach()


@pytest.mark.parametrize("classes", [2, 5])
def test_the_smallest_perturbation_of_a_linear_model_is_found(classes: int) -> None:
    """Interior images: the box is inactive, and the nearest of the planes is the answer."""
    model, x = Affine(classes, 12), interior(8, 1, 3, 4)
    y = model(x).argmax(1)
    x_adv = CarliniWagner(**ANYWHERE, **DESCENT)(model, x, y)
    exact = distances(model, x, y).amin(1)
    assert (x_adv > 0.01).all()
    assert (x_adv < 0.99).all()
    assert (model(x_adv).argmax(1) != y).all()
    assert (lengths(x_adv - x) >= exact * (1 - 1e-6)).all()
    assert (lengths(x_adv - x) <= exact * 1.05).all()


def test_the_targeted_form_reaches_the_least_likely_class_of_a_linear_model() -> None:
    """No closer than its plane with the label, and no closer than any class."""
    model, x = Affine(3, 12), interior(8, 1, 3, 4)
    logits = model(x)
    y, target = logits.argmax(1), logits.argmin(1)
    attack = CarliniWagner(**ANYWHERE, **DESCENT, label=Label.least_likely)
    x_adv = attack(model, x, y)
    assert torch.equal(model(x_adv).argmax(1), target)
    plane = distances(model, x, y).gather(1, target[:, None]).squeeze(1)
    assert (lengths(x_adv - x) >= plane * (1 - 1e-6)).all()
    free = CarliniWagner(**ANYWHERE, **DESCENT)(model, x, y)
    assert (lengths(x_adv - x) >= lengths(free - x) / 1.05).all()


@pytest.mark.parametrize("confidence", [0.5, 2.0])
def test_confidence_is_the_lead_that_is_reached(confidence: float) -> None:
    model, x = Affine(2, 12), interior(8, 1, 3, 4)
    y = model(x).argmax(1)
    x_adv = CarliniWagner(**ANYWHERE, **DESCENT, confidence=confidence)(model, x, y)
    logits = model(x_adv)
    leads = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).detach()
    assert (leads >= confidence).all()
    assert (leads <= confidence + 0.3).all()


@pytest.fixture(scope="module")
def curved() -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose boundaries are no planes, with images and what is found for them."""
    model, x = tanh_network(12, 3).float(), interior(20, 1, 3, 4, dtype=torch.float32)
    attack = CarliniWagner(**ANYWHERE, steps=200, lr=0.02)
    return model, x, attack(model, x, model(x).argmax(1))


@pytest.mark.parametrize("c", [0.3, 1.0, 3.0])
def test_perturbations_are_as_small_as_those_of_another_implementation(
    curved: tuple[nn.Module, Tensor, Tensor], c: float
) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, x, ours = curved
    y = model(x).argmax(1)
    theirs = torchattacks.CW(model, c=c, steps=500, lr=0.01)(x, y)
    fooled = model(theirs).argmax(1) != y
    assert fooled.sum() >= 10
    assert (model(ours).argmax(1) != y).all()
    assert (lengths(ours - x) <= 1.05 * lengths(theirs - x))[fooled].all()


def test_black_and_white_pixels_move_and_nothing_is_infinite() -> None:
    """w is infinite at 0 and 1, and has no slope there."""
    model, x = Affine(2, 12), everywhere(8, 1, 3, 4).round()
    y = model(x).argmax(1)
    x_adv = CarliniWagner(**ANYWHERE, steps=200, lr=0.3, binary_steps=4)(model, x, y)
    assert x_adv.isfinite().all()
    assert (model(x_adv).argmax(1) != y).all()


def test_what_is_larger_than_the_ball_is_cut_to_it() -> None:
    model, x = Affine(2, 12), interior(8, 1, 3, 4)
    y = model(x).argmax(1)
    exact = distances(model, x, y).amin(1)
    eps = float(exact.sort().values[3:5].mean())
    x_adv = CarliniWagner(eps=eps, **DESCENT)(model, x, y)
    out_of_reach = exact > 1.01 * eps
    assert out_of_reach.any()
    assert (lengths(x_adv - x) <= eps + 1e-9).all()
    assert torch.allclose(lengths(x_adv - x)[out_of_reach], torch.tensor(eps).double())
    assert (model(x_adv).argmax(1) != y)[1.05 * exact < eps].all()


def reference(
    model: nn.Module, x: Tensor, y: Tensor, c: float, steps: int
) -> tuple[Tensor, Tensor]:
    """(smallest perturbed image that fools, its size or inf) of one round, by autograd alone."""
    w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
    adam = torch.optim.Adam([w], lr=0.05)
    best, smallest = x.clone(), torch.full((len(x),), torch.inf).double()
    for _ in range(steps):
        x_adv = (w.tanh() + 1) / 2
        logits = model(x_adv)
        own = logits.gather(1, y[:, None]).squeeze(1)
        rival = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        size = lengths(x_adv - x).detach()
        better = (rival > own) & (size < smallest)
        best[better], smallest[better] = x_adv.detach()[better], size[better]
        adam.zero_grad()
        ((x_adv - x).square().flatten(1).sum(1) + c * (own - rival).clamp_min(0)).sum().backward()
        adam.step()
    return best, smallest


def test_iterates_are_those_of_the_plain_reference() -> None:
    """On images all over the box, where tanh has every slope."""
    model, x = tanh_network(12, 3), everywhere(20, 1, 3, 4)
    y = model(x).argmax(1)
    expected, size = reference(model, x, y, 0.5, 150)
    attack = CarliniWagner(**ANYWHERE, c=0.5, binary_steps=1, steps=150, lr=0.05)
    fooled = size.isfinite()
    assert fooled.sum() >= 5
    assert torch.allclose(attack(model, x, y)[fooled], expected[fooled], rtol=0, atol=1e-9)


def test_an_image_that_is_wrong_already_stays_all_but_where_it_is() -> None:
    model, x = Affine(2, 12), everywhere(8, 1, 3, 4)
    x_adv = CarliniWagner(**ANYWHERE, steps=5)(model, x, 1 - model(x).argmax(1))
    assert torch.allclose(x_adv, x, rtol=0, atol=6e-7)


def test_images_do_not_hang_on_their_neighbours() -> None:
    model, x = tanh_network(12, 3), everywhere(6, 1, 3, 4)
    y, attack = model(x).argmax(1), CarliniWagner(**ANYWHERE, steps=10)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(6)])
    assert torch.allclose(attack(model, x, y), alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [Norm.linf, Norm.l1])
def test_other_norms_are_refused_by_name(norm: Norm) -> None:
    with pytest.raises(InputError, match=f"^norm={norm} .* l2: the attack minimises the l2 norm"):
        CarliniWagner(norm=norm)


@pytest.mark.parametrize(
    "wrong", [{"c": 0.0}, {"lr": 0.0}, {"steps": 0}, {"binary_steps": 0}, {"confidence": -1.0}]
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{key}={value} "):
        CarliniWagner(**wrong)
