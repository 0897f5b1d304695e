"""The truth about a model: what attacks that know it really do to it.

The search climbs the `views` of a model, which are networks that an attacker who knows it would
differentiate instead of it. It counts only points that fool the model itself. What is left is an
upper bound of the robust accuracy, and no attack of the product takes part in it: it shares the
projections on the balls with the product, and what a random model predicts, and nothing else.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusttrain.evaluation.voting import prediction
from robusttrain.noise.control import drawing_from
from robusttrain.threat import Threat
from robusttrain.threat.balls import Ball, ball, per_image, striped_start

# Draws that score a point in the search, and at its end.
VOTES, LAST_VOTES = 50, 400
# Steps after which the points of a search are tried on the model, as shares of all steps.
TRIED_AT = (0.1, 0.5, 1.0)
# Searches that every image gets; the others are for those that these did not break.
FIRST_SEARCHES = 4
# The lead of another class, in probability, from which more votes would hardly change it.
SURE = 0.1
# Most points in one pass.
BATCH = 1000
MOMENTUM = 0.75
PIXELS = (1, 3, 8)
# The length of the first and of the last step, in radii.
FIRST_STEP, LAST_STEP = 0.5, 0.01
# How far the last search goes from the best points, in radii.
JITTER = 0.05
# The share of its way that a pixel of an uneven point goes.
UNEVEN = 0.68, 0.88
# How far rounding may lead beyond the radius, relative and absolute.
SLACK = 1e-5


class Budget(NamedTuple):
    """How much is searched.

    Parameters
    ----------
    searches
        Searches in each view, from points and with targets of their own.
    steps
        Steps a search.
    jitters
        Points next to the best one that are tried at the end.
    """

    searches: int = 24
    steps: int = 80
    jitters: int = 40


class Truth(NamedTuple):
    """Shares of the images that are classified correctly, as they are and in the worst case."""

    clean: float
    robust: float


class Subject(NamedTuple):
    """A model whose truth is looked for.

    Parameters
    ----------
    model
        As it predicts; never called itself, as it may change from query to query. A fresh copy
        answers each question.
    views
        Networks to climb in its place.
    random
        Whether its prediction is a vote over draws.
    """

    model: nn.Module
    views: Sequence[nn.Module]
    random: bool


class Mean(nn.Module):
    """log of the mean softmax over passes (Athalye et al. 2018), to climb a random network."""

    def __init__(self, network: nn.Module, draws: int = 10) -> None:
        super().__init__()
        self.network, self.draws = network, draws

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, K)."""
        passes = torch.stack([self.network(x) for _ in range(self.draws)])
        return passes.softmax(2).mean(0).clamp_min(1e-30).log()


class Nearby(nn.Module):
    """Mean logits at random points near the image, for outputs that are rugged (Tramer 2020)."""

    def __init__(self, network: nn.Module, radius: float, draws: int = 10) -> None:
        super().__init__()
        self.network, self.radius, self.draws = network, radius, draws

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        many = x.repeat(self.draws, 1, 1, 1)
        near = many + self.radius * torch.randn_like(many)
        return self.network(near).unflatten(0, (self.draws, len(x))).mean(0)


def truth(
    subject: Subject, x: Tensor, y: Tensor, threat: Threat, budget: Budget, *, seed: int = 0
) -> Truth:
    """Attack `subject` at images `x` (N, C, H, W) with labels `y` (N,) within the threat model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = _Found(subject, x, y, threat)
        # Most images fall to the first few searches, and need no others.
        for first, last in ((0, FIRST_SEARCHES), (FIRST_SEARCHES, budget.searches)):
            for view in subject.views:
                _search(found, view, range(first, last), budget.steps)
        for _ in range(budget.jitters):
            found.offer(found.jittered())
        clean, robust = (
            _margins(subject, points, y, LAST_VOTES) > 0 for points in (x, found.x_adv)
        )
    return Truth(clean.double().mean().item(), (clean & robust).double().mean().item())


class _Found:
    """The point of each image that leaves the true class the smallest lead."""

    def __init__(self, subject: Subject, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.subject, self.x, self.y, self.threat = subject, x, y, threat
        self.ball = ball(threat)
        self.x_adv, self.margin = x.clone(), _margins(subject, x, y, VOTES)
        # Pixels that move less than they might break the pattern that an attack leaves.
        self.uneven = UNEVEN[0] + (UNEVEN[1] - UNEVEN[0]) * torch.rand_like(x)

    @property
    def standing(self) -> Tensor:
        """Positions of the images that are not broken, or only by few of the votes."""
        sure = SURE if self.subject.random else 0
        return (self.margin > -sure).nonzero().squeeze(1)

    def offer(self, points: Tensor) -> None:
        """Take up points of all images where they are better, or on the grid of bytes, or uneven.

        All are tried together, as the answer of some models depends on the batch.
        """
        uneven = self.x + self.uneven * (points - self.x)
        for tried in (points, _on_grid(points, self.x), _on_grid(uneven, self.x)):
            size = self.ball.norm(tried - self.x)
            assert bool((size <= self.threat.eps * (1 + SLACK) + SLACK).all())
            margin = _margins(self.subject, tried, self.y, VOTES)
            better = margin < self.margin
            self.x_adv[better], self.margin[better] = tried[better], margin[better]

    def jittered(self) -> Tensor:
        """Points next to the best ones."""
        noise = torch.randn_like(self.x)
        size = JITTER * self.threat.eps / self.ball.norm(noise)
        return self.ball.project(self.x_adv + per_image(size, noise) * noise, self.x)


def _margins(subject: Subject, x: Tensor, y: Tensor, votes: int) -> Tensor:
    """The lead of the true class, (N,): positive where it is predicted.

    Outputs that are not finite, and ties, which `argmax` decides, count as the product counts them.
    """
    model = copy.deepcopy(subject.model)
    scored = prediction(model, votes) if subject.random else model
    with torch.no_grad(), drawing_from(model, int(torch.randint(1 << 31, ()))):
        logits = scored(x).double()
    finite = logits.isfinite().all(1)
    own = logits.gather(1, y[:, None]).squeeze(1)
    lead = own - logits.scatter(1, y[:, None], -torch.inf).amax(1)
    tied = torch.where(logits.argmax(1) == y, 1e-12, -1e-12)
    return torch.where(finite, torch.where(lead == 0, tied, lead), -torch.inf)


def _on_grid(points: Tensor, x: Tensor) -> Tensor:
    """The multiples of 1/255 next to `points`, on the way to the images, which are such."""
    bytes_of_x = (x * 255).round()
    return (bytes_of_x + ((points - x) * 255 * (1 + SLACK)).trunc()).clamp(0, 255) / 255


def _search(found: _Found, view: nn.Module, searches: range, steps: int) -> None:
    """Climb `view` from the images that still stand, and offer what is met on the way."""
    rows = found.standing
    if len(rows) == 0 or len(searches) == 0:
        return
    x, y = found.x[rows], found.y[rows]
    start = torch.cat([_start(number, x, found.ball) for number in searches])
    target = torch.cat(_targets(view, x, y, searches))
    many = len(searches)
    climbed = _Climb(view, found.threat, x.repeat(many, 1, 1, 1), y.repeat(many), target)
    for points in climbed.points(start, steps):
        for part in points.unflatten(0, (many, len(rows))):
            offered = found.x_adv.clone()
            offered[rows] = part
            found.offer(offered)


def _start(number: int, x: Tensor, here: Ball) -> Tensor:
    """The image, stripes, and random points."""
    if number == 0:
        return x
    generator = torch.Generator().manual_seed(number)
    if number % 4 == 0:
        return striped_start(here, x, generator)
    return here.random_start(x, generator)


def _targets(view: nn.Module, x: Tensor, y: Tensor, searches: range) -> list[Tensor]:
    """The class that each search leads to: none, -1, and one after the other, in turn."""
    with torch.no_grad():
        others = view(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    ranks = [number // 2 % (others.shape[1] - 1) for number in searches]
    return [
        others[:, rank] if number % 2 else torch.full_like(y, -1)
        for number, rank in zip(searches, ranks, strict=True)
    ]


class _Climb(NamedTuple):
    """PGD on the margin with momentum and steps that shrink geometrically; never stops early."""

    view: nn.Module
    threat: Threat
    x: Tensor
    y: Tensor
    target: Tensor

    def points(self, start: Tensor, steps: int) -> Iterator[Tensor]:
        """Points on the way, and at last the best of it."""
        here, points, momentum = ball(self.threat), start, torch.zeros_like(start)
        best, best_value = start.clone(), torch.full((len(start),), -torch.inf)
        tried = {round(share * steps) for share in TRIED_AT}
        for step in range(1, steps + 1):
            value, gradient = self._seen(points)
            better = value > best_value
            best[better], best_value[better] = points[better], value[better]
            size = gradient.flatten(1).abs().mean(1).clamp_min(1e-30)
            momentum = MOMENTUM * momentum + gradient / per_image(size, gradient)
            length = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / steps) * self.threat.eps
            # In l1 few and many pixels in turn.
            pixels = torch.full((len(start),), PIXELS[step % len(PIXELS)])
            ascent = here.sparse_ascent(momentum, points, pixels)
            points = here.project(points + length * ascent, self.x)
            if step in tried:
                yield points
        yield best

    def _seen(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The lead of the target, or of the best other class, and its gradient."""
        parts = zip(*(torch.split(t, BATCH) for t in (points, self.y, self.target)), strict=True)
        values, gradients = zip(*(self._part(*part) for part in parts), strict=True)
        return torch.cat(values), torch.cat(gradients)

    def _part(self, points: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        points = points.detach().requires_grad_()
        logits = self.view(points)
        any_other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        aimed_at = logits.gather(1, target.clamp_min(0)[:, None]).squeeze(1)
        own = logits.gather(1, y[:, None]).squeeze(1)
        value = torch.where(target < 0, any_other, aimed_at) - own
        (gradient,) = torch.autograd.grad(value.sum(), points)
        return value.detach(), gradient.nan_to_num(0, 0, 0)
