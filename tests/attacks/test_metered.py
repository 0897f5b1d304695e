"""The view of a model that evaluation gives to attacks: counts, batches, images on their own."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.decision_based import DecisionBased
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.threat import Norm
from toys.attacks import ATTACKS, Affine, Make, everywhere, generator, tanh_network

every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS.keys())
every_norm = pytest.mark.parametrize("norm", list(Norm))

STOPPING: dict[str, Make] = {
    "pgd": partial(PGD, steps=5, restarts=2, stop_early=True),
    "pgd_best": partial(PGD, steps=5, restarts=3),
    "apgd": partial(APGD, steps=8, restarts=2),
    "apgd_t": partial(APGD, steps=5, targets=2, objective="margin"),
    "fab": partial(FAB, steps=5, restarts=2, give_up=False),
    "fab_t": partial(FAB, steps=5, targets=2, give_up=False),
    "square": partial(Square, queries=30, give_up=False, restarts=2),
    "decision_based": partial(DecisionBased, queries=60, restarts=2),
}
# What looks for the nearest point moves the pixel that is the mark.
MOVING = ("fab", "decision_based")
every_stopping = pytest.mark.parametrize("make", STOPPING.values(), ids=STOPPING.keys())


def setting(count: int = 10) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images, and labels that are wrong for a third of them."""
    network, x = tanh_network(36, 4), everywhere(count, 1, 6, 6)
    y = network(x).argmax(1)
    return network, x, torch.where(torch.arange(count) % 3 == 0, (y + 1) % 4, y)


@every_attack
@every_norm
def test_batches_of_any_size_give_the_same_images(make: Make, norm: Norm) -> None:
    network, x, y = setting()
    attack = make(norm=norm, eps=0.05)
    bare = attack(network, x, y, generator=generator())
    cut = attack(QueryCounter(network, 3), x, y, generator=generator())
    # The solver of L-BFGS blows rounding up, within its own tolerance.
    rounding = 1e-4 if isinstance(attack, LBFGS) else 1e-9
    assert torch.allclose(cut, bare, rtol=0, atol=rounding)
    assert torch.equal(network(cut).argmax(1), network(bare).argmax(1))


@every_attack
@pytest.mark.parametrize("draws", [1, 4])
def test_images_are_counted_in_both_directions(make: Make, draws: int) -> None:
    network, x, y = setting()
    forward: list[int] = []
    backward: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: forward.append(len(inputs[0])))
    network.register_full_backward_hook(lambda _, __, out: backward.append(len(out[0])))
    metered = QueryCounter(network, 3, draws)
    make(eps=0.05, label=Label.predicted)(metered, x, y, generator=generator())
    assert metered.forward_passes == draws * sum(forward) > 0
    assert metered.backward_passes == draws * sum(backward)
    assert max(forward) <= 3
    assert max(backward, default=0) <= 3
    assert metered.non_finite == 0


def test_passes_without_numbers_are_counted() -> None:
    class Undefined(nn.Module):
        """No outputs above 1/2; no slope in the last image."""

        def forward(self, x: Tensor) -> Tensor:
            t = x.flatten(1)
            logits = torch.where(t > 0.5, torch.nan, t)
            root = 0 * (t[t[:, 0] == 0.25] - 0.25).sqrt().sum()
            return logits + root

    metered = QueryCounter(Undefined(), 2)
    x = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.1, 0.2], [0.7, 0.9], [0.25, 0.25]])
    with torch.no_grad():
        metered(x)
    assert int(metered.non_finite) == 2
    point = x[4:].clone().requires_grad_()
    metered(point).sum().backward()
    assert int(metered.non_finite) == 3


@every_stopping
@every_norm
def test_the_outcome_of_an_image_does_not_hang_on_who_else_stands(make: Make, norm: Norm) -> None:
    """Draws belong to positions: the even images get labels that are wrong from the beginning."""
    network, x, _ = setting(12)
    y = network(x).argmax(1)
    eps = {Norm.linf: 0.03, Norm.l2: 0.2, Norm.l1: 1.0}[norm]
    attack, odd = make(norm=norm, eps=eps), torch.arange(12) % 2 == 1
    alone = attack(network, x, torch.where(odd, y, (y + 1) % 4), generator=generator())
    together = attack(network, x, y, generator=generator())
    assert torch.allclose(alone[odd], together[odd], rtol=0, atol=1e-9)
    assert 0 < (network(together)[odd].argmax(1) != y[odd]).sum() < 6


class Marked(nn.Module):
    """A linear model that counts its passes by the first pixel, which tells the image."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.affine, self.passes = Affine(4, 36), [0] * count
        with torch.no_grad():
            self.affine.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        for marker in x.detach().flatten(1)[:, 0].tolist():
            self.passes[int(marker * len(self.passes))] += 1
        logits: Tensor = self.affine(x)
        return logits


@pytest.mark.parametrize("norm", [Norm.linf, Norm.l2])
@pytest.mark.parametrize("name", [key for key in STOPPING if not key.startswith(MOVING)])
def test_an_image_that_is_broken_costs_nothing_more(name: str, norm: Norm) -> None:
    model, x = Marked(5), everywhere(5, 1, 6, 6)
    x[:, 0, 0, 0] = (torch.arange(5) + 0.5) / 5
    y = model(x).argmax(1)
    # The second and the last image are wrong, so far that no random start is right.
    wrong = torch.tensor([False, True, False, False, True])
    y = torch.where(wrong, model(x).argmin(1), y)
    attack = STOPPING[name](norm=norm, eps=1e-4)
    model.passes = [0] * 5
    attack(model, x, y, generator=generator())
    # Targets are ranked by one more pass.
    first_look = 2 if name == "apgd_t" else 1
    # PGD that keeps the worst point finishes its first search.
    if isinstance(attack, PGD) and not attack.stop_early:
        first_look += attack.steps
    assert [model.passes[i] for i in (1, 4)] == [first_look, first_look]
    standing = [model.passes[i] for i in (0, 2, 3)]
    assert min(standing) == max(standing) > first_look
