"""The decision-based attack: labels only, queries within the budget, and what it finds."""

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.decision_based import DecisionBased, _blocks
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.errors import InputError
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, generator, interior, tanh_network

every_norm = pytest.mark.parametrize("norm", list(Norm))


class LabelsOnly(nn.Module):
    """A model whose outputs are 5 for its class and 0 elsewhere, without a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        logits: Tensor = self.model(x)
        return 5 * nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()


def halfspace(norm: Norm, count: int = 32) -> tuple[Affine, Tensor, Tensor, Tensor]:
    """A linear model of two classes, images on its side 0, and their distances to the boundary.

    The distance of x is |f(x)| / ||w||_dual (Goodfellow et al. 2015, section 3).
    """
    x = interior(count, 1, 3, 4)
    model = Affine(2, 12)
    w = (model.weight[1] - model.weight[0]).detach()
    leads = -torch.linspace(0.01, 0.09, count).double() * ball(Threat(norm, 1)).dual_norm(w[None])
    # All of the lead is moved into the image, so that each has its own distance.
    offset = model.bias[1] - model.bias[0]
    current = x.flatten(1) @ w + offset
    x = x + ((leads - current) / (w @ w))[:, None].mul(w).view_as(x)
    y = torch.zeros(count, dtype=torch.int64)
    assert torch.equal(model(x).argmax(1), y)
    return model, x, y, -leads / ball(Threat(norm, 1)).dual_norm(w[None])


@every_norm
def test_images_nearer_to_a_plane_than_the_radius_are_fooled_and_no_others(norm: Norm) -> None:
    """The estimate of a normal is not exact, which costs some of the radius in l2 and l1."""
    model, x, y, distance = halfspace(norm)
    assert ((x > 0) & (x < 1)).all()
    eps = 0.05
    attack = DecisionBased(norm=norm, eps=eps, queries=2000)
    fooled = LabelsOnly(model)
    x_adv = attack(fooled, x, y, generator=generator())
    missed = 1.02 if norm is Norm.linf else 1.15
    with torch.no_grad():
        broken = model(x_adv).argmax(1) != y
    assert broken[distance * missed < eps].all()
    assert not broken[distance > eps].any()
    assert 5 < broken.sum() < 27


@every_norm
def test_it_finds_most_of_what_gradients_find_on_a_network(norm: Norm) -> None:
    network, x = tanh_network(36, 4), everywhere(40, 1, 6, 6)
    y = network(x).argmax(1)
    eps = {Norm.linf: 0.06, Norm.l2: 0.25, Norm.l1: 1.0}[norm]
    by_gradients = APGD(norm=norm, eps=eps, steps=50, objective=AttackObjective.margin, targets=3)
    x_grad = by_gradients(network, x, y, generator=generator())
    x_adv = DecisionBased(norm=norm, eps=eps)(LabelsOnly(network), x, y, generator=generator())
    with torch.no_grad():
        expected, found = (int((network(z).argmax(1) != y).sum()) for z in (x_grad, x_adv))
    assert 8 < expected < 36
    assert found >= 0.8 * expected


@every_norm
@pytest.mark.parametrize("queries", [50, 137, 400])
def test_no_image_gets_more_queries_than_allowed(norm: Norm, queries: int) -> None:
    """An image on its own, so that passes are its queries."""
    network, x = tanh_network(36, 4), everywhere(1, 1, 6, 6)
    counter = QueryCounter(network, 1)
    attack = DecisionBased(norm=norm, eps=1e-9, queries=queries, restarts=2)
    attack(counter, x, network(x).argmax(1), generator=generator())
    assert counter.backward_passes == 0
    assert queries < counter.forward_passes <= 1 + 2 * queries


@every_norm
def test_an_image_that_is_misclassified_ends_its_search_at_once(norm: Norm) -> None:
    network, x = tanh_network(36, 4), everywhere(6, 1, 6, 6)
    wrong = (network(x).argmax(1) + 1) % 4
    counter = QueryCounter(network, 6)
    DecisionBased(norm=norm, eps=0.05)(counter, x, wrong, generator=generator())
    assert counter.forward_passes == 6


def test_a_model_of_one_class_leaves_images_as_they_are() -> None:
    model = Affine(2, 36)
    model.bias.data[0] += 1e6
    x = everywhere(4, 1, 6, 6)
    for norm in Norm:
        attack = DecisionBased(norm=norm, eps=0.1, queries=60)
        assert torch.equal(attack(model, x, torch.zeros(4, dtype=torch.int64)), x)


@every_norm
def test_draws_are_those_of_the_generator(norm: Norm) -> None:
    """In linf the first search takes no draws."""
    network, x = tanh_network(36, 4), everywhere(10, 1, 6, 6)
    y, attack = network(x).argmax(1), DecisionBased(norm=norm, eps=0.03, queries=100)
    first, other, again = (attack(network, x, y, generator=generator(seed)) for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_norm
def test_the_least_likely_class_is_reached(norm: Norm) -> None:
    model, x, _, distance = halfspace(norm)
    near = distance < 0.03
    attack = DecisionBased(norm=norm, eps=0.05, label=Label.least_likely, queries=2000)
    x_adv = attack(LabelsOnly(model), x[near], torch.zeros(int(near.sum()), dtype=torch.int64))
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == 1).all()


def test_blocks_halve_until_single_pixels_and_start_over() -> None:
    blocks = _blocks(torch.zeros(1, 1, 2, 3))
    seen = [next(blocks).flatten().nonzero().flatten().tolist() for _ in range(12)]
    halves, quarters = [[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4, 5]]
    singles = [[i] for i in range(6)]
    assert seen == [[0, 1, 2, 3, 4, 5], *halves, *quarters, *singles]


@pytest.mark.parametrize("key", ["queries", "restarts"])
def test_settings_that_find_nothing_are_refused(key: str) -> None:
    with pytest.raises(InputError, match=key):
        DecisionBased(**{key: 0})  # type: ignore[arg-type]
