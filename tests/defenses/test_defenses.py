"""Properties of every defense: its cost, its limit at radius 0, where its loss is applied."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast, get_type_hints

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks import Attack, cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.friendly import FriendlyPGD
from robusttrain.attacks.lbfgs import LBFGS
from robusttrain.attacks.max_of_norms import MaxOfNorms
from robusttrain.attacks.msd import MSD
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD, Start
from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
from robusttrain.attacks.transfer import Transfer
from robusttrain.config.schema import components
from robusttrain.defenses import Defense, Objective, each_row
from robusttrain.defenses.alp import ALP, Pairing
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.avg import AVG
from robusttrain.defenses.bounded import BoundDefense
from robusttrain.defenses.cc_ibp import CCIBP
from robusttrain.defenses.crown_ibp import CROWNIBP
from robusttrain.defenses.distill import Distill
from robusttrain.defenses.eat import EAT
from robusttrain.defenses.exp_ibp import ExpIBP
from robusttrain.defenses.fare import FARE
from robusttrain.defenses.grad_align import GradAlign
from robusttrain.defenses.ibp import IBP, MTLIBP
from robusttrain.defenses.lsa import LSA, Direction
from robusttrain.defenses.mart import MART
from robusttrain.defenses.n_fgsm import NFGSM
from robusttrain.defenses.ramp import RAMP
from robusttrain.defenses.rt import RT
from robusttrain.defenses.sabr import SABR
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise.draws import SameDraws
from robusttrain.noise.gaussian import Gaussian
from robusttrain.threat import Norm
from toys.defenses import asked
from toys.formats import FORMATS, InFormat

CLASSES = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(1), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.rand(8, 1, 2, 3, generator=draws), torch.arange(8) % CLASSES


def objective_of(defense: Defense, model: nn.Module, loss: Any = cross_entropy) -> Objective:
    return asked(defense, model, *batch(), loss=loss)


class _Passes(torch.autograd.Function):
    """The identity, which counts the backward passes through it by their destination."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seen: Counter[str]) -> Tensor:
        ctx.weight, ctx.seen = weight, seen
        seen["forward"] += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen["full" if ctx.weight.requires_grad else "input only"] += 1
        return gradients[0], None, None


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.seen: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(nn.Linear, self.network[1]).weight
        # Before the head: the gradient of a defense may start at the features.
        features = _Passes.apply(self.network[:-1](x), weight, self.seen)
        return cast(Tensor, self.network[-1](features))


# Defense, then forward passes, input-only backward passes and backward passes to the parameters.
SEVERAL = {"linf": 0.03, "l2": 0.2, "l1": 1.0}

COSTS: list[tuple[Defense, int, int, int]] = [
    (Standard(), 1, 0, 1),
    (AlphaMix(FGSM()), 3, 1, 2),
    (AlphaMix(PGD(steps=7)), 9, 7, 2),
    (WorstCase(FGSM()), 2, 1, 1),
    (WorstCase(FGSM(random_start=True)), 2, 1, 1),
    (WorstCase(PGD(steps=1)), 2, 1, 1),
    (WorstCase(PGD(steps=7)), 8, 7, 1),
    (RT(), 1, 0, 2),
    (LSA(direction=Direction.loss), 2, 1, 1),
    (LSA(direction=Direction.alpha), 2, CLASSES, 1),
    (WorstCase(FriendlyPGD(steps=7, tau=7)), 8, 7, 1),
    (NFGSM(), 2, 1, 1),
    # Of the passes back to the parameters, the first is differentiated through.
    (GradAlign(), 3, 1, 3),
    (TRADES(PGD(steps=7)), 9, 7, 2),
    (MART(PGD(steps=7)), 9, 7, 2),
    (ALP(PGD(steps=7)), 9, 7, 2),
    (ALP(PGD(steps=7), pairing=Pairing.clean), 1, 0, 1),
    (Distill(PGD(steps=7), network()), 9, 7, 2),
    (AVG(PGD(steps=7), SEVERAL), 24, 21, 3),
    (EAT(PGD(steps=7), SEVERAL), 8, 7, 1),
    (RAMP(PGD(steps=7), SEVERAL), 16, 14, 2),
    # Each of the three searches is scored, and so is each step in three norms.
    (WorstCase(MaxOfNorms(PGD(steps=7), SEVERAL)), 25, 21, 1),
    (WorstCase(MSD(SEVERAL, steps=7)), 29, 7, 1),
    (FARE(PGD(steps=7)), 8, 7, 1),
]


# Passes of intervals are counted in their own test.
ON_BOUNDS: list[BoundDefense] = [
    IBP(NoAttack()), MTLIBP(PGD(steps=7)), CCIBP(PGD(steps=7)), ExpIBP(PGD(steps=7)),
    SABR(PGD(steps=7)),
]  # fmt: skip
EVERY: list[Defense] = [*(case[0] for case in COSTS), *ON_BOUNDS]
every_defense = pytest.mark.parametrize("defense", EVERY, ids=lambda d: type(d).__name__)


@pytest.mark.parametrize(("defense", "forward", "input_only", "full"), COSTS)
def test_a_batch_costs_no_pass_too_many(
    defense: Defense, forward: int, input_only: int, full: int
) -> None:
    model = _Counted()
    objective_of(defense, model).loss.backward()  # type: ignore[no-untyped-call]
    expected = {"forward": forward, "input only": input_only, "full": full}
    assert model.seen == Counter({key: count for key, count in expected.items() if count})


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@every_defense
def test_networks_of_other_number_formats_train(defense: Defense, dtype: torch.dtype) -> None:
    if isinstance(defense, BoundDefense):
        pytest.skip("bounds have no other format")
    model = InFormat(network(), dtype)
    objective = objective_of(defense, model)
    objective.loss.backward()  # type: ignore[no-untyped-call]
    assert objective.loss.isfinite()
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.any() for slope in slopes)


AT_ZERO: list[Callable[[Norm], Defense]] = [
    lambda norm: RT(norm, 0.0),
    lambda norm: LSA(norm, 0.0, Direction.loss),
    lambda norm: LSA(norm, 0.0, Direction.alpha),
    lambda norm: WorstCase(PGD(norm, 0.0, steps=3)),
    lambda norm: WorstCase(PGD(norm, 0.0, steps=3, restarts=2)),
    lambda norm: WorstCase(FGSM(norm, 0.0, random_start=True)),
    lambda norm: AlphaMix(FGSM(norm, 0.0), 0.4),
    lambda norm: AlphaMix(LBFGS(norm, 0.0, steps=2, rounds=2), 0.4),
    lambda norm: WorstCase(FriendlyPGD(norm, 0.0, steps=3)),
    lambda norm: NFGSM(norm, 0.0),
    lambda norm: GradAlign(norm, 0.0),
    lambda norm: TRADES(PGD(norm, 0.0, steps=3, start=Start.gaussian)),
    lambda norm: ALP(PGD(norm, 0.0, steps=3)),
]


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("make", AT_ZERO)
def test_at_radius_zero_every_defense_is_standard_training(
    make: Callable[[Norm], Defense], norm: Norm
) -> None:
    model = network()
    losses = [objective_of(defense, model).loss for defense in (make(norm), Standard())]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for mine, standard in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, standard, rtol=1e-5, atol=1e-7)


@every_defense
def test_several_draws_of_zero_noise_are_like_one(defense: Defense) -> None:
    """With `noise.draws` an image has several rows of logits in training, one for the attack."""
    noisy = network()
    Gaussian(0.0, draws=3).install(noisy, 0)

    def averaged(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits, each_row(y, logits)).view(len(y), -1).mean(1)

    found = objective_of(defense, SameDraws(noisy, 3), averaged).loss
    torch.testing.assert_close(found, objective_of(defense, network()).loss, rtol=1e-4, atol=1e-6)


class _Recorded:
    """An attack that keeps what it returned."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.images: list[Tensor] = []

    def __call__(self, *arguments: Any, **keys: Any) -> Tensor:
        self.images.append(self.attack(*arguments, **keys))
        return self.images[-1]


@pytest.mark.parametrize(
    "attack", [PGD(eps=0.1, steps=5), FGSM(eps=0.1), SoftmaxLinearisation(eps=0.1)]
)
@pytest.mark.parametrize("defense", [WorstCase, AlphaMix])
def test_label_smoothing_is_for_the_outer_loss_alone(
    attack: Attack, defense: Callable[[Attack], Defense]
) -> None:
    model, (_, y) = network(), batch()
    recorded = _Recorded(attack)
    # With this much smoothing the smoothed loss has another steepest direction than the plain one.
    smoothed = partial(F.cross_entropy, reduction="none", label_smoothing=0.9)
    plain = objective_of(defense(recorded), model)
    smooth = objective_of(defense(recorded), model, smoothed)
    assert torch.equal(*recorded.images)
    logp = model(recorded.images[0]).log_softmax(1)
    by_hand = -0.1 * logp.gather(1, y[:, None]).squeeze(1) - 0.9 * logp.mean(1)
    if defense is WorstCase:
        torch.testing.assert_close(smooth.loss, by_hand.mean())
    assert smooth.loss != plain.loss


@every_defense
def test_a_defense_leaves_mode_and_statistics_to_its_own_passes(defense: Defense) -> None:
    """Crafting moves no BatchNorm statistics: as many updates as outer forward passes."""
    model = network()
    norm = nn.BatchNorm1d(7)
    model.insert(2, norm)
    model.train()
    objective_of(defense, model)
    crafted_alone = not isinstance(defense, ALP) or defense.pairing is Pairing.adversarial
    pairs = isinstance(defense, AlphaMix | GradAlign | TRADES | MART | ALP | Distill | RAMP)
    passes = 2 if pairs and crafted_alone else 1
    assert norm.num_batches_tracked == (len(SEVERAL) if isinstance(defense, AVG) else passes)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- attacks that would make it another method --------------------------------------------------

NEED_AN_ATTACK: list[Callable[[Any], Defense]] = [
    WorstCase, AlphaMix, MART, TRADES, ALP, MTLIBP, CCIBP, ExpIBP, SABR, FARE,
    lambda attack: Distill(attack, network()), lambda attack: AVG(attack, SEVERAL),
    lambda attack: EAT(attack, SEVERAL), lambda attack: RAMP(attack, SEVERAL),
]  # fmt: skip


@pytest.mark.parametrize("build", NEED_AN_ATTACK)
def test_a_method_that_is_an_attack_refuses_none(build: Callable[[Any], Defense]) -> None:
    """On its own, or inside of another attack."""
    for attack in (NoAttack(), Transfer(network(), NoAttack())):
        with pytest.raises(InputError, match=r"^attack=none is not allowed: .* moves away"):
            build(attack)
    assert build is FARE or build(Transfer(network(), PGD())) is not None


def test_every_defense_with_an_attack_refuses_one_of_the_two() -> None:
    """Any attack, or none: a defense that takes both is two methods under one name."""
    with_attack = [d for d in components("defense") if "attack" in get_type_hints(d)]
    assert {type(build(PGD())) for build in NEED_AN_ATTACK} | {IBP, CROWNIBP} == set(with_attack)
    for attack in (PGD(), Transfer(network(), PGD())):
        with pytest.raises(InputError, match=r"^attack=\w+ is not allowed: .* defense=mtl_ibp"):
            IBP(attack)


def test_pairing_of_clean_images_has_no_attack_whatever_it_is_given() -> None:
    for attack in (PGD(), NoAttack()):
        assert ALP(attack, pairing=Pairing.clean).attack == NoAttack()
