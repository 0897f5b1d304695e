"""What the user may set of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Self

import torch
from torch import Tensor

from robusttrain import ranges, seeding
from robusttrain.attacks import (
    Attack,
    ProbeAttack,
    fitted,
    several_threats,
    states_threat,
    threat_of,
    traits_of,
    under,
)
from robusttrain.errors import InputError
from robusttrain.report.ledger import CLEAN, OVER_SEVERAL, PROBE, RADII, UNION, WORST_CASE
from robusttrain.report.proofs import BRANCHING, ROWS, UNDECIDED
from robusttrain.threat import Threat, named

# Row names that attacks may not use.
RESERVED = (
    CLEAN, WORST_CASE, *OVER_SEVERAL, PROBE, RADII, "uint8", "control", "noise_off",
    "noise_off_attacked", "noise_fixed", "in_certificate", "verified", *ROWS.values(), UNDECIDED,
    BRANCHING,
)  # fmt: skip


RESERVED_START = "eot_", f"{PROBE}_", f"{RADII}_"


# Positions that a message names.
MOST_SHOWN = 5


# Small batches stay in a processor's cache; a GPU wants large ones.
CPU_BATCH, GPU_BATCH = 128, 512


@dataclass
class Certification:
    """CERTIFY (Cohen et al. 2019): n0 draws choose a class, n others prove how probable it is.

    Parameters
    ----------
    n0, n
        Draws of the two phases, 1 or more, and `n0` or more. If all `n` agree, their class has a
        probability above alpha^(1/n), which must be above 1/2 for a radius to follow: 10 draws or
        more with alpha .001. The largest radius that Gaussian noise can prove with alpha .001 is
        2.46 sigma with 1,000 draws and 3.20 sigma with 10,000.
    alpha
        Probability of a wrong certificate, in ]0, 1[.
    radii
        Where the curve of certified accuracy is read, in pixel units of the norm, 0 or more.
    attack_steps
        Steps of the attack inside of the certificates, 1 or more.
    """

    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    radii: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])
    attack_steps: int = 20

    def __post_init__(self) -> None:
        ranges.at_least(1, n0=self.n0, attack_steps=self.attack_steps)
        ranges.at_least(self.n0, n=self.n)
        ranges.inside(0, 1, alpha=self.alpha)
        least = math.floor(-math.log2(self.alpha)) + 1
        allowed = f"{least} or more with alpha={self.alpha}: fewer draws prove no radius"
        ranges.require(self.n >= least, "n", self.n, allowed)
        ranges.require(bool(self.radii), "radii", self.radii, "one radius or more")
        for radius in self.radii:
            ranges.at_least(0, radii=radius)


class Bounds(Enum):
    """Which bounds are computed; each kind includes those before it."""

    intervals = "interval arithmetic"
    linear = "linear bounds (CROWN)"
    optimised = "linear bounds with optimised slopes (alpha-CROWN)"


@dataclass
class Verification:
    """Proofs for the images that attacks leave standing, by the cheapest methods first.

    Parameters
    ----------
    bounds
        Which bounds are computed.
    branching
        Whether branch and bound searches for a proof or a counterexample where bounds prove
        nothing.
    seconds
        The time of linear bounds and branching for an image, above 0. A step that has begun is
        completed.
    steps
        Steps that optimise the slopes of linear bounds, 1 or more.
    """

    bounds: Bounds = Bounds.optimised
    branching: bool = True
    seconds: float = 60.0
    steps: int = 20

    def __post_init__(self) -> None:
        ranges.above(0, seconds=self.seconds)
        ranges.count(steps=self.steps)

    def unused(self) -> dict[str, str]:
        """The steps of slopes that are not optimised, and the time of intervals."""
        steps = {} if self.bounds is Bounds.optimised else {"steps": "bounds"}
        timed = self.branching or self.bounds is not Bounds.intervals
        return steps if timed else steps | {"seconds": "bounds"}


@dataclass
class Radii:
    """The radius of each image: between the largest proven one and the smallest that breaks it.

    Parameters
    ----------
    largest
        How far is searched, as a multiple of eps, 1 or more; in linf at most to radius 1.
    resolution
        How many levels there are up to eps, 1 or more. The suite searches down to the first level
        that it does not break, and bounds prove levels.
    attacks
        Attacks that look for the smallest perturbation, by their names. A model that draws noise
        when it predicts is searched by the suite alone.
    """

    largest: float = 4.0
    resolution: int = 8
    attacks: Mapping[str, Attack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges.at_least(1, largest=self.largest)
        ranges.count(resolution=self.resolution)
        for name, attack in self.attacks.items():
            fit = traits_of(attack).walks_boundary and threat_of(attack) is not None
            allowed = "an attack that looks for the smallest perturbation, with a threat model"
            ranges.require(fit, f"attacks.{name}", type(attack).__name__, allowed)

    def refuse_threats(self, threats: Sequence[Threat]) -> None:
        """Raise `InputError` if a radius is 0, or an attack has no form for a norm."""
        for threat in threats:
            key = "eps" if len(threats) == 1 else f"threats.{threat.norm}"
            allowed = "above 0 with evaluation.radii, whose levels are multiples of it"
            ranges.require(threat.eps > 0, key, threat.eps, allowed)
            for name, attack in self.attacks.items():
                _under(f"radii.attacks.{name}", attack, threat)


@dataclass
class Evaluation:
    """How a model is evaluated.

    Parameters
    ----------
    attacks
        The attacks by the names of their rows, in the order in which they run.
    survivors_only
        Whether an attack runs on the images that all before it left standing, as in AutoAttack, so
        that its row shows what is left after it; otherwise each runs on every image that is
        classified correctly, and its row stands for itself.
    union_only
        The same across several threat models: an attack runs on what all before it left standing
        under any of them. That is the cheapest way to the row `union`. The worst case of each
        threat model stays empty, and there is no audit.
    samples
        How many test images; all of them where not given. The choice does not depend on the seed,
        so that runs can be paired. It has no effect with `indices` or `first`.
    indices
        Exactly these test images, by their positions in the data set as published, which are the
        column `index` of `samples.csv`. In Python they are positions in the given images.
    first
        That many test images, the first ones in the order of the data set as published.
    batch_size
        Most images in one pass, 1 or more; 128 on a CPU and 512 elsewhere where not given.
    eot, votes
        For a model that draws noise when it predicts: draws that an attack averages its gradient
        over (expectation over transformation, Athalye et al. 2018), and fresh draws whose mean
        softmax is the prediction.
    probe
        The gradient attack behind the curves and the audit, which need one with a threat model and
        steps: `Bounded` and `Iterated`.
    probe_samples
        How many of the images the probe is tried on; all of them where not given.
    audit
        Whether to measure accuracy over eps and steps, and to check with them whether the figures
        can be believed.
    verify
        Whether to count the images for which interval bounds prove that nothing within linf `eps`
        changes what the model predicts. It is the short form of a `verification` by intervals
        alone.
    save_adversarial
        Whether to keep the attacked images, in `adversarial.npz`.
    strict
        Whether the exit code is 3 if the audit fails, or if training got stuck, overfitted
        catastrophically, leaked labels or skipped steps.
    require
        Least accuracies, as shares from 0 to 1: of `clean`, of `worst_case` (in each threat model),
        of `union`, or of an attack by its name. The exit code is 3 if one is lower.
    baseline
        A finished run on the same images. The exit code is 3 if an accuracy is lower than there by
        more than `tolerance`.
    tolerance
        By how much an accuracy may be lower than that of `baseline`, as a share from 0 to 1.
    certification
        How radii are certified, if they are: the model then predicts by the majority of its draws,
        whether or not its noise is meant for prediction.
    radii
        How the radius of each image is searched, if it is.
    verification
        How proofs are searched for, if they are: each image gets a status. Of several threat models
        it is for that in linf, or else the first.
    """

    attacks: Mapping[str, Attack] = field(default_factory=dict)
    survivors_only: bool = False
    union_only: bool = False
    samples: int | None = None
    indices: list[int] | None = None
    first: int | None = None
    batch_size: int | None = None
    eot: int = 20
    votes: int = 50
    probe: ProbeAttack | None = None
    probe_samples: int | None = 200
    audit: bool = False
    verify: bool = False
    save_adversarial: bool = False
    strict: bool = False
    require: Mapping[str, float] = field(default_factory=dict)
    baseline: str | None = None
    tolerance: float = 0.01
    certification: Certification | None = None
    radii: Radii | None = None
    verification: Verification | None = None

    def __post_init__(self) -> None:
        ranges.at_least(1, eot=self.eot, votes=self.votes)
        for key in ("samples", "first", "batch_size", "probe_samples"):
            value = getattr(self, key)
            if value is not None:
                ranges.count(**{key: value})
        if self.indices is not None:
            self._check_indices(self.indices)
        ranges.require(
            self.probe is not None or not self.audit,
            "probe",
            None,
            "an attack (+attack@evaluation.probe=pgd20) where audit=true",
        )
        if self.probe is not None:
            fit = isinstance(self.probe, ProbeAttack) and threat_of(self.probe) is not None
            allowed = "an attack with a threat model and steps (Bounded and Iterated)"
            ranges.require(fit, "probe", type(self.probe).__name__, allowed)
        several = [name for name, a in self.attacks.items() if several_threats(a)]
        ranges.require(
            not several, "attacks", ", ".join(several),
            "attacks of one threat model: those of several are for training",
        )  # fmt: skip
        allowed = "false with union_only: it looks at each threat model"
        ranges.require(not (self.audit and self.union_only), "audit", True, allowed)
        allowed = "false with radii, which are of one threat model each"
        ranges.require(self.radii is None or not self.union_only, "union_only", True, allowed)
        allowed = "left out with verify or verification: what they break has no part in radii"
        together = self.radii is None or (not self.verify and self.verification is None)
        ranges.require(together, "radii", type(self.radii).__name__, allowed)
        allowed = "false with certification, whose votes of noisy draws have no such bounds"
        ranges.require(self.certification is None or not self.verify, "verify", True, allowed)
        both = self.verification is not None and self.certification is not None
        allowed = "left out with certification, whose votes of noisy draws have no such bounds"
        ranges.require(not both, "verification", "{...}", allowed)
        allowed = "false with verification, which includes it"
        ranges.require(self.verification is None or not self.verify, "verify", True, allowed)
        started = [f"{start}..." for start in RESERVED_START]
        allowed = f"named otherwise: reports have rows {', '.join([*RESERVED, *started])}"
        for name in self.attacks:
            free = name not in RESERVED and not name.startswith(RESERVED_START)
            ranges.require(free, "attacks", name, allowed)

        ranges.within(0, 1, tolerance=self.tolerance)
        for name, least in self.require.items():
            ranges.within(0, 1, **{f"require.{name}": least})

    @property
    def proofs(self) -> Verification | None:
        """How proofs are searched for, also in the short form."""
        return Verification(Bounds.intervals, branching=False) if self.verify else self.verification

    def refuse_unknown_figures(self) -> None:
        """Raise `InputError` if `require` names no row of an accuracy that the report will have."""
        for name, least in self.require.items():
            allowed = f"one of {', '.join(self.figures)}"
            ranges.require(name in self.figures, f"evaluation.require.{name}", least, allowed)

    @property
    def figures(self) -> tuple[str, ...]:
        """The rows of the report that something may be required of.

        There is a union if there are several threat models, also of attacks that do not state one.
        """
        threats = {threat_of(attack) for attack in self.attacks.values()}
        worst = [] if self.union_only else [WORST_CASE]
        union = [UNION] if len(threats) > 1 else []
        return (CLEAN, *worst, *union, *self.attacks)

    def under_each(self, threat: Threat, threats: Sequence[Threat]) -> Self:
        """The same settings, with each attack of one threat model run under several.

        Parameters
        ----------
        threat
            The threat model of the attacks that are repeated; others stay as they are.
        threats
            The threat models, of different norms. An attack `pgd` becomes `pgd_linf` and so on.

        Raises
        ------
        InputError
            If an attack has no form for one of the norms, or two attacks get the same name; or if
            radii are searched, and one of `threats` has the radius 0.
        """
        allowed = "false with a single threat model"
        single = len(threats) == 1
        if self.radii is not None:
            self.radii.refuse_threats(threats)
        ranges.require(not (single and self.union_only), "evaluation.union_only", True, allowed)
        if single:
            return self
        repeated = {name: a for name, a in self.attacks.items() if _is_under(a, threat)}
        expanded = {
            named(name, each, len(threats)): _under(f"attacks.{name}", attack, each)
            for each in threats
            for name, attack in repeated.items()
        }
        others = {name: a for name, a in self.attacks.items() if name not in repeated}
        for name in others:
            allowed = f"named otherwise: there is {name} under another threat model"
            ranges.require(name not in expanded, "evaluation.attacks", name, allowed)
        return replace(self, attacks=expanded | others)

    def probes(self, threat: Threat, threats: Sequence[Threat]) -> list[ProbeAttack]:
        """The probe of an audit under each of `threats`, unless it has another one than `threat`.

        There is none without an audit.
        """
        if not self.audit or self.probe is None:
            return []
        if self.probe.threat != threat:
            return [self.probe]
        return [under(self.probe, each) for each in threats]

    def unused(self) -> dict[str, str]:
        """The probe without an audit, the tolerance without a baseline, and `samples`."""
        probe = {} if self.audit else {"probe": "audit", "probe_samples": "audit"}
        tolerance = {} if self.baseline else {"tolerance": "baseline"}
        tolerance |= {"survivors_only": "union_only"} if self.union_only else {}
        chosen = next((key for key in ("indices", "first") if getattr(self, key) is not None), None)
        return probe | tolerance | ({"samples": chosen} if chosen else {})

    def located(self, positions: Tensor) -> Self:
        """The same settings, with `indices` and `first` as rows of a test set.

        Parameters
        ----------
        positions
            The position of each image of the test set in the data set as published, int64 (N,).

        Raises
        ------
        InputError
            If `indices` has other positions, or `first` is larger than N.
        """
        if self.indices is None and self.first is None:
            return self
        return replace(self, indices=self._rows(positions).tolist(), first=None)

    def choose(self, size: int) -> Tensor:
        """Positions of the images to evaluate in a split of `size`, in increasing order.

        Raises
        ------
        InputError
            If `indices` or `first` has other images.
        """
        if self.indices is not None or self.first is not None:
            return self._rows(torch.arange(size))
        if self.samples is None or self.samples >= size:
            return torch.arange(size)
        order = torch.randperm(size, generator=seeding.generator_for(0, "evaluated samples"))
        return order[: self.samples].sort().values

    def _check_indices(self, indices: Sequence[int]) -> None:
        ranges.require(self.first is None, "first", self.first, "left out where indices are given")
        different = len(set(indices)) == len(indices)
        fits = bool(indices) and different and min(indices) >= 0
        allowed = "one or more different positions, each 0 or more"
        ranges.require(fits, "indices", _shown(indices), allowed)

    def _rows(self, positions: Tensor) -> Tensor:
        """The rows of the images that `indices` or `first` choose, in increasing order."""
        if self.indices is None:
            count, allowed = self.first or 0, f"at most {len(positions)}, as there are test images"
            ranges.require(count <= len(positions), "evaluation.first", count, allowed)
            return positions.argsort()[:count].sort().values
        rows = {position: row for row, position in enumerate(positions.tolist())}
        others = [index for index in self.indices if index not in rows]
        if others:
            problem = f"has positions without a test image, {_shown(others)}"
            key, given = "evaluation.indices", _shown(self.indices)
            raise InputError(key, given, _range(positions), problem)
        return torch.tensor(sorted(rows[index] for index in self.indices))

    def at_once(self, device: torch.device) -> int:
        """How many images go through a model on `device` together."""
        return self.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)

    def probed(self, count: int) -> Tensor:
        """Positions among `count` evaluated images that the probe is tried on, evenly spread."""
        wanted = min(count, self.probe_samples or count)
        return torch.arange(wanted) * count // max(1, wanted)

    def suite(self, num_classes: int, random: bool) -> dict[str, Attack]:
        """The attacks, fitted to the number of classes; one that had to change says so by name.

        Attacks that walk along the decision boundary are left out for a random model, which has
        none to be seen.
        """
        suite: dict[str, Attack] = {}
        for name, attack in self.attacks.items():
            if random and traits_of(attack).walks_boundary:
                continue
            changed = fitted(attack, num_classes)
            changes = differences(attack, changed).items()
            suite[" ".join([name, *(f"{key}={new}" for key, (_, new) in changes)])] = changed
        return suite


def _is_under(attack: Attack, threat: Threat) -> bool:
    return states_threat(attack) and threat_of(attack) == threat


def _under(key: str, attack: Attack, threat: Threat) -> Attack:
    try:
        return under(attack, threat)
    except InputError as error:
        raise error.under(f"evaluation.{key}") from error


def _shown(indices: Sequence[int]) -> str:
    rest = ", ..." if len(indices) > MOST_SHOWN else ""
    return f"[{', '.join(map(str, indices[:MOST_SHOWN]))}{rest}]"


def _range(positions: Tensor) -> str:
    """Which positions there are, in words."""
    count, last = len(positions), int(positions.max())
    if last == count - 1:
        return f"the {count} test images are at 0 to {last}"
    return (
        f"the {count} test images are at some of 0 to {last}, "
        f"which are the column index of a samples.csv of all of them"
    )


def differences(attack: Attack, fitted: Attack) -> dict[str, tuple[object, object]]:
    """The settings that changed, as (before, after) by their keys."""
    if attack == fitted:
        return {}
    before, after = vars(attack), vars(fitted)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}
