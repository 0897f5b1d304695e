"""Attacks of the user's own: what they say is used, and what they do not say is not passed over."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import (
    Attack,
    Bounded,
    Iterated,
    StepsField,
    ThreatFields,
    Traits,
    cross_entropy,
    fitted,
    frugal,
    threat_of,
    traits_of,
)
from robusttrain.attacks.attack_loss import Label
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.attacks.transfer import Transfer
from robusttrain.data import Split
from robusttrain.defenses.ibp import MTLIBP
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import attack_all, open_session
from robusttrain.evaluation.audit import audit
from robusttrain.evaluation.curves import Probe, over_eps, over_steps
from robusttrain.evaluation.findings import Check
from robusttrain.report.ledger import Ledger
from robusttrain.runtime.progress import unreported
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from robusttrain.training.curriculum import Curriculum
from robusttrain.training.overfitting import probe_images, trains_on_ball

RADIUS = 0.11
CONTROL = "suite at eps 0 differs from clean by"
RESTARTS = "accuracy rises with restarts by"


@dataclass
class Radial:
    """Steps along the signs of gradients; all that it says, it says by the protocols."""

    radius: float = RADIUS
    rounds: int = 4

    step_size: ClassVar[float | None] = None

    @property
    def threat(self) -> Threat:
        return Threat(Norm.linf, self.radius)

    def under(self, threat: Threat) -> Self:
        return replace(self, radius=threat.eps)

    @property
    def steps(self) -> int:
        return self.rounds

    def with_steps(self, steps: int, step_size: float | None = None) -> Self:
        return replace(self, rounds=steps)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Any = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        x_adv = x
        for _ in range(self.rounds):
            point = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(point), y).sum(), point)
            x_adv = x_adv + self.radius / self.rounds * gradient.sign()
        # Rounding adds up over the steps.
        return ball(self.threat).project(x_adv, x)


class Silent:
    """Says nothing of itself, and moves every pixel."""

    def __init__(self, amount: float = 0.05) -> None:
        self.amount = amount

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return (x + self.amount).clamp(0, 1)


@dataclass
class ByFields(StepsField, ThreatFields):
    """Gets its protocols from its fields."""

    norm: Norm = Norm.l2
    eps: float = 0.5
    steps: int = 6

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return x


@dataclass
class Silenced:
    """A defense that says nothing, with an attack of its own inside."""

    radius: float = 0.1

    def inner(self, *images: Any, **keys: Any) -> Any:
        return images[1]

    def outer(self, *images: Any, **keys: Any) -> Any:
        raise NotImplementedError


def test_the_toys_are_what_they_are_for() -> None:
    assert isinstance(Radial(), Bounded)
    assert isinstance(Radial(), Iterated)
    assert not isinstance(Silent(), Bounded | Iterated)
    assert isinstance(ByFields(), Bounded)
    assert isinstance(ByFields(), Iterated)


# What is asked of an attack.


def test_what_an_attack_does_not_say_is_taken_for_granted() -> None:
    silent = Silent()
    assert threat_of(silent) is None
    assert traits_of(silent) == Traits()
    assert fitted(silent, 2) is silent
    assert frugal(silent) is silent
    assert frugal(Radial(rounds=40)) == Radial(rounds=3)
    assert frugal(Radial(rounds=2)) == Radial(rounds=2)


def test_fields_are_enough_for_a_dataclass() -> None:
    attack = ByFields()
    assert threat_of(attack) == Threat(Norm.l2, 0.5)
    assert attack.under(Threat(Norm.l1, 2.0)) == ByFields(Norm.l1, 2.0)
    assert attack.with_steps(9) == ByFields(steps=9)


@dataclass
class Told(Radial):
    """Says what kind of an attack it is."""

    traits: Traits = field(default_factory=Traits)


def test_a_defense_that_climbs_a_divergence_asks_what_kind_of_an_attack_it_is() -> None:
    assert TRADES(Told()).attack == Told()
    with pytest.raises(InputError, match=r"^attack\.random_start=False is not allowed"):
        TRADES(Told(traits=Traits(starts_at_image=True)))
    with pytest.raises(InputError, match=r"^attack\.label=predicted is not allowed"):
        TRADES(Told(traits=Traits(label=Label.predicted)))


def test_an_evaluation_asks_what_kind_of_an_attack_it_is() -> None:
    walks = Told(traits=Traits(walks_boundary=True))
    suite = Evaluation({"walks": walks, "silent": Silent()}).suite(2, random=True)
    assert list(suite) == ["silent"]
    sizes: dict[bool, list[int]] = {}
    for pooled in (False, True):
        probe, _ = evaluated({}, Radial())
        attack, sizes[pooled] = Told(traits=Traits(pooled=pooled)), []
        done = sizes[pooled].append
        probe.subject.attack(attack, np.arange(86), "told", threat=attack.threat, advance=done)
    assert sizes == {False: [20, 20, 20, 20, 6], True: [86]}


# Warm-up.


def test_a_warm_up_grows_its_radius_and_its_steps() -> None:
    curriculum = Curriculum(eps_warmup=1.0, steps=[2, 8])
    grown = [curriculum.at(WorstCase(Radial(0.5)), epoch, 4).attack for epoch in (1, 2, 3, 4)]
    assert grown == [Radial(0.125, 2), Radial(0.25, 2), Radial(0.375, 8), Radial(0.5, 8)]
    assert curriculum.at(WorstCase(ByFields()), 2, 4) == WorstCase(ByFields(eps=0.25, steps=2))


def test_a_warm_up_reaches_through_a_transfer() -> None:
    source = nn.Identity()
    half = Curriculum(eps_warmup=1.0, steps=[2]).at(WorstCase(Transfer(source, Radial(0.5))), 1, 2)
    assert half == WorstCase(Transfer(source, Radial(0.25, 2)))


@pytest.mark.parametrize(
    "defense",
    [
        WorstCase(Silent()),
        WorstCase(Transfer(nn.Identity(), Silent())),
        # Its own radius could grow, and that of its attack could not.
        MTLIBP(Silent()),
        Silenced(),
    ],
)
def test_what_a_warm_up_cannot_change_it_refuses(defense: Any) -> None:
    name = type(defense).__name__
    for curriculum, key in ((Curriculum(eps_warmup=0.5), "eps"), (Curriculum(steps=[1]), "steps")):
        with pytest.raises(
            InputError, match=rf"training\.curriculum cannot change '{key}'.*{name}"
        ):
            curriculum.at(defense, 1, 10)
    assert Curriculum().at(defense, 1, 10) is defense


def test_a_training_with_it_is_watched_for_catastrophic_overfitting() -> None:
    split = Split(torch.zeros(100, 1, 1, 1), torch.zeros(100))
    watches = {
        type(attack): probe_images(split, WorstCase(attack), 0.1).size
        for attack in (Radial(), Silent())
    }
    assert watches == {Radial: 32, Silent: 32}
    assert probe_images(split, Standard(), 0.1).size == 0
    assert trains_on_ball(WorstCase(Radial(0.1)), Threat(Norm.linf, 0.1))
    assert not trains_on_ball(WorstCase(Radial(0.1)), Threat(Norm.linf, 0.2))
    assert not trains_on_ball(WorstCase(Radial(0.1)), Threat(Norm.l2, 0.2))
    assert not trains_on_ball(WorstCase(Silent()), Threat(Norm.linf, 0.1))
    assert not trains_on_ball(MTLIBP(Silent(), eps=0.1), Threat(Norm.linf, 0.1))


# Evaluation.


class Threshold(nn.Module):
    """Class 1 where the one pixel is above 1/2: an image is robust iff it is eps away from that."""

    def forward(self, x: Tensor) -> Tensor:
        score = 8 * (x.flatten(1) - 0.5)
        return torch.cat([-score, score], 1)


def data() -> Split:
    pixels = torch.arange(0, 256, 3)
    return Split(pixels.to(torch.uint8).view(-1, 1, 1, 1), (pixels > 127).long())


def robust(eps: float) -> float:
    """The share of images that no attack of this radius breaks."""
    return float((np.abs(np.arange(0, 256, 3) / 255 - 0.5) > eps).mean())


def evaluated(attacks: dict[str, Attack], probe: Any) -> tuple[Probe, Ledger]:
    settings = Evaluation(attacks, probe=probe, batch_size=20)
    index, subject = open_session(Threshold().eval(), data(), settings, 0)
    suite = settings.suite(subject.num_classes, subject.random)
    ledger = attack_all(subject, index, suite, False, threat=Threat(Norm.linf, 0.25))
    return Probe(subject, probe), ledger


def checks_of(attacks: dict[str, Attack], probe: Any) -> dict[str, Check]:
    asked, ledger = evaluated(attacks, probe)
    return {check.check: check for check in audit(asked, attacks, ledger).checks}


def test_its_row_states_its_own_radius() -> None:
    attacks: dict[str, Attack] = {
        "own": Radial(0.05), "silent": Silent(), "transfer": Transfer(Threshold(), Radial(0.07)),
    }  # fmt: skip
    _, ledger = evaluated(attacks, Radial())
    stated = {name: outcome.threat.eps for name, outcome in ledger.outcomes.items()}
    # One that says nothing is one of the threat model that the run asks for.
    assert stated == {"own": 0.05, "silent": 0.25, "transfer": 0.07}
    broken = {name: outcome.broken.mean() for name, outcome in ledger.outcomes.items()}
    assert broken["own"] == pytest.approx(1 - robust(0.05))
    assert broken["transfer"] == pytest.approx(1 - robust(0.07))


def test_curves_over_its_radius_and_its_steps_are_exact() -> None:
    probe, _ = evaluated({}, Radial())
    points = over_eps(probe, unreported)
    radii = [m * RADIUS for m in (0, 1 / 4, 1 / 2, 1, 3 / 2, 2, 4)]
    assert [point.row.threat.eps for point in points] == pytest.approx(radii)
    assert [point.row.accuracy for point in points] == pytest.approx([robust(r) for r in radii])
    assert len({point.row.accuracy for point in points}) == 7
    assert {point.steps for point in points} == {4}
    by_steps = over_steps(probe, unreported)
    assert [point.steps for point in by_steps] == [1, 2, 5, 10, 20, 40, 80]
    assert [p.row.accuracy for p in by_steps] == pytest.approx([robust(RADIUS)] * 7)


def test_an_audit_tries_it_at_radius_0_and_has_it_as_a_probe() -> None:
    attacks: dict[str, Attack] = {"own": Radial(), "transfer": Transfer(Threshold(), Radial())}
    checks = checks_of(attacks, Radial())
    assert checks[CONTROL].figure == 0
    assert {check.verdict for check in checks.values()} == {"pass"}


def test_an_attack_that_ignores_its_radius_fails_the_control() -> None:
    class Astray(Radial):
        def under(self, threat: Threat) -> Self:
            return self

    assert checks_of({"own": Astray()}, Radial())[CONTROL].verdict == "fail"


def test_the_control_names_whom_it_could_not_try() -> None:
    attacks: dict[str, Attack] = {
        "own": Radial(), "quiet": Silent(), "far": Transfer(Threshold(), Silent()),
    }  # fmt: skip
    checks = checks_of(attacks, Radial())
    assert CONTROL not in checks
    assert checks[f"{CONTROL} (without quiet, far)"].verdict == "pass"


def test_a_probe_that_cannot_restart_is_called_several_times() -> None:
    class Lucky(Radial):
        """Breaks half of the images, others each time."""

        def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
            draw = torch.rand(len(x), generator=keys["generator"])
            return torch.where(draw.view(-1, 1, 1, 1) < 0.5, 1 - x, x)

    checks = checks_of({}, Lucky(radius=1.0))
    # Five fair coins leave 1 image in 32 where one leaves every second: no rise, but a fall.
    left = 100 / 32 - 50
    spread = 100 * np.sqrt(0.25 / len(data().labels))
    assert abs(checks[RESTARTS].figure - left) < 4 * spread


@pytest.mark.parametrize("probe", [Silent(), Square()])
def test_a_probe_needs_a_radius_and_steps(probe: Any) -> None:
    with pytest.raises(InputError, match=rf"^probe={type(probe).__name__} is not allowed.*steps"):
        Evaluation(probe=probe)


def test_own_attacks_and_ours_agree_on_a_monotone_model() -> None:
    model, x = Threshold(), data().images.float() / 255
    own = Radial()(model, x, data().labels)
    ours = PGD(eps=RADIUS, steps=4, step_size=RADIUS / 4, random_start=False)
    assert torch.allclose(own, ours(model, x, data().labels), atol=1e-6)
    transferred = Transfer(model, Radial())(nn.Identity(), x, data().labels)
    assert torch.equal(transferred, own)
