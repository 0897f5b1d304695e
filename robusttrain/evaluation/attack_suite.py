"""Clean and adversarial accuracy of a model on a split."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain import ranges, seeding
from robusttrain.attacks import Attack
from robusttrain.attacks.base import BallAttack
from robusttrain.attacks.carlini_wagner import CarliniWagner
from robusttrain.attacks.deepfool import DeepFool
from robusttrain.attacks.fab import FAB
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Samples, as_input
from robusttrain.evaluation.certification import Certification
from robusttrain.evaluation.session import Crafted, Seen, Subject
from robusttrain.models.modes import modes_restored
from robusttrain.report.ledger import Ledger, Outcome, Row
from robusttrain.runtime.progress import SILENT, Progress
from robusttrain.threat import Norm, ball

# Rows that a report has beside those of its attacks.
RESERVED = (
    "clean", "worst_case", "uint8", "control", "noise_off", "noise_off_attacked",
    "noise_fixed", "in_certificate", "verified",
)  # fmt: skip
RESERVED_START = "eot_"

# Small batches stay in a processor's cache; a GPU wants large ones.
CPU_BATCH, GPU_BATCH = 128, 512

ALONG_THE_BOUNDARY = (FAB, DeepFool, CarliniWagner)


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
    samples
        How many test images; all of them where not given. The choice does not depend on the seed,
        so that runs can be paired.
    batch_size
        Most images in one pass, 1 or more; 128 on a CPU and 512 elsewhere where not given.
    eot, votes
        For a model that draws noise when it predicts: draws that an attack averages its gradient
        over (expectation over transformation, Athalye et al. 2018), and fresh draws whose mean
        softmax is the prediction.
    probe
        The gradient attack behind the curves and the audit, which need one.
    probe_samples
        How many of the images the probe is tried on; all of them where not given.
    audit
        Whether to measure accuracy over eps and steps, and to check with them whether the figures
        can be believed.
    verify
        Whether to count the images for which interval bounds prove that nothing within linf `eps`
        changes what the model predicts.
    save_adversarial
        Whether to keep the attacked images, in `adversarial.npz`.
    certification
        How radii are certified, if they are: the model then predicts by the majority of its draws,
        whether or not its noise is meant for prediction.
    """

    attacks: Mapping[str, Attack] = field(default_factory=dict)
    survivors_only: bool = False
    samples: int | None = None
    batch_size: int | None = None
    eot: int = 20
    votes: int = 50
    probe: PGD | None = None
    probe_samples: int | None = 200
    audit: bool = False
    verify: bool = False
    save_adversarial: bool = False
    certification: Certification | None = None

    def __post_init__(self) -> None:
        ranges.at_least(1, eot=self.eot, votes=self.votes)
        for key in ("samples", "batch_size", "probe_samples"):
            value = getattr(self, key)
            if value is not None:
                ranges.at_least(1, **{key: value})
        ranges.require(
            self.probe is not None or not self.audit,
            "probe",
            None,
            "an attack (+attack@evaluation.probe=pgd20) where audit=true",
        )
        allowed = "false with certification, whose votes of noisy draws have no such bounds"
        ranges.require(self.certification is None or not self.verify, "verify", True, allowed)
        for name in self.attacks:
            ranges.require(
                name not in RESERVED and not name.startswith(RESERVED_START), "attacks", name,
                f"named otherwise: reports have rows {', '.join(RESERVED)}, {RESERVED_START}...",
            )  # fmt: skip

    def choose(self, size: int) -> Tensor:
        """Positions of the images to evaluate in a split of `size`, in increasing order."""
        if self.samples is None or self.samples >= size:
            return torch.arange(size)
        order = torch.randperm(size, generator=seeding.stream(0, "evaluated samples"))
        return order[: self.samples].sort().values

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
        fitted: dict[str, Attack] = {}
        for name, attack in self.attacks.items():
            if random and isinstance(attack, ALONG_THE_BOUNDARY):
                continue
            changed = attack.fitted(num_classes) if isinstance(attack, BallAttack) else attack
            fitted[" ".join([name, *_differences(attack, changed)])] = changed
        return fitted


def examine(
    model: nn.Module, samples: Samples, settings: Evaluation, seed: int
) -> tuple[NDArray[np.int64], Subject]:
    """The positions of the images to evaluate, and the subject of the evaluation."""
    rows = settings.choose(samples.size)
    images, y = samples.take(rows).loaded()
    how = settings.at_once(images.device), settings.eot, settings.votes
    return rows.numpy(), Subject(model, as_input(images), y, *how, seed)


def evaluate(
    model: nn.Module,
    samples: Samples,
    settings: Evaluation,
    *,
    norm: Norm,
    eps: float,
    seed: int,
    progress: Progress = SILENT,
) -> Ledger:
    """Attack `model` on the chosen images of `samples`; see `attack_all`.

    Mode and noise streams of the model are left as they were.
    """
    with modes_restored(model):
        model.eval()
        index, subject = examine(model, samples, settings, seed)
        suite = settings.suite(subject.num_classes, subject.random)
        return attack_all(
            subject, index, suite, settings.survivors_only, norm=norm, eps=eps, progress=progress
        )


def attack_all(
    subject: Subject,
    index: NDArray[np.int64],
    suite: Mapping[str, Attack],
    survivors_only: bool,
    *,
    norm: Norm,
    eps: float,
    progress: Progress = SILENT,
) -> Ledger:
    """Run the attacks of `suite` on the images of `subject` and score them on fresh passes.

    `index` says where in the test set the images are; for `survivors_only` see `Evaluation`.
    An image that is misclassified by itself counts as broken by every attack and costs no attack.
    A model that predicts at random is scored, clean or attacked, on the same draws for the same
    image; attacks see other draws. An attack that changes nothing therefore breaks nothing, and
    several attacks have no more luck than one. `norm` and `eps` are stated for attacks that have
    none of their own; `progress` advances once an image and attack.
    """
    started = time.perf_counter()
    clean = subject.look(subject.x)
    ledger = Ledger(
        index=index,
        label=subject.y.cpu().numpy(),
        prediction=clean.prediction,
        margin=clean.margin,
        seconds=time.perf_counter() - started,
    )
    worst = _Worst(subject, clean)
    for name, attack in suite.items():
        progress.show(name)
        threat = Norm(getattr(attack, "norm", norm)), float(getattr(attack, "eps", eps))
        fallen = ledger.worst_case if survivors_only else ledger.misclassified
        progress.advance(int(fallen.sum()))
        started = time.perf_counter()
        crafted = subject.attacked(attack, np.flatnonzero(~fallen), name, advance=progress.advance)
        seen = subject.look(crafted.x_adv)
        seconds = time.perf_counter() - started
        ledger.outcomes[name] = _outcome(subject, crafted, seen, fallen, threat, seconds)
        worst.offer(crafted.x_adv, seen)
    ledger.adversarial = worst.x_adv.cpu().numpy()
    return ledger


def rounded(subject: Subject, ledger: Ledger, norm: Norm) -> list[Row]:
    """The row `uint8`: accuracy on the attacked images when they are rounded to bytes."""
    if ledger.adversarial is None:
        return []
    images = torch.from_numpy(ledger.adversarial).to(subject.x)
    seen = subject.look((images * 255).round() / 255)
    broken = np.not_equal(seen.prediction, ledger.label)
    return [Row.counted("uint8", norm, ledger.largest_eps, np.asarray(broken))]


def _outcome(
    subject: Subject,
    crafted: Crafted,
    seen: Seen,
    fallen: NDArray[np.bool_],
    threat: tuple[Norm, float],
    seconds: float,
) -> Outcome:
    norm, eps = threat
    return Outcome(
        norm=norm,
        eps=eps,
        broken=np.not_equal(seen.prediction, subject.y.cpu().numpy()) | fallen,
        margin=seen.margin,
        size=ball(norm, 0).size(crafted.x_adv - subject.x).cpu().numpy(),
        seconds=seconds,
        attacked=~fallen,
        forward_passes=crafted.forward_passes,
        backward_passes=crafted.backward_passes,
        non_finite=crafted.non_finite,
    )


class _Worst:
    """For each image the first point that broke it, or else the one of smallest margin."""

    def __init__(self, subject: Subject, clean: Seen) -> None:
        self.x_adv, self.margin = subject.x.clone(), clean.margin.copy()
        self.label = subject.y.cpu().numpy()
        self.broken = np.not_equal(clean.prediction, self.label)

    def offer(self, x_adv: Tensor, seen: Seen) -> None:
        """Take up the points of one more attack."""
        broken = np.not_equal(seen.prediction, self.label)
        worse = ~self.broken & (broken | (seen.margin < self.margin))
        self.x_adv[worse] = x_adv[worse]
        self.margin[worse] = seen.margin[worse]
        self.broken |= broken


def _differences(attack: Attack, fitted: Attack) -> list[str]:
    """The settings that changed, as key=value."""
    if attack == fitted:
        return []
    before, after = vars(attack), vars(fitted)
    return [f"{key}={after[key]}" for key in after if before[key] != after[key]]
