"""A model and the images that it is evaluated on: predictions and attacks that repeat exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain import seeding
from robusttrain.attacks import Attack, threat_of, traits_of
from robusttrain.attacks.model_view import QueryCounter, logits_of, predictions
from robusttrain.attacks.objectives import margin
from robusttrain.evaluation.cache import NO_CACHE, Cache
from robusttrain.evaluation.logits import without_softmax
from robusttrain.evaluation.validity import checked
from robusttrain.evaluation.voting import (
    MeanPrediction,
    classes_and_randomness,
    prediction,
)
from robusttrain.noise.control import drawing_from
from robusttrain.runtime.progress import Advance, unreported
from robusttrain.threat import Threat

# How many batches an attack gets to work on at a time; broken images leave room for others there.
BATCHES_IN_A_POOL = 16

# The draws that every clean and attacked image is scored on.
VOTES = "votes"


class Predictions(NamedTuple):
    """The class of each image, or -1 for none, and the lead of its true class."""

    prediction: NDArray[np.int64]
    margin: NDArray[np.float32]


class AttackResult(NamedTuple):
    """Attacked images, and what they cost: images that went through the model, each way.

    `x_adv` has the image itself where the attack returned no point of its threat model, which
    happened `invalid` times.
    """

    x_adv: Tensor
    forward_passes: int
    backward_passes: int
    non_finite: int
    invalid: int


@dataclass
class EvaluationSession:
    """A model under examination, in eval mode, and images of known labels on its device.

    Draws depend on `seed` and on the name that a caller gives to its work only. They depend neither
    on earlier draws nor on the global random stream.

    Parameters
    ----------
    model
        The model, in the mode in which it predicts.
    x, y
        Images (N, C, H, W) in [0, 1], and labels (N,).
    batch_size
        Most images in one pass.
    eot, votes
        Draws an attack averages over, and draws of the prediction, where the model is random.
    seed
        Of all draws.
    saved
        Where pools that are done are kept, and taken from.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    eot: int
    votes: int
    seed: int
    saved: Cache = NO_CACHE

    @property
    def num_classes(self) -> int:
        """How many logits the model returns."""
        return self._shown[0]

    @property
    def random(self) -> bool:
        """Whether predictions depend on noise, declared or not."""
        return self._shown[1]

    @cached_property
    def _shown(self) -> tuple[int, bool]:
        with self.drawing("is it random?"):
            return classes_and_randomness(self.model, self.x[: self.batch_size])

    @cached_property
    def climbed(self) -> nn.Module:
        """The model as attacks see it: without a softmax at its end."""
        with self.drawing("is there a softmax?"):
            return without_softmax(self.model, self.x[: self.batch_size])

    def take(self, rows: Tensor) -> Self:
        """The same model with some of the images."""
        taken = replace(self, x=self.x[rows], y=self.y[rows])
        # Few of the images may not show what all of them did.
        taken._shown = self._shown
        return taken

    def attack(
        self,
        attack: Attack,
        rows: NDArray[np.int64],
        name: str,
        *,
        threat: Threat,
        eot: int | None = None,
        advance: Advance = unreported,
    ) -> AttackResult:
        """All images, those at `rows` attacked; `advance` gets how many more are done.

        What an attack returns has to lie in its threat model, or in `threat` if it states none. An
        image that does not is replaced by the clean one, and counted.

        An attack that is `pooled` gets many batches at a time, and fills the room of images that
        it has broken with others; another one gets batch by batch.
        """
        size = self.batch_size * (BATCHES_IN_A_POOL if traits_of(attack).pooled else 1)
        total = AttackResult(self.x.clone(), 0, 0, 0, 0)
        allowed = threat_of(attack) or threat
        # No rows split into one empty part, which an attack need not be able to take.
        parts = torch.split(torch.from_numpy(rows), size) if len(rows) else ()
        for number, part in enumerate(parts):
            here = part.to(self.x.device)
            pool = self._pool(attack, allowed, here, f"{name}/{number}", eot or self.eot)
            total.x_adv[here] = pool.x_adv.to(self.x.device)
            counts = (a + b for a, b in zip(total[1:], pool[1:], strict=True))
            total = AttackResult(total.x_adv, *counts)
            advance(len(part))
        return total

    @torch.no_grad()
    def predict(self, x: Tensor, *, draw: str = VOTES) -> Predictions:
        """Classify images `x`, as many as there are; noise is the same for each, look after look.

        Another `draw` gives other noise.
        """
        scored = prediction(self.climbed, self.votes) if self.random else self.model
        with self.drawing(draw):
            logits = torch.cat(
                [logits_of(scored, part) for part in torch.split(x, self.batch_size)]
            )
        margins = -margin(logits, self.y).float()
        return Predictions(predictions(logits).cpu().numpy(), margins.cpu().numpy())

    def _pool(
        self, attack: Attack, threat: Threat, rows: Tensor, key: str, eot: int
    ) -> AttackResult:
        known = self.saved.get(key)
        if known is not None:
            return AttackResult(**known)
        averaged = MeanPrediction(self.climbed, eot) if self.random else self.climbed
        draws = eot if self.random else 1
        metered = QueryCounter(averaged, self.batch_size, draws, random=self.random)
        generator = seeding.generator_for(self.seed, f"evaluation/{key}", self.x.device)
        with self.drawing(f"noise/{key}"):
            # Copies: what an attack does to them does no harm.
            returned = attack(metered, self.x[rows], self.y[rows], generator=generator)
        x_adv, invalid = checked(returned, self.x[rows], threat, self.batch_size)
        passes = metered.forward_passes, metered.backward_passes
        crafted = AttackResult(x_adv, *passes, int(metered.non_finite), invalid)
        self.saved.put(key, crafted._asdict())
        return crafted

    @contextmanager
    def drawing(self, name: str) -> Iterator[None]:
        """Let the model's noise, of whatever kind, be that of `name` for the block."""
        own = seeding.derived_seed(self.seed, name)
        devices = [self.x.device] if self.x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), drawing_from(self.model, own):
            torch.manual_seed(own)
            yield
