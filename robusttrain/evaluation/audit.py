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
    frugal,
    states_threat,
    threat_of,
    traits_of,
    under,
)
from robusttrain.attacks.attack_loss import Label, attack_loss, cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode, QueryCounter, frozen, predictions
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.square import Square
from robusttrain.attacks.uniform import Uniform
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.curves import Probe, over_draws, over_eps, over_steps
from robusttrain.evaluation.findings import Audit, Check, graded
from robusttrain.evaluation.randomness import SHARE
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.noise.control import noise_held, noise_off
from robusttrain.noise.layer import predicts_randomly
from robusttrain.report.ledger import Ledger, Row
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.threat import Norm
from robusttrain.threat.balls import ball

# At linf 0.5 a grey image is within reach of every image, so that nothing but luck is left.
UNBOUNDED = 0.5

# Queries of the black-box control where the evaluation itself has no Square.
SQUARE_QUERIES = 500

# How many searches there are beside the one of the probe.
SEARCHES = 5


# Pieces of work that the progress bar counts: points of curves, and the other measurements.
PIECES, PIECES_OF_DRAWS, PIECES_OF_NOISE = 7 + 7 + 7, 4, 2


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
        The gradient attack, on a part of the evaluated images.
    suite, ledger
        The attacks of the evaluation and what they did.
    advance
        Called after each of the `pieces_of` the subject.

    Accuracies in figures are in points, 0 to 100.
    """
    curve = [*over_eps(probe, advance), *over_steps(probe, advance)]
    by_eps, by_steps = (
        [100 * p.row.accuracy for p in curve if p.curve == name] for name in ("eps", "steps")
    )
    attacked = probe.broken(probe.attack, "probe")
    measured = _Measured(probe, attacked, advance)
    control = measured.control(suite)
    controls = [control]
    checks = [
        measured.control_check(control, suite),
        measured.compared("accuracy rises with eps by", _largest_rise(by_eps)),
        measured.compared("accuracy rises with steps by", _largest_rise(by_steps)),
        measured.compared("the last doubling of steps gains", by_steps[-2] - by_steps[-1]),
        measured.restarts(),
        measured.one_step(),
        measured.random_noise(),
        measured.unbounded(),
        measured.overrated(ledger),
        _black_box(probe, suite, ledger, advance),
        *measured.gradients(),
        _non_finite(ledger),
        *measured.outputs(),
    ]
    if probe.subject.random:
        draws = over_draws(probe, advance)
        curve += draws
        by_draws = [100 * point.row.accuracy for point in draws]
        gain = by_draws[-2] - by_draws[-1]
        checks.append(measured.compared("80 instead of 20 draws gain", gain))
        # Noise that nobody has declared cannot be switched off or held.
        if predicts_randomly(probe.subject.model):
            without = measured.without_noise()
            checks.append(measured.rests_on_noise(without[1:]))
            controls += without
        controls += [replace(p.row, attack=f"eot_{p.eot}") for p in draws]
    return Audit(controls, curve, checks)


@dataclass(frozen=True)
class _Measured:
    """Controls on the images of a probe, `attacked` being what the probe itself breaks."""

    probe: Probe
    attacked: NDArray[np.bool_]
    advance: Advance

    def control(self, suite: Mapping[str, Attack]) -> Row:
        """The suite at radius 0, with a small budget, scored on draws of its own."""
        broken = self.probe.wrong(draw="control")
        for name, attack in suite.items():
            threat = threat_of(attack)
            if states_threat(attack) and threat is not None:
                at_zero = frugal(under(attack, threat.at(0)))
                broken |= self.probe.broken(at_zero, f"control {name}", draw="control")
        self.advance(1)
        return Row.counted("control", self.probe.attack.threat.at(0), broken)

    def control_check(self, control: Row, suite: Mapping[str, Attack]) -> Check:
        """Whether it is the clean accuracy, up to what fresh noise may do.

        Attacks whose radius nobody knows cannot be tried at 0, and are named.
        """
        unknown = [name for name, attack in suite.items() if not states_threat(attack)]
        without = f" (without {', '.join(unknown)})" if unknown else ""
        clean = Row.counted("clean", self.probe.attack.threat.at(0), self.probe.wrong())
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
        return self.compared("accuracy rises with restarts by", _left(broken) - self._standing_now)

    def one_step(self) -> Check:
        """Many steps beat one."""
        threat = self.probe.attack.threat
        once = self._standing(FGSM(norm=threat.norm, eps=threat.eps), "one step")
        return graded("one step beats many by", self._standing_now - once, 0.5, 2)

    def random_noise(self) -> Check:
        """Gradients beat random noise of the same size."""
        threat = self.probe.attack.threat
        noise = self._standing(Uniform(norm=threat.norm, eps=threat.eps), "random noise")
        return graded("random noise beats gradients by", self._standing_now - noise, 0.5, 2)

    def unbounded(self) -> Check:
        """A grey image can be reached from all others, so no accuracy above chance is possible."""
        attack = PGD(
            norm=Norm.linf, eps=UNBOUNDED, steps=40, objective=AttackObjective.margin, restarts=2,
            stop_early=True,
        )  # fmt: skip
        left = self._standing(attack, "unbounded")
        chance = 100 / self.probe.subject.num_classes
        return graded("linf 0.5 leaves an accuracy of", left, chance, chance + 10)

    def overrated(self, ledger: Ledger) -> Check:
        """What a plain search on the loss leaves standing that the suite breaks, of its images.

        PGD may converge, and to the same points from everywhere, where the loss is bent rather than
        flat: logit pairing does this (Mosbach et al. 2018). On PGD-AT it is a few points.
        """
        left = 100 * float((~ledger.worst_case[self.probe.rows]).mean())
        image = 100 / len(self.attacked)
        gap = self._standing_now - left
        return graded(
            "suite breaks more than the probe by", gap, max(10, 3 * image), max(20, 6 * image)
        )

    def gradients(self) -> list[Check]:
        """Shares of images whose input gradient is zero, or not a number, at a random start."""
        subject, threat = self.probe.subject, self.probe.attack.threat
        generator = torch.Generator(subject.x.device).manual_seed(subject.seed)
        start = ball(threat).random_start(subject.x, generator)
        # At the image too: what masks gradients there may not do so next to it.
        with subject.drawing("gradients"):
            shares = [self._gradient_shares(x) for x in (subject.x, start)]
        self.advance(1)
        zero, wrong = (100 * max(share) for share in zip(*shares, strict=True))
        return [
            graded("gradients that are zero: %", zero, 1, 10),
            graded("gradients that are no numbers: %", wrong, 0, 1),
        ]

    def compared(self, check: str, figure: float) -> Check:
        """Pass up to a point, warn up to three, or as many images where there are few of them.

        Searches from other random starts differ by an image or two without meaning anything.
        """
        image = 100 / len(self.attacked)
        return graded(check, figure, max(1, 3 * image), max(3, 6 * image))

    def outputs(self) -> list[Check]:
        """What the outputs are, and what else than the image they hang on."""
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

    def rests_on_noise(self, attacked: Sequence[Row]) -> Check:
        """What of the robustness is gone with the noise off or fixed: no fault, but to be named."""
        left = min(100 * row.accuracy for row in attacked)
        lost = self._standing_now - left
        return graded("accuracy lost with fixed or no noise", lost, 3, 100)

    @property
    def _standing_now(self) -> float:
        return _left(self.attacked)

    def _standing(self, attack: Attack, name: str) -> float:
        broken = self.probe.broken(attack, name)
        self.advance(1)
        return _left(broken)

    def _gradient_shares(self, x: Tensor) -> tuple[float, float]:
        subject = self.probe.subject
        with frozen(subject.model):
            model = QueryCounter(subject.model, subject.batch_size)
            seen = attack_loss(model, x, subject.y, label=Label.given, loss=cross_entropy).evaluate(
                x
            )
        zero = (seen.gradient == 0).flatten(1).all(1) & seen.usable
        return float(zero.sum()) / len(x), float((~seen.usable).sum()) / len(x)


def _black_box(
    probe: Probe, suite: Mapping[str, Attack], ledger: Ledger, advance: Advance
) -> Check:
    """What a random search without gradients breaks of the images that gradients left standing."""
    says = "black box beats gradients by"
    advance(1)
    broke: dict[bool, list[NDArray[np.bool_]]] = {True: [], False: [ledger.misclassified]}
    for name, attack in suite.items():
        broke[traits_of(attack).black_box].append(ledger.outcomes[name].broke)
    if broke[True]:
        only = np.any(broke[True], axis=0) & ~np.any(broke[False], axis=0)
        return graded(says, 100 * float(only.mean()), 0.2, 5)
    attack, threat = probe.attack, probe.attack.threat
    square = Square(norm=threat.norm, eps=threat.eps, queries=SQUARE_QUERIES)
    longer = attack.with_steps(max(40, attack.steps), attack.step_size)
    by_gradients = probe.broken(longer, "white")
    more = probe.broken(square, "black box") & ~by_gradients
    return graded(says, 100 * float(more.mean()), 0.5, 5)


def _non_finite(ledger: Ledger) -> Check:
    passes = sum(o.forward_passes + o.backward_passes for o in ledger.outcomes.values())
    met = sum(o.non_finite for o in ledger.outcomes.values())
    return graded("passes that gave no numbers: %", 100 * met / max(1, passes), 0, 1)


def _outputs(model: nn.Module, x: Tensor, y: Tensor) -> list[Check]:
    softmax, training = model_checks.softmax_outputs(model, x), model_checks.train_mode(model, x)
    return [
        graded("outputs that are probabilities: %", 100 * softmax.figure, 99, 99),
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
