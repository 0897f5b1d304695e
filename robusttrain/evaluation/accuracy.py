"""Clean and adversarial accuracy of a model on a split."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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
from robusttrain.noise import predicts_randomly
from robusttrain.report.ledger import Ledger, Outcome
from robusttrain.report.terminal import Bar
from robusttrain.threat import Norm, ball


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
    The model comes back in the mode it was in. `norm` and `eps` are stated for attacks that have
    none of their own; `bar` advances once an image and attack.
    """
    rows = settings.choose(split.size)
    images = _Images(split.take(rows), settings.batch_size)
    with modes_restored(model):
        model.eval()
        crafted, scored = _views(model, settings)
        started = time.perf_counter()
        prediction, margin = images.score(scored)
        ledger = Ledger(
            index=rows.numpy(),
            label=images.split.labels.cpu().numpy(),
            prediction=prediction,
            margin=margin,
            seconds=time.perf_counter() - started,
        )
        for name, attack in settings.attacks.items():
            bar.show(name)
            generator = streams.stream(seed, f"evaluation/{name}", split.images.device)
            ledger.outcomes[name] = _outcome(
                attack, images, ledger, crafted, scored, generator, bar,
                norm=Norm(getattr(attack, "norm", norm)), eps=getattr(attack, "eps", eps),
            )  # fmt: skip
    return ledger


class _Images:
    """The images under evaluation, handed out in batches."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.batch_size = split, batch_size

    def batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(rows, images in [0, 1], labels) of the given rows."""
        for part in torch.split(rows.to(self.split.images.device), self.batch_size):
            # No rows split into one empty part, which an attack need not be able to take.
            if len(part) > 0:
                yield part, as_input(self.split.images[part]), self.split.labels[part]

    @torch.no_grad()
    def score(self, model: nn.Module) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(predictions, margins) on the clean images."""
        everything = torch.arange(self.split.size)
        parts = [(model(x), y) for _, x, y in self.batches(everything)]
        logits = torch.cat([logits for logits, _ in parts])
        margins = torch.cat([_margins(logits, y) for logits, y in parts])
        return predictions(logits).cpu().numpy(), margins.cpu().numpy()


def _outcome(
    attack: Attack,
    images: _Images,
    ledger: Ledger,
    crafted: nn.Module,
    scored: nn.Module,
    generator: torch.Generator,
    bar: Bar,
    *,
    norm: Norm,
    eps: float,
) -> Outcome:
    started = time.perf_counter()
    broken, margin = ledger.misclassified.copy(), ledger.margin.copy()
    size = np.zeros_like(margin)
    for rows, x, y in images.batches(torch.from_numpy(np.flatnonzero(~broken))):
        x_adv = attack(crafted, x, y, generator=generator)
        with torch.no_grad():
            logits = scored(x_adv)
        where = rows.cpu().numpy()
        broken[where] = (predictions(logits) != y).cpu().numpy()
        margin[where] = _margins(logits, y).cpu().numpy()
        size[where] = ball(norm, eps).size(x_adv - x).cpu().numpy()
        bar.advance(len(where))
    bar.advance(int(ledger.misclassified.sum()))
    return Outcome(norm, float(eps), broken, margin, size, time.perf_counter() - started)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (own - others.amax(1)).float()


def _views(model: nn.Module, settings: Evaluation) -> tuple[nn.Module, nn.Module]:
    """The model as an attack sees it and as it is scored."""
    if not predicts_randomly(model):
        return model, model
    return MeanPrediction(model, settings.eot), MeanPrediction(model, settings.votes)
