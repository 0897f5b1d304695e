"""Training on bounds: the formulas, their ends, the passes, BatchNorm and the regularisers."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks import ThreatFields
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.bounds.graph import Node, Traced
from robusttrain.bounds.intervals import Interval
from robusttrain.bounds.linear import Backward
from robusttrain.defenses import Defense
from robusttrain.defenses.bound_regulariser import ReLUInputs, regulariser
from robusttrain.defenses.bounded import BoundDefense, Statistics
from robusttrain.defenses.cc_ibp import CCIBP
from robusttrain.defenses.crown_ibp import CROWNIBP
from robusttrain.defenses.exp_ibp import ExpIBP
from robusttrain.defenses.ibp import IBP, MTLIBP
from robusttrain.defenses.sabr import SABR
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.threat import Norm
from robusttrain.training.curriculum import Curriculum
from toys.defenses import (
    CLASSES,
    SHAPE,
    Fixed,
    batch,
    cross_entropies,
    generator,
    gradients_are_right,
    logits,
    network,
    objective_of,
    worst_logits,
)


@dataclass
class Brighter(ThreatFields):
    """An attack that makes every pixel brighter by its radius."""

    norm: Norm = Norm.linf
    eps: float = 0.3

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return (x + self.eps).clamp(max=1)


X_ADV = torch.rand(6, *SHAPE, generator=generator(), dtype=torch.float64)


# --- the formulas ------------------------------------------------------------------------------


def test_cc_ibp_is_the_loss_between_logits_and_bounds() -> None:
    adversarial, (_, y) = logits(X_ADV), batch()
    differences = adversarial - adversarial[np.arange(len(y)), y.numpy()][:, None]
    expected = cross_entropies(0.7 * differences + 0.3 * worst_logits(0.2)).mean()
    objective = objective_of(CCIBP(Fixed(X_ADV), eps=0.2, weight=0.3))
    assert objective.loss.item() == pytest.approx(expected, rel=1e-9)


def test_exp_ibp_is_the_geometric_mean_of_the_losses() -> None:
    found, bound = cross_entropies(logits(X_ADV)), cross_entropies(worst_logits(0.2))
    objective = objective_of(ExpIBP(Fixed(X_ADV), eps=0.2, weight=0.3))
    assert objective.loss.item() == pytest.approx((found**0.7 * bound**0.3).mean(), rel=1e-9)


def test_exp_ibp_has_a_gradient_where_a_loss_is_zero() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1e4, 0, 0, 0]))
    objective_of(ExpIBP(Fixed(X_ADV), eps=0.2), model).loss.backward()  # type: ignore[no-untyped-call]
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_sabr_is_the_loss_at_the_bounds_of_a_small_box_around_the_attack() -> None:
    centre = (batch()[0] + 0.6 * 0.2).clamp(max=1)
    expected = cross_entropies(worst_logits(0.4 * 0.2, centre)).mean()
    # Whatever the attack's own radius.
    objective = objective_of(SABR(Brighter(eps=0.9), eps=0.2, box_share=0.4))
    assert objective.loss.item() == pytest.approx(expected, rel=1e-9)
    wider = objective_of(SABR(Brighter(), eps=0.15, eps_margin=0.05, box_share=0.4))
    assert wider.loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_box_of_sabr_is_inside_of_the_ball_and_of_the_images(share: float) -> None:
    x, y = batch()
    defense = SABR(PGD(steps=3), eps=0.2, box_share=share)
    box = defense.box(x, defense.inner(network(), x, y, generator=generator()))
    assert bool((box.lower >= (x - 0.2).clamp(min=0) - 1e-6).all())
    assert bool((box.upper <= (x + 0.2).clamp(max=1) + 1e-6).all())


@pytest.mark.parametrize(
    "defense",
    [
        CCIBP(Fixed(X_ADV), eps=0.1, weight=0.3),
        ExpIBP(Fixed(X_ADV), eps=0.1, weight=0.3),
        SABR(Brighter(), eps=0.1),
    ],
    ids=lambda defense: type(defense).__name__,
)
def test_the_gradient_is_that_of_the_loss(defense: BoundDefense) -> None:
    assert gradients_are_right(defense)


# --- linear bounds -----------------------------------------------------------------------------


def crown_by_hand(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Upper bounds on z_k - z_y for one hidden layer of ReLUs, by the formulas of CROWN."""
    first, last = model[1], model[3]
    low, high = ((x + shift).clamp(0, 1).flatten(1) for shift in (-eps, eps))
    centre, radius = (low + high) / 2, (high - low) / 2
    middle = centre @ first.weight.T + first.bias
    reach = radius @ first.weight.T.abs()
    lower, upper = middle - reach, middle + reach
    chord = F.relu(upper) / (F.relu(upper) + F.relu(-lower))
    intercept = torch.where((lower < 0) & (upper > 0), -chord * lower, 0.0)
    below = torch.where(upper <= 0, 0.0, torch.where((lower >= 0) | (upper > -lower), 1.0, 0.0))
    rows = last.weight - last.weight[y][:, None]
    slopes = torch.where(rows > 0, chord[:, None], below[:, None])
    through = (rows * slopes) @ first.weight
    offset = (rows * slopes) @ first.bias + (rows.clamp(min=0) * intercept[:, None]).sum(2)
    most = (through @ centre[:, :, None]).squeeze(2) + (through.abs() @ radius[:, :, None]).squeeze(
        2
    )
    return most + offset + last.bias - last.bias[y][:, None]


def with_relu() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(1), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_crown_ibp_mixes_linear_and_interval_bounds_with_their_gradients(share: float) -> None:
    (x, y), model, twin = batch(), with_relu(), with_relu()
    defense = CROWNIBP(NoAttack(), eps=0.2, weight=1.0, linear_share=share)
    loss = objective_of(defense, model).loss
    intervals = twin(Interval.around(x, 0.2)).margins(y)
    worst = share * crown_by_hand(twin, x, y, 0.2) + (1 - share) * intervals
    expected = F.cross_entropy(worst, y)
    torch.testing.assert_close(loss, expected)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(twin.parameters()))
    for mine, other in zip(slopes, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_without_linear_bounds_crown_ibp_is_ibp_and_without_radius_standard_training() -> None:
    end = objective_of(IBP(NoAttack(), eps=0.2), with_relu()).loss
    ibp = CROWNIBP(NoAttack(), eps=0.2, linear_share=0.0)
    torch.testing.assert_close(objective_of(ibp, with_relu()).loss, end)
    still = CROWNIBP(NoAttack(), eps=0.0, weight=0.7)
    loss = objective_of(still, with_relu()).loss
    x, y = batch()
    torch.testing.assert_close(loss, F.cross_entropy(with_relu()(x), y))


def test_the_share_of_linear_bounds_falls_to_zero() -> None:
    defense = CROWNIBP(NoAttack(), linear_share=0.8)
    shares = [defense.scheduled(share).linear_share for share in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.8, 0.4, 0.0])
    with pytest.raises(InputError, match=r"^linear_share=0.0 .* defense=ibp"):
        CROWNIBP(NoAttack(), linear_share=0.0).refuse_without_effect()


# --- their ends --------------------------------------------------------------------------------

ON_BOUNDS_ALONE = IBP(NoAttack(), eps=0.2, weight=1.0)
ADVERSARIAL = WorstCase(PGD(eps=0.2, steps=3))
ENDS: list[tuple[Defense, Defense]] = [
    (CCIBP(PGD(eps=0.2, steps=3), eps=0.2, weight=1.0), ON_BOUNDS_ALONE),
    (ExpIBP(PGD(eps=0.2, steps=3), eps=0.2, weight=1.0), ON_BOUNDS_ALONE),
    (MTLIBP(PGD(eps=0.2, steps=3), eps=0.2, weight=1.0), ON_BOUNDS_ALONE),
    (SABR(PGD(steps=3), eps=0.2, box_share=1.0), ON_BOUNDS_ALONE),
    (CCIBP(PGD(eps=0.2, steps=3), eps=0.2, weight=0.0), ADVERSARIAL),
    (ExpIBP(PGD(eps=0.2, steps=3), eps=0.2, weight=0.0), ADVERSARIAL),
    (MTLIBP(PGD(eps=0.2, steps=3), eps=0.2, weight=0.0), ADVERSARIAL),
    (SABR(PGD(steps=3), eps=0.2, box_share=0.0), ADVERSARIAL),
]


@pytest.mark.parametrize(("defense", "end"), ENDS)
def test_at_the_ends_it_is_training_on_bounds_or_adversarial_training(
    defense: Defense, end: Defense
) -> None:
    model = network()
    losses = [objective_of(each, model).loss for each in (defense, end)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


# --- passes ------------------------------------------------------------------------------------


class _Counted(nn.Module):
    """The toy network, which counts its passes of images, of intervals and of recorded graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.seen: Counter[str] = Counter()

    def forward(self, x: Any) -> Any:
        logits = self.network(x)
        kinds = {Interval: "intervals", Traced: "graphs"}
        kind = kinds.get(type(x), "images")
        self.seen[kind] += 1
        if kind == "images" and logits.requires_grad and self.network[1].weight.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.seen["backward"] += 1


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (CCIBP(PGD(steps=5)), {"images": 6, "backward": 1}),
        (ExpIBP(PGD(steps=5)), {"images": 6, "backward": 1}),
        (SABR(PGD(steps=5)), {"images": 6}),
        (IBP(NoAttack(), weight=0.5), {"images": 1, "backward": 1}),
        (IBP(NoAttack(), weight=1.0), {"images": 1}),
        (CROWNIBP(NoAttack()), {"images": 1, "backward": 1, "graphs": 1}),
        (CROWNIBP(NoAttack(), linear_share=0.0), {"images": 1, "backward": 1}),
    ],
)
def test_a_batch_costs_no_pass_too_many(defense: BoundDefense, expected: dict[str, int]) -> None:
    model = _Counted()
    objective_of(defense, model).loss.backward()  # type: ignore[no-untyped-call]
    assert model.seen == {"intervals": 1, **expected}


def test_linear_bounds_pass_each_layer_once_with_all_other_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths = []
    through = Backward._through

    def counted(self: Backward, node: Node, a: Tensor) -> Any:
        widths.append(len(a))
        return through(self, node, a)

    monkeypatch.setattr(Backward, "_through", counted)
    model = network()
    objective_of(CROWNIBP(NoAttack()), model)
    # Every layer of the toy network is one operation of the graph.
    assert widths == [CLASSES - 1] * len(model)


# --- BatchNorm ---------------------------------------------------------------------------------


def normalised() -> nn.Sequential:
    """A network with BatchNorm in front of its ReLU, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(1), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)
        model = nn.Sequential(*layers).double().train()
    with torch.no_grad():
        model[2].weight.uniform_(-2, 2, generator=generator())
    return model


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The loss at bounds with statistics of the batch `x`, with all of its gradient."""
    first, norm, last = model[1], model[2], model[4]
    z = x.flatten(1) @ first.weight.T + first.bias
    scale = norm.weight / (z.var(0, correction=0) + norm.eps).sqrt()
    low, high = ((x + shift).clamp(0, 1).flatten(1) for shift in (-eps, eps))
    centre = ((low + high) / 2) @ first.weight.T + first.bias
    radius = ((high - low) / 2) @ first.weight.T.abs()
    centre = (centre - z.mean(0)) * scale + norm.bias
    lower, upper = (F.relu(centre + sign * radius * scale.abs()) for sign in (-1, 1))
    apart = last.weight - last.weight[y][:, None]
    up, down = apart.clamp(min=0) @ upper[:, :, None], apart.clamp(max=0) @ lower[:, :, None]
    worst = (up + down).squeeze(2) + last.bias - last.bias[y][:, None]
    return F.cross_entropy(worst, y)


def test_bounds_use_the_statistics_of_the_images_with_their_gradient() -> None:
    (x, y), model, twin = batch(), normalised(), normalised()
    objective = objective_of(IBP(NoAttack(), eps=0.1, weight=1.0), model)
    expected = by_hand(twin, x, y, 0.1)
    torch.testing.assert_close(objective.loss, expected)
    slopes = torch.autograd.grad(objective.loss, list(model.parameters()))
    for mine, theirs in zip(
        slopes, torch.autograd.grad(expected, list(twin.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("statistics", list(Statistics))
def test_only_the_images_update_running_statistics(statistics: Statistics) -> None:
    (x, _), model, twin = batch(), normalised(), normalised()
    for defense in (
        IBP(NoAttack(), statistics=statistics),
        SABR(Brighter(), statistics=statistics),
    ):
        objective_of(defense, model)
        twin(x)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not mine.requires_grad
    assert all(module.training for module in model.modules())


def test_frozen_layers_keep_their_statistics() -> None:
    model = normalised()
    model[2].eval()
    found = [
        objective_of(IBP(NoAttack(), eps=0.1, weight=1.0, statistics=each), model).loss
        for each in Statistics
    ]
    assert found[0] == found[1]


# --- the regularisers --------------------------------------------------------------------------


def test_the_regularisers_are_those_of_the_paper() -> None:
    """Two ReLU layers, in NumPy."""
    centres = np.array([[1.0, -0.5, 0.2], [2.0, -1.0, -0.1]]), np.array([[0.1, -3.0], [0.2, -4.0]])
    radii = np.array([[0.1, 0.2, 0.4], [0.3, 0.3, 0.3]]), np.array([[0.01, 0.0], [0.0, 0.1]])
    box = Interval(torch.zeros(2, 4), torch.full((2, 4), 0.1))
    expected = []
    for c, r in zip(centres, radii, strict=True):
        on, off = c - r > 0, c + r < 0
        means = c[on].sum(), -c[off].sum()
        variances = ((c - c.mean()) ** 2)[on].sum(), ((c - c.mean()) ** 2)[off].sum()
        ratios = 0.1 / r.mean(), min(means) / max(means), min(variances) / max(variances)
        expected.append(sum(max(0.0, 0.5 - ratio) / 0.5 for ratio in ratios))
    layers = [
        Interval(torch.from_numpy(c), torch.from_numpy(r))
        for c, r in zip(centres, radii, strict=True)
    ]
    assert regulariser(box, layers).item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_the_regularisers_are_finite_without_radius_and_without_stable_neurons() -> None:
    centre = torch.zeros(2, 3, requires_grad=True)
    for radius in (0.0, 1.0):
        layer = Interval(centre, torch.full((2, 3), radius))
        found = regulariser(Interval(torch.zeros(2, 4), torch.zeros(2, 4)), [layer])
        (slope,) = torch.autograd.grad(found, centre)
        assert bool(found.isfinite())
        assert bool(slope.isfinite().all())


class _Functional(nn.Module):
    """A network that calls ReLU as a module, in place, and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        first = self.relu(self.layer(x.flatten(1)))
        return self.layer(torch.relu(self.layer(F.relu(self.layer(first)))))


def test_what_enters_each_relu_is_found_as_it_was() -> None:
    model, relus = _Functional(), ReLUInputs()
    box = Interval.around(batch()[0], 0.1)
    with relus:
        model(box)
    assert len(relus.found) == 3
    first = model.layer(box.flatten(1))
    torch.testing.assert_close(relus.found[0].lower, first.lower)
    assert bool((relus.found[0].lower < 0).any())


def test_the_regularisers_are_added_with_their_weight() -> None:
    frozen, box = normalised().eval(), Interval.around(batch()[0], 0.1)
    plain, more = (
        objective_of(IBP(NoAttack(), regularisation=each), frozen).loss for each in (0.0, 0.5)
    )
    relus = ReLUInputs()
    with relus:
        frozen(box)
    torch.testing.assert_close(more - plain, 0.5 * regulariser(box, relus.found))


# --- the schedule ------------------------------------------------------------------------------


def test_margin_and_radius_grow_while_the_regularisers_fade() -> None:
    curriculum = Curriculum(eps_warmup=1.0, per_batch=True)
    whole = SABR(PGD(eps=0.1), eps=0.1, eps_margin=0.1, regularisation=0.5)
    quarter = curriculum.at(whole, 1, 4)
    assert quarter == SABR(PGD(eps=0.0), eps=0.0, regularisation=0.5)
    half = curriculum.at(whole, 3, 4)
    assert half == SABR(PGD(eps=0.05), eps=0.05, eps_margin=0.05, regularisation=0.25)
    assert half.radius == 0.1


@pytest.mark.parametrize("build", [MTLIBP, CCIBP, ExpIBP])
def test_the_weight_grows_if_set(build: type[CCIBP]) -> None:
    for grows in (True, False):
        defense = build(PGD(), weight=0.6, weight_warmup=grows)
        assert defense.scheduled(0.5).weight == (0.3 if grows else 0.6)


# --- refusals ----------------------------------------------------------------------------------


def test_settings_without_effect_on_the_model_are_refused() -> None:
    running = IBP(NoAttack(), statistics=Statistics.running)
    with pytest.raises(InputError, match=r"^defense.statistics=running has no effect"):
        running.refuse_unfit(network().float(), SHAPE)
    running.refuse_unfit(normalised().float(), SHAPE)
    regularised = IBP(NoAttack(), regularisation=0.5)
    with pytest.raises(InputError, match=r"^defense.regularisation=0.5 has no effect .* ReLU"):
        regularised.refuse_unfit(network().float(), SHAPE)
    regularised.refuse_unfit(normalised().float(), SHAPE)


def test_sabr_refuses_the_whole_box_on_the_command_line_and_attacks_without_a_radius() -> None:
    with pytest.raises(InputError, match=r"^box_share=1.0 is not allowed: .* defense=ibp"):
        SABR(PGD(), box_share=1.0).refuse_without_effect()
    SABR(PGD(), box_share=0.99).refuse_without_effect()
    with pytest.raises(InputError, match=r"^attack=Fixed is not allowed: .* states its threat"):
        SABR(Fixed(X_ADV))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"box_share": 1.1}, "box_share"),
        ({"eps_margin": -0.1}, "eps_margin"),
        ({"regularisation": -1.0}, "regularisation"),
        ({"statistics": "none"}, "statistics"),
    ],
)
def test_values_out_of_range_are_refused(keys: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}=.* is not allowed"):
        SABR(PGD(), **keys)
