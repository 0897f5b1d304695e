"""Clean and adversarial accuracy of a model on a split."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain import ranges, streams
from robusttrain.attacks import Attack
from robusttrain.attacks.crafting import predictions
from robusttrain.data import Split, as_input
from robusttrain.evaluation.randomised import MeanPrediction
from robusttrain.models.modes import modes_restored
from robusttrain.noise import drawing_from, predicts_randomly
from robusttrain.report.ledger import Ledger, Outcome
from robusttrain.report.terminal import Bar
from robusttrain.threat import Norm, ball

# Rows that a report has beside those of its attacks.
RESERVED = ("clean", "worst_case")


@dataclass
class Evaluation:
    """How a model is evaluated.

    Parameters
    ----------
    attacks
        The attacks by the names of their rows.
    samples
        How many test images; all of them where not given. The choice does not depend on the seed,
        so that runs can be paired.
    batch_size
        Images attacked at a time, 1 or more.
    eot, votes
        For a model that draws noise when it predicts: draws that an attack averages its gradient
        over (expectation over transformation, Athalye et al. 2018), and fresh draws whose mean
        softmax is the prediction.
    """

    attacks: Mapping[str, Attack] = field(default_factory=dict)
    samples: int | None = None
    batch_size: int = 500
    eot: int = 20
    votes: int = 50

    def __post_init__(self) -> None:
        ranges.at_least(1, batch_size=self.batch_size, eot=self.eot, votes=self.votes)
        if self.samples is not None:
            ranges.at_least(1, samples=self.samples)
        for name in self.attacks:
            ranges.require(
                name not in RESERVED, "attacks", name, f"named otherwise: {', '.join(RESERVED)} are"
                " rows of every report",
            )  # fmt: skip

    def choose(self, size: int) -> Tensor:
        """Positions of the images to evaluate in a split of `size`, in increasing order."""
        if self.samples is None or self.samples >= size:
            return torch.arange(size)
        order = torch.randperm(size, generator=streams.stream(0, "evaluated samples"))
        return order[: self.samples].sort().values


def evaluate(
    model: nn.Module,
    split: Split,
    settings: Evaluation,
    *,
    norm: Norm,
    eps: float,
    seed: int,
    bar: Bar,
) -> Ledger:
    """Attack `model` on the chosen images of `split` and score every result on fresh passes.

    An image that is misclassified by itself counts as broken by every attack and costs no attack.
    A model that predicts at random is scored, clean or attacked, on the same draws for the same
    image; attacks see other draws. An attack that changes nothing therefore breaks nothing, and
    several attacks have no more luck than one. Mode and noise streams of the model are left as
    they were. `norm` and `eps` are stated for attacks that have none of their own; `bar` advances
    once an image and attack.
    """
    rows = settings.choose(split.size)
    images = _Images(split.take(rows), settings, seed)
    with modes_restored(model):
        model.eval()
        started = time.perf_counter()
        clean = images.look(model, images.x)
        ledger = Ledger(
            index=rows.numpy(),
            label=images.y.cpu().numpy(),
            prediction=clean.prediction,
            margin=clean.margin,
            seconds=time.perf_counter() - started,
        )
        standing = torch.from_numpy(np.flatnonzero(~ledger.misclassified))
        for name, attack in settings.attacks.items():
            bar.show(name)
            bar.advance(len(rows) - len(standing))
            started = time.perf_counter()
            x_adv = images.attacked(model, attack, standing, name, bar)
            seen = images.look(model, x_adv)
            own_norm = Norm(getattr(attack, "norm", norm))
            ledger.outcomes[name] = Outcome(
                norm=own_norm,
                eps=float(getattr(attack, "eps", eps)),
                broken=np.not_equal(seen.prediction, ledger.label),
                margin=seen.margin,
                size=ball(own_norm, 0).size(x_adv - images.x).cpu().numpy(),
                seconds=time.perf_counter() - started,
            )
    return ledger


class _Seen(NamedTuple):
    """What the model says of each image."""

    prediction: NDArray[np.int64]
    margin: NDArray[np.float32]


class _Images:
    """The images under evaluation, on their device, as floats in [0, 1]."""

    def __init__(self, split: Split, settings: Evaluation, seed: int) -> None:
        self.x, self.y = as_input(split.images), split.labels
        self.settings, self.seed = settings, seed

    def attacked(
        self, model: nn.Module, attack: Attack, rows: Tensor, name: str, bar: Bar
    ) -> Tensor:
        """All images, those at `rows` attacked, in full batches."""
        crafted = _averaged(model, self.settings.eot)
        generator = streams.stream(self.seed, f"evaluation/{name}", self.x.device)
        x_adv = self.x.clone()
        with drawing_from(model, streams.derived_seed(self.seed, f"noise/{name}")):
            # No rows split into one empty part, which an attack need not be able to take.
            for part in torch.split(rows, self.settings.batch_size) if len(rows) else ():
                here = part.to(self.x.device)
                x_adv[here] = attack(crafted, self.x[here], self.y[here], generator=generator)
                bar.advance(len(part))
        return x_adv

    @torch.no_grad()
    def look(self, model: nn.Module, x: Tensor) -> _Seen:
        """Classify the images `x`; noise is drawn the same for each image, look after look."""
        scored = _averaged(model, self.settings.votes)
        size = self.settings.batch_size
        with drawing_from(model, streams.derived_seed(self.seed, "votes")):
            logits = torch.cat([scored(part) for part in torch.split(x, size)])
        margins = _margins(logits, self.y)
        return _Seen(predictions(logits).cpu().numpy(), margins.cpu().numpy())


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (own - others.amax(1)).float()


def _averaged(model: nn.Module, draws: int) -> nn.Module:
    """The model, or its mean over `draws` passes where it predicts at random."""
    return MeanPrediction(model, draws) if predicts_randomly(model) else model
