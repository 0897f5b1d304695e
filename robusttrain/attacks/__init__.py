"""Attacks: searches for the worst point of S(x), the inner maximisation.

An attack is called as `attack(model, x, y, loss=..., generator=...)` with images x of shape
(N, C, H, W) in [0, 1] and labels y of shape (N,), and returns x_adv in S(x), of the shape, dtype
and device of x. It keeps no model, leaves modes, parameters, BatchNorm statistics and the global
random state as they were, and draws only from `generator`. (Crafting in train mode runs the model's
own dropout, which draws from the global stream.) The attacks of this package refuse images outside
[0, 1], and images that are neither float32 nor float64.

Nothing more is needed to train with an attack and to evaluate by it. The curriculum, the curves,
the audit and some defenses ask for more, by the protocols below. Each has a default for attacks
that do not have it:

* `Bounded`: its threat model. Its row states that of the run; a warm-up and the probe refuse it.
* `MultiBounded`: the same for several balls at once. It is for training only.
* `Iterated`: its steps. `training.curriculum.steps` and `evaluation.probe` refuse it.
* `Restarted`: several searches in one. The audit calls the probe several times.
* `Frugal`: a cheap form. The audit takes few steps of an `Iterated` attack, or all of it.
* `Fitted`: settings that depend on the number of classes. It is used as it is.
* `Described`: what kind of an attack it is. `Traits()` by default.
* `Attacking`: an attack inside of it. There is none.

A dataclass gets `Bounded` from its fields by the base `ThreatFields`, and `Iterated` by
`StepsField`. `NoThreat` says that it has no radius. Defenses say theirs in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from robusttrain.attacks.attack_loss import Label, Loss, cross_entropy
from robusttrain.attacks.model_view import Mode
from robusttrain.threat import Norm, Threat, of_radii

T = TypeVar("T")

# Steps at radius 0, where there is nothing to be found.
FEW_STEPS = 3


class Attack(Protocol):
    """What every attack can be called as."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = cross_entropy,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images for `x`."""


@runtime_checkable
class Bounded(Protocol):
    """An attack or a defense that knows its threat model, and can have another one."""

    @property
    def threat(self) -> Threat | None:
        """The norm and the radius of what it searches; None where there is none to be changed."""

    def under(self, threat: Threat) -> Self:
        """A copy for another threat model."""


@runtime_checkable
class MultiBounded(Protocol):
    """An attack or a defense that searches the balls of several threat models."""

    @property
    def threats(self) -> Mapping[str, float]:
        """The radii by their norms, in pixel units of [0, 1]."""

    def under_all(self, threats: Mapping[str, float]) -> Self:
        """A copy for other radii."""


@runtime_checkable
class Iterated(Protocol):
    """An attack that takes a number of steps."""

    @property
    def steps(self) -> int:
        """Steps of a search."""

    @property
    def step_size(self) -> float | None:
        """Length of a step, in pixel units; None where it follows from radius and steps."""

    def with_steps(self, steps: int, step_size: float | None = None) -> Self:
        """A copy with so many steps of such a length."""


@runtime_checkable
class Restarted(Protocol):
    """An attack that searches several times by itself, and keeps the best point of all searches."""

    def restarted(self, searches: int) -> Attack:
        """A copy that searches so often, each time from another random start."""


@runtime_checkable
class Frugal(Protocol):
    """An attack that has a cheap form, for where there is nothing to be found."""

    def frugal(self) -> Attack:
        """A copy that does all that the attack does, but little of it."""


@runtime_checkable
class Fitted(Protocol):
    """An attack with settings that not every number of classes allows."""

    def fitted(self, num_classes: int) -> Attack:
        """The attack for a model with so many classes; itself where nothing has to change."""


@runtime_checkable
class Demanding(Protocol):
    """An attack that does not fit every data set."""

    def refuse_unfit(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        """Raise `InputError` unless it takes such images (C, H, W) with so many classes."""


@dataclass(frozen=True)
class Traits:
    """What kind of an attack it is, with what is taken for granted of one that does not say.

    Parameters
    ----------
    label
        The label that it moves away from, or towards.
    mode
        Mode of the model's layers while crafting.
    starts_at_image
        Whether its first gradient is that at x itself, where a divergence from f(x) has none.
    walks_boundary
        Whether it follows the decision boundary, of which a model that draws noise has none to see.
    black_box
        Whether it searches by outputs alone, as the audit holds against searches by gradients.
    own_objective
        Whether it has an objective of its own, and does not climb the `loss` of its caller.
    pooled
        Whether it takes many batches at once and keeps to the batch size of the model by itself
        (`Metered.size`), so that images that are broken leave their room to others.
    """

    label: Label = Label.given
    mode: Mode = Mode.eval
    starts_at_image: bool = False
    walks_boundary: bool = False
    black_box: bool = False
    own_objective: bool = False
    pooled: bool = False


@runtime_checkable
class Described(Protocol):
    """An attack that says what kind of an attack it is."""

    @property
    def traits(self) -> Traits:
        """What it is."""


@runtime_checkable
class Attacking(Protocol):
    """A dataclass with an attack in its field `attack`: most defenses, and attacks by others."""

    @property
    def attack(self) -> Attack:
        """The attack inside."""


@runtime_checkable
class ProbeAttack(Attack, Bounded, Iterated, Protocol):
    """What the curves and the audit need of their probe: a threat model, and steps."""

    @property
    def threat(self) -> Threat:
        """The norm and the radius of what it searches."""


def traits_of(attack: Attack) -> Traits:
    """What kind of an attack it is."""
    return attack.traits if isinstance(attack, Described) else Traits()


def fitted(attack: Attack, num_classes: int) -> Attack:
    """The attack for a model with so many classes."""
    return attack.fitted(num_classes) if isinstance(attack, Fitted) else attack


def frugal(attack: Attack) -> Attack:
    """The attack with a small budget, for where there is nothing to be found."""
    if isinstance(attack, Frugal):
        return attack.frugal()
    if isinstance(attack, Iterated):
        return attack.with_steps(min(attack.steps, FEW_STEPS), attack.step_size)
    return attack


def parts(component: object) -> list[object]:
    """An attack or a defense, its attack, and so on inwards."""
    inside = _inside(component)
    return [component] if inside is None else [component, *parts(inside)]


def states_threat(component: object) -> bool:
    """Whether it is known what radii the innermost attack has, or that it has none."""
    return isinstance(parts(component)[-1], Bounded | MultiBounded)


def threats(component: object) -> list[Threat]:
    """The threat models of an attack or a defense and of what is in it, from outside inwards.

    A part that searches several balls decides those of the parts inside of it.
    """
    stated = [part.threat for part in parts(component) if isinstance(part, Bounded)]
    several = several_threats(component)
    return [*several] or [threat for threat in stated if threat is not None]


def several_threats(component: object) -> tuple[Threat, ...]:
    """The threat models of the part that searches several balls; none if no part does."""
    found = (of_radii(part.threats) for part in parts(component) if isinstance(part, MultiBounded))
    return next(found, ())


def threat_of(attack: Attack) -> Threat | None:
    """The threat model of an attack, or of the one that it has inside; None where none is known."""
    return next(iter(threats(attack)), None)


def under(attack: T, threat: Threat) -> T:
    """A copy for another threat model of an attack that `states_threat`."""
    if isinstance(attack, Bounded):
        return attack.under(threat)
    inside = _inside(attack)
    assert inside is not None, "its threat model is not known"
    return with_attack(attack, under(inside, threat))


def with_threat(component: T, threat: Threat) -> T:
    """A copy of an attack or a defense in which every part that has a threat model has this one."""
    changed = component.under(threat) if isinstance(component, Bounded) else component
    inside = _inside(changed)
    return changed if inside is None else with_attack(changed, with_threat(inside, threat))


def with_attack(component: T, attack: Attack) -> T:
    """A copy of an `Attacking` component with another attack inside."""
    return cast(T, replace(cast(Any, component), attack=attack))


def _inside(component: object) -> Attack | None:
    can_be_replaced = isinstance(component, Attacking) and is_dataclass(component)
    return cast(Attacking, component).attack if can_be_replaced else None


class ThreatFields:
    """Base of a dataclass whose fields `norm` and `eps` are its threat model: it is `Bounded`."""

    norm: Norm
    eps: float

    @property
    def threat(self) -> Threat:
        """Norm and radius."""
        return Threat(self.norm, self.eps)

    def under(self, threat: Threat) -> Self:
        """A copy for another threat model."""
        return cast(Self, replace(cast(Any, self), norm=threat.norm, eps=threat.eps))


class StepsField:
    """Base of a dataclass with a field `steps` and no other say in their length: `Iterated`."""

    steps: int
    step_size: float | None = None

    def with_steps(self, steps: int, step_size: float | None = None) -> Self:
        """A copy with so many steps."""
        return cast(Self, replace(cast(Any, self), steps=steps))


class NoThreat:
    """Base of an attack or a defense that looks at no images but the given ones."""

    @property
    def threat(self) -> None:
        """None."""
        return

    def under(self, threat: Threat) -> Self:
        """Itself."""
        return self


# The modules of the attacks, which import this one, and are imported on first use.
_METHODS = {
    "APGD": "apgd",
    "ART": "art",
    "AdvLib": "advlib",
    "CarliniWagner": "carlini_wagner",
    "DDN": "ddn",
    "DecisionBased": "decision_based",
    "DeepFool": "deepfool",
    "FAB": "fab",
    "FGSM": "fgsm",
    "FMN": "fmn",
    "Foolbox": "foolbox",
    "FriendlyPGD": "friendly",
    "LBFGS": "lbfgs",
    "MIM": "mim",
    "MSD": "msd",
    "MaxOfNorms": "max_of_norms",
    "PGD": "pgd",
    "SoftmaxLinearisation": "softmax_linearisation",
    "Square": "square",
    "Torchattacks": "torchattacks",
    "Transfer": "transfer",
    "Uniform": "uniform",
}

if TYPE_CHECKING:
    from robusttrain.attacks.advlib import AdvLib
    from robusttrain.attacks.apgd import APGD
    from robusttrain.attacks.art import ART
    from robusttrain.attacks.carlini_wagner import CarliniWagner
    from robusttrain.attacks.ddn import DDN
    from robusttrain.attacks.decision_based import DecisionBased
    from robusttrain.attacks.deepfool import DeepFool
    from robusttrain.attacks.fab import FAB
    from robusttrain.attacks.fgsm import FGSM
    from robusttrain.attacks.fmn import FMN
    from robusttrain.attacks.foolbox import Foolbox
    from robusttrain.attacks.friendly import FriendlyPGD
    from robusttrain.attacks.lbfgs import LBFGS
    from robusttrain.attacks.max_of_norms import MaxOfNorms
    from robusttrain.attacks.mim import MIM
    from robusttrain.attacks.msd import MSD
    from robusttrain.attacks.pgd import PGD
    from robusttrain.attacks.softmax_linearisation import SoftmaxLinearisation
    from robusttrain.attacks.square import Square
    from robusttrain.attacks.torchattacks import Torchattacks
    from robusttrain.attacks.transfer import Transfer
    from robusttrain.attacks.uniform import Uniform
else:

    def __getattr__(name: str) -> object:
        """Import one of the attacks on first use."""
        if name not in _METHODS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_METHODS[name]}"), name)


__all__ = [
    "APGD",
    "ART",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "LBFGS",
    "MIM",
    "MSD",
    "PGD",
    "AdvLib",
    "Attack",
    "Attacking",
    "Bounded",
    "CarliniWagner",
    "DecisionBased",
    "DeepFool",
    "Described",
    "Fitted",
    "Foolbox",
    "FriendlyPGD",
    "Frugal",
    "Iterated",
    "Loss",
    "MaxOfNorms",
    "MultiBounded",
    "NoThreat",
    "ProbeAttack",
    "Restarted",
    "SoftmaxLinearisation",
    "Square",
    "StepsField",
    "ThreatFields",
    "Torchattacks",
    "Traits",
    "Transfer",
    "Uniform",
    "cross_entropy",
    "fitted",
    "frugal",
    "parts",
    "states_threat",
    "threat_of",
    "threats",
    "traits_of",
    "under",
    "with_attack",
]  # fmt: skip
