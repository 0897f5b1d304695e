"""The audit: signs that a robust accuracy is too good to be true.

Each check asks for something that holds for every honest evaluation (Athalye, Carlini and Wagner
2018; Carlini et al. 2019, "On evaluating adversarial robustness"), measures by how much it is
violated, and passes, warns or fails by thresholds that stand in the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robusttrain.attacks import (
    Attack,
    Restarted,
    fitted,
    frugal,
    states_threat,
    threat_of,
    traits_of,
    under,
)
from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.decision_based import DecisionBased
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode, frozen, predictions
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.attacks.uniform import Uniform
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.curves import Probe, over_draws, over_eps, over_steps
from robusttrain.evaluation.findings import Audit, Check, Verdict, graded
from robusttrain.evaluation.gradient_checks import GradientShares, gradient_shares
from robusttrain.evaluation.randomness import SHARE
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.noise.control import noise_held, noise_off
from robusttrain.noise.layer import predicts_randomly
from robusttrain.report.ledger import Ledger, Outcome, Row
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.threat import Norm, Threat

# At linf 0.5 a grey image is within reach of every image, so that nothing but luck is left.
UNBOUNDED = 0.5

# Queries of the black-box search, beside those of the evaluation.
SQUARE_QUERIES = 500

# Checks that had other names in earlier versions.
NON_FINITE_GRADIENTS, NON_FINITE_OUTPUTS = "non-finite gradients, %", "non-finite outputs, %"

MISLEADING_GRADIENTS = "misleading gradients, %"

# What passes and what warns, in percent and points, as planted and honest models are told apart
# (docs/maskings.md).
MISLEADING = 10, 30
BLACK_BOX = 2, 5
INSIDE = 2, 5

# The search that decides whether gradients are hidden from an image: targets, and steps for each.
TARGETS, TARGETED_STEPS = 9, 40

# Radii of smaller balls that are searched, as shares of the radius.
SMALLER = (0.5, 0.75)

# How many searches there are beside the one of the probe.
SEARCHES = 5


# Pieces of work that the progress bar counts: points of curves, and the other measurements.
PIECES, PIECES_OF_DRAWS, PIECES_OF_NOISE = 7 + 7 + 8, 4, 2


def pieces_of(subject: EvaluationSession) -> int:
    """How many of them an audit of `subject` takes."""
    declared = predicts_randomly(subject.model)
    return PIECES + PIECES_OF_DRAWS * subject.random + PIECES_OF_NOISE * declared


def audit(
    probe: Probe, suite: Mapping[str, Attack], ledger: Ledger, advance: Advance = unreported
) -> Audit:
    """Measure the curves and controls of a model, and check them against each other.

    Parameters
    ----------
    probe
        The gradient attack, on a part of the evaluated images. What it and the other searches of
        the audit find within its threat model is in its `searches`.
    suite, ledger
        The attacks of the evaluation and what they did. Those within the threat model of the probe
        are compared with it.
    advance
        Called after each of the `pieces_of` the subject.

    Accuracies in figures are in points, 0 to 100.
    """
    curve = [*over_eps(probe, advance), *over_steps(probe, advance)]
    by_eps, by_steps = (
        [100 * p.row.accuracy for p in curve if p.curve == name] for name in ("eps", "steps")
    )
    measured = _Measured(probe, probe.broken(probe.attack, "probe"), suite, ledger, advance)
    control = measured.control()
    controls = [control]
    checks = [
        measured.control_check(control),
        measured.weak("accuracy rises with eps by", _largest_rise(by_eps)),
        measured.weak("accuracy rises with steps by", _largest_rise(by_steps)),
        measured.weak("the last doubling of steps gains", by_steps[-2] - by_steps[-1]),
        measured.restarts(),
        measured.one_step(),
        measured.overrated(),
        measured.overlooked(),
    ]
    # What gradients have found, before anything else is tried.
    by_gradients = measured.by_gradients()
    hints = [measured.unbounded(), *measured.gradients(gradient_shares(probe))]
    # Where gradients may not be those of the outputs, labels are asked.
    suspicious = any(check.verdict is not Verdict.passed for check in [*checks, *hints])
    checks += [
        measured.random_noise(by_gradients),
        *hints,
        measured.inside(),
        measured.black_box(by_gradients, by_labels=suspicious and not probe.subject.random),
        _non_finite(ledger),
        *measured.outputs(),
    ]
    if probe.subject.random:
        draws = over_draws(probe, advance)
        curve += draws
        by_draws = [100 * point.row.accuracy for point in draws]
        gain = by_draws[-2] - by_draws[-1]
        checks.append(measured.draws(gain))
        # Undeclared noise cannot be switched off or held.
        if predicts_randomly(probe.subject.model):
            without = measured.without_noise()
            checks.append(measured.rests_on_noise(without[1:]))
            controls += without
        controls += [replace(p.row, attack=f"eot_{p.eot}") for p in draws]
    # The last one: by now all attacks have run.
    checks.append(_invalid(probe, ledger))
    threat = probe.attack.threat
    return Audit(controls, curve, [check._replace(threat=threat) for check in checks], (threat,))


@dataclass(frozen=True)
class _Measured:
    """Controls on the images of a probe, `attacked` being what the probe itself breaks.

    A search that finds less than it could is weak, and no more than a reason to warn: what others
    find counts in the worst case. Gradients are hidden where searches without them find more than
    all searches with them.
    """

    probe: Probe
    attacked: NDArray[np.bool_]
    suite: Mapping[str, Attack]
    ledger: Ledger
    advance: Advance

    def control(self) -> Row:
        """The suite at radius 0, with a small budget, scored on draws of its own."""
        broken = self.probe.wrong(draw="control")
        for name, attack in self.suite.items():
            threat = threat_of(attack)
            if states_threat(attack) and threat is not None:
                at_zero = frugal(under(attack, threat.at(0)))
                broken |= self.probe.broken(at_zero, f"control {name}", draw="control")
        self.advance(1)
        return Row.counted("control", self._threat.at(0), broken)

    def control_check(self, control: Row) -> Check:
        """Whether it is the clean accuracy, up to what fresh noise may do.

        Attacks of unknown radius cannot be tried at 0, and are named.
        """
        unknown = [name for name, attack in self.suite.items() if not states_threat(attack)]
        without = f" (without {', '.join(unknown)})" if unknown else ""
        clean = Row.counted("clean", self._threat.at(0), self.probe.wrong())
        gap = 100 * abs(clean.accuracy - control.accuracy)
        below, above = clean.accuracy - clean.ci_low, clean.ci_high - clean.accuracy
        allowed = 100 * max(below, above)
        says = f"suite at eps 0 differs from clean by{without}"
        return graded(says, gap, allowed, allowed)

    def restarts(self) -> Check:
        """Five searches are never weaker than one."""
        attack = self.probe.attack
        if isinstance(attack, Restarted):
            broken = self.probe.broken(attack.restarted(SEARCHES), "restarts")
        else:
            searches = range(SEARCHES)
            each = [self.probe.broken(attack, f"restarts {number}") for number in searches]
            broken = np.any(each, axis=0)
        self.advance(1)
        return self.weak("accuracy rises with restarts by", _left(broken) - self._standing_now)

    def one_step(self) -> Check:
        """Many steps beat one."""
        once = self._standing(FGSM(norm=self._threat.norm, eps=self._threat.eps), "one step")
        return self.weak("one step beats many by", self._standing_now - once)

    def overrated(self) -> Check:
        """What a plain search on the loss leaves standing that the suite breaks, of its images.

        PGD may converge, and to the same points from everywhere, where the loss is bent rather than
        flat: logit pairing does this (Mosbach et al. 2018). On PGD-AT it is a few points.
        """
        gap = self._standing_now - self._left_by_suite
        return graded("suite breaks more than the probe by", gap, max(20, 3 * self._image), np.inf)

    def overlooked(self) -> Check:
        """A suite is no weaker than a plain search on the loss, up to the luck of an image."""
        gap = self._left_by_suite - self._standing_now
        return graded(
            "probe breaks more than the suite by", gap, max(0.5, self._image),
            max(2, 3 * self._image),
        )  # fmt: skip

    def random_noise(self, by_gradients: NDArray[np.bool_]) -> Check:
        """Random noise of the same size breaks nothing that gradients do not."""
        noise = Uniform(norm=self._threat.norm, eps=self._threat.eps)
        only = self.probe.broken(noise, "random noise") & ~by_gradients
        self.advance(1)
        return graded(
            "random noise beats gradients by", 100 * float(only.mean()), max(0.5, self._image),
            max(2, 3 * self._image),
        )  # fmt: skip

    def unbounded(self) -> Check:
        """A grey image can be reached from all others, so no accuracy above chance is possible."""
        attack = PGD(
            norm=Norm.linf, eps=UNBOUNDED, steps=40, objective=AttackObjective.margin, restarts=2,
            stop_early=True,
        )  # fmt: skip
        left = self._standing(attack, "unbounded")
        chance = 100 / self.probe.subject.num_classes
        return graded("linf 0.5 leaves an accuracy of", left, chance, chance + 10)

    def gradients(self, shares: GradientShares) -> list[Check]:
        """Shares of images whose input gradient says nothing about the outputs."""
        self.advance(1)
        return [
            graded("gradients that are zero: %", shares.zero, 1, 10),
            graded(NON_FINITE_GRADIENTS, shares.non_finite, 0, 1),
            graded(MISLEADING_GRADIENTS, shares.misleading, *MISLEADING),
        ]

    def by_gradients(self) -> NDArray[np.bool_]:
        """Which images a search by gradients has broken within the threat model."""
        return self._broke(black_box=False) | self.probe.found

    def inside(self) -> Check:
        """What falls to searches of smaller balls only.

        Searches end at the edge of their ball, so that a model that is weak inside shows nothing.
        """
        at_edge = self._broke(black_box=False) | self.attacked
        only = np.zeros_like(at_edge)
        for share in SMALLER:
            smaller = self.probe.attack.under(self._threat.at(share * self._threat.eps))
            found = self.probe.broken(smaller, f"inside {share}", among=~at_edge & ~only)
            only |= found & ~at_edge
        self.advance(1)
        return graded("a smaller ball is weaker by", 100 * float(only.mean()), *INSIDE)

    def black_box(self, by_gradients: NDArray[np.bool_], *, by_labels: bool) -> Check:
        """What searches without gradients break that gradients do not, however they are followed.

        Attacks of the suite may be weak on the loss of an undertrained network without anything
        being hidden: a search for each other class decides.
        """
        norm, eps = self._threat.norm, self._threat.eps
        broken = self._broke(black_box=True)
        searches: dict[str, Attack] = {
            "black box": Square(norm=norm, eps=eps, queries=SQUARE_QUERIES)
        }
        if by_labels:
            searches["labels"] = DecisionBased(norm=norm, eps=eps)
        for name, search in searches.items():
            broken = broken | self.probe.broken(search, name, among=~by_gradients & ~broken)
        only = broken & ~by_gradients
        if only.any():
            targeted = fitted(
                APGD(
                    norm=self._threat.norm, eps=self._threat.eps, steps=TARGETED_STEPS,
                    objective=AttackObjective.margin, targets=TARGETS,
                ),
                self.probe.subject.num_classes,
            )  # fmt: skip
            only &= ~self.probe.broken(targeted, "targeted", among=only)
        self.advance(1)
        return graded("black box beats gradients by", 100 * float(only.mean()), *BLACK_BOX)

    def weak(self, check: str, figure: float) -> Check:
        """Pass up to five points, or three images where there are few of them; warn above.

        Searches from other random starts differ by an image or two without meaning anything.
        """
        return graded(check, figure, max(5, 3 * self._image), np.inf)

    def outputs(self) -> list[Check]:
        """What the outputs are, and what else than the image they depend on."""
        subject = self.probe.subject
        with subject.drawing("outputs"):
            return _outputs(subject.model, subject.x, subject.y)

    def without_noise(self) -> list[Row]:
        """Accuracy, clean and attacked, without the declared noise, and attacked with it fixed."""
        subject, attack = self.probe.subject, self.probe.attack
        with noise_off(subject.model):
            still = replace(self.probe, subject=replace(subject))
            clean, attacked = still.wrong(), still.broken(attack, "noise off")
        self.advance(1)
        with noise_held(subject.model, subject.seed):
            still = replace(self.probe, subject=replace(subject))
            fixed = still.broken(attack, "noise fixed")
        self.advance(1)
        return [
            Row.counted("noise_off", attack.threat.at(0), clean),
            Row.counted("noise_off_attacked", attack.threat, attacked),
            Row.counted("noise_fixed", attack.threat, fixed),
        ]

    def draws(self, gain: float) -> Check:
        """Of a random model a search with few draws is as good as one with many."""
        limits = max(1, 3 * self._image), max(3, 6 * self._image)
        return graded("80 instead of 20 draws gain", gain, *limits)

    def rests_on_noise(self, attacked: Sequence[Row]) -> Check:
        """What of the robustness is gone with the noise off or fixed: no fault, but to be named."""
        left = min(100 * row.accuracy for row in attacked)
        lost = self._standing_now - left
        return graded("accuracy lost with fixed or no noise", lost, 3, 100)

    @property
    def _threat(self) -> Threat:
        return self.probe.attack.threat

    @property
    def _image(self) -> float:
        """What an image of the probe counts, in points."""
        return 100 / len(self.attacked)

    @property
    def _standing_now(self) -> float:
        return _left(self.attacked)

    @property
    def _left_by_suite(self) -> float:
        return _left(self.ledger.worst_case(self._threat)[self.probe.rows])

    @property
    def _within(self) -> Mapping[str, Outcome]:
        return self.ledger.within(self._threat)

    def _broke(self, *, black_box: bool) -> NDArray[np.bool_]:
        """Which images the attacks of the suite broke that use no gradients, or use them."""
        broken = self.ledger.misclassified
        for name, outcome in self._within.items():
            # Besides the suite there are the probes of other threat models.
            if name in self.suite and traits_of(self.suite[name]).black_box is black_box:
                broken = broken | outcome.broke
        return broken[self.probe.rows]

    def _standing(self, attack: Attack, name: str) -> float:
        broken = self.probe.broken(attack, name)
        self.advance(1)
        return _left(broken)


def _non_finite(ledger: Ledger) -> Check:
    passes = sum(o.forward_passes + o.backward_passes for o in ledger.outcomes.values())
    met = sum(o.non_finite for o in ledger.outcomes.values())
    return graded(NON_FINITE_OUTPUTS, 100 * met / max(1, passes), 0, 1)


def _invalid(probe: Probe, ledger: Ledger) -> Check:
    """A point outside of its threat model is no adversarial image, whichever attack returns it."""
    count = sum(o.invalid for o in ledger.outcomes.values()) + probe.searches.invalid
    return graded("invalid adversarial images", count, 0, 0)


def _outputs(model: nn.Module, x: Tensor, y: Tensor) -> list[Check]:
    softmax, training = model_checks.softmax_outputs(model, x), model_checks.train_mode(model, x)
    return [
        graded("outputs that are probabilities: %", 100 * softmax.figure, 99, np.inf),
        graded(
            "undeclared draws change outputs by %",
            100 * training.figure, 100 * SHARE, 100 * SHARE,
        ),
        graded("BatchNorm modes differ by", _batchnorm_gap(model, x, y), 5, 20),
    ]  # fmt: skip


@torch.no_grad()
def _batchnorm_gap(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Points of clean accuracy that running statistics lose against those of the batch."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return 0.0
    accuracies = []
    for mode in (Mode.train, Mode.eval):
        with frozen(model, mode):
            accuracies.append(float((predictions(model(x)) == y).sum()) / len(x))
    return 100 * (accuracies[0] - accuracies[1])


def _left(broken: NDArray[np.bool_]) -> float:
    """Accuracy in points."""
    return 100 * float((~broken).mean())


def _largest_rise(accuracies: Sequence[float]) -> float:
    return max(0.0, *(later - earlier for earlier, later in pairwise(accuracies)))
