"""Certified radii of smoothed classifiers (Cohen, Rosenfeld and Kolter 2019), and attacks on them.

The classifier is g(x) = argmax_c P(f(x + noise) = c). A certificate says that no perturbation
shorter than its radius changes g(x), and is wrong with probability `alpha` at most.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain.attacks.model_view import predictions
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.attacks.pgd import PGD
from robusttrain.errors import InputError
from robusttrain.evaluation.findings import Audit, Check, graded
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.evaluation.settings import Certification
from robusttrain.evaluation.voting import MajorityVote, votes_to_decide
from robusttrain.noise.additive import AdditiveLayer, AdditiveNoise, Certificate
from robusttrain.noise.layer import noise_layers
from robusttrain.noise.placement import INPUT
from robusttrain.report.ledger import Point, Row
from robusttrain.runtime import distributed
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.threat import Threat

# Certified images are attacked in so many groups of similar radii.
GROUPS = 4

# An attack stays that much inside of the smallest radius of its group.
INSIDE = 1 - 1e-3

# Votes at an attacked image, or more, and how many times as many as would decide if all agreed:
# from too few of them every image would be abstained from, and nothing would ever break.
VOTES, TIMES_DECISIVE = 100, 2

# How many successes inside of certificates luck explains with this probability.
BELIEVABLE = 0.999


@dataclass(frozen=True)
class Certified:
    """A row of `certified.csv`.

    `predicted` is the class that n0 draws chose. Where `abstained`, n more could not prove it to be
    the most probable one, and the radius is 0. The radius is in pixel units.
    """

    index: int
    label: int
    predicted: int
    radius: float
    abstained: bool
    seconds: float

    def holds(self, radius: float) -> bool:
        """Whether the image is proven to be classified correctly within `radius`."""
        return not self.abstained and self.predicted == self.label and self.radius >= radius


class Certificates(NamedTuple):
    """Certified images, what certifies them, and what the report says of them."""

    images: list[Certified]
    theorem: Certificate
    audit: Audit


def certifiable(model: nn.Module) -> AdditiveNoise:
    """The noise of `model` that certificates are about.

    Raises
    ------
    InputError
        If it is not one noise at the input, of a kind for which radii can be proven.
    """
    layers = noise_layers(model)
    noise = layers[0].noise if len(layers) == 1 and isinstance(layers[0], AdditiveLayer) else None
    known = noise is not None and noise.at == INPUT and noise.certificate is not None
    if noise is None or not known or noise.sigma == 0:
        problem = (
            "needs one noise at the input, gaussian (l2), laplace or uniform (l1), with sigma "
            "above 0"
        )
        allowed = "give noise=smoothing noise.sigma=..."
        raise InputError("certification", allowed=allowed, problem=problem)
    return noise


def certify(
    subject: EvaluationSession,
    index: NDArray[np.int64],
    settings: Certification,
    advance: Advance = unreported,
) -> Certificates:
    """Certify the images of `subject`, then attack its smoothed classifier within the radii.

    Every image has draws of its own, whatever images are certified beside it. `advance` is called
    with 1 for each image, and with 1 for each group that is attacked. Several processes divide
    images and groups, and know of all in the end.
    """
    noise = certifiable(subject.model)
    theorem = noise.certificate
    assert theorem is not None
    own = []
    for position, place in list(enumerate(index.tolist()))[distributed.share(len(index))]:
        own.append((position, _certified(subject, position, place, settings, noise)))
        advance(1)
    images = list(dict(sorted(chain.from_iterable(distributed.all_gather(own)))).values())
    curve = [_point(images, theorem, radius) for radius in settings.radii]
    within, check = _attacked(subject, images, settings, theorem, advance)
    return Certificates(images, theorem, Audit(within, curve, [check]))


def lower_bound(count: int, n: int, alpha: float) -> float:
    """The p that a binomial probability exceeds with confidence 1 - alpha (Clopper-Pearson)."""
    # Imported here, since few runs need it and it takes long.
    from scipy.special import betaincinv

    # By alpha itself: of a small one nothing is left in a level of confidence 1 - alpha.
    return float(betaincinv(count, n - count + 1, alpha)) if count else 0.0


def _certified(
    subject: EvaluationSession,
    position: int,
    index: int,
    settings: Certification,
    noise: AdditiveNoise,
) -> Certified:
    key = f"certificate {index}"
    known = subject.saved.get(key)
    if known is not None:
        return Certified(**known)
    started = time.perf_counter()
    with subject.drawing(key):
        x = subject.x[position]
        predicted = int(_votes(subject, x, settings.n0).argmax())
        count = int(_votes(subject, x, settings.n)[predicted])
    probability = lower_bound(count, settings.n, settings.alpha)
    abstained = probability <= 0.5
    radius = 0.0 if abstained else noise.radius(probability)
    seconds = time.perf_counter() - started
    label = int(subject.y[position])
    certified = Certified(index, label, predicted, radius, abstained, seconds)
    subject.saved.put(key, asdict(certified))
    return certified


@torch.no_grad()
def _votes(subject: EvaluationSession, x: Tensor, draws: int) -> Tensor:
    """How many of the draws each class wins, (K,)."""
    votes = torch.zeros(subject.num_classes + 1, dtype=torch.int64, device=x.device)
    for size in _batches(draws, subject.batch_size):
        won = predictions(subject.model(x.expand(size, *x.shape)))
        votes += (won + 1).bincount(minlength=len(votes))
    # Class -1 marks non-finite logits; drop its votes.
    return votes[1:]


def _batches(draws: int, size: int) -> Iterator[int]:
    for start in range(0, draws, size):
        yield min(size, draws - start)


def _point(images: Sequence[Certified], theorem: Certificate, radius: float) -> Point:
    """The share of images that are certified at `radius`."""
    not_certified = np.array([not image.holds(radius) for image in images])
    counted = Row.counted("certified", Threat(theorem.norm, radius), not_certified)
    return Point("certified", None, None, counted)


def _attacked(
    subject: EvaluationSession,
    images: Sequence[Certified],
    settings: Certification,
    theorem: Certificate,
    advance: Advance,
) -> tuple[list[Row], Check]:
    """The row and the check of attacks inside of certificates, of which none may succeed."""
    radii = np.array([0.0 if image.abstained else image.radius for image in images])
    held = np.flatnonzero(radii > 0)
    groups = np.array_split(held[np.argsort(radii[held])], GROUPS)
    broken = np.zeros(len(images), dtype=bool)
    for number, rows in list(enumerate(groups))[distributed.share(GROUPS)]:
        if len(rows):
            part = _as_predicted(subject, images, rows)
            threat = Threat(theorem.norm, float(radii[rows].min()) * INSIDE)
            broken[rows] = _broken(part, settings, threat, number)
        advance(1)
    broken = np.any(distributed.all_gather(broken), axis=0)
    count = int(broken.sum())
    # Imported here, since few runs need it and it takes a second.
    from scipy.stats import binom

    # Both a certificate and the vote at the attacked image may be wrong.
    wrong = min(1.0, 2 * settings.alpha)
    allowed = float(binom.ppf(BELIEVABLE, len(held), wrong)) if len(held) else 0.0
    check = graded("certificates broken by an attack", count, 0, allowed)
    if not len(held):
        return [], check
    smallest = Threat(theorem.norm, float(radii[held].min()))
    return [Row.counted("in_certificate", smallest, broken[held])], check


def _as_predicted(
    subject: EvaluationSession, images: Sequence[Certified], rows: NDArray[np.int64]
) -> EvaluationSession:
    """The images at `rows`, with their certified classes for labels."""
    predicted = torch.tensor([images[row].predicted for row in rows], device=subject.y.device)
    return replace(subject, x=subject.x[rows], y=predicted)


def _broken(
    part: EvaluationSession, settings: Certification, threat: Threat, number: int
) -> NDArray[np.bool_]:
    """Whether the smoothed classifier leaves the classes of a group under attack."""
    attack = PGD(
        norm=threat.norm,
        eps=threat.eps,
        steps=settings.attack_steps,
        objective=AttackObjective.margin,
    )
    rows, name = np.arange(len(part.y)), f"inside certificates {number}"
    x_adv = part.attack(attack, rows, name, threat=threat).x_adv
    decisive = TIMES_DECISIVE * votes_to_decide(settings.alpha)
    draws = max(part.votes, settings.n0, VOTES, decisive)
    vote = MajorityVote(part.model, draws, settings.alpha)
    with torch.no_grad(), part.drawing(f"vote inside certificates {number}"):
        shares = torch.cat([vote(batch) for batch in torch.split(x_adv, part.batch_size)])
    now = predictions(shares)
    # Abstaining is no other class.
    return np.asarray(((now != part.y) & (now >= 0)).cpu().numpy())
