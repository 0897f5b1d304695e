"""A model and the images it is examined on: attacked and looked at, repeatably."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robusttrain import streams
from robusttrain.attacks import Attack
from robusttrain.attacks.crafting import BallAttack, Metered, predictions
from robusttrain.attacks.objectives import margin
from robusttrain.evaluation.partial import NOTHING_SAVED, Partial
from robusttrain.evaluation.randomised import MeanPrediction, classes_and_randomness
from robusttrain.noise import drawing_from

# How many batches an attack gets to work on at a time; broken images leave room for others there.
BATCHES_IN_A_POOL = 16


class Seen(NamedTuple):
    """What the model says of each image: its class, or -1 for none, and by how much it leads."""

    prediction: NDArray[np.int64]
    margin: NDArray[np.float32]


class Crafted(NamedTuple):
    """Attacked images, and what they cost: images that went through the model, each way."""

    x_adv: Tensor
    forward_passes: int
    backward_passes: int
    non_finite: int


@dataclass
class Subject:
    """A model under examination, in eval mode, and images of known labels on its device.

    What is drawn depends on `seed` and on the name that a caller gives to its work, on nothing
    else: neither on what was drawn before nor on what the global random stream holds.

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
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    eot: int
    votes: int
    seed: int

    def __post_init__(self) -> None:
        with self._drawing("is it random?"):
            self.num_classes, self.random = classes_and_randomness(
                self.model, self.x[: self.batch_size]
            )

    def craft(
        self,
        attack: Attack,
        rows: Tensor,
        name: str,
        *,
        eot: int | None = None,
        saved: Partial = NOTHING_SAVED,
    ) -> Iterator[tuple[Tensor, Crafted]]:
        """Attack the images at `rows` in pools; yields (rows, result) of one after the other.

        A pool that `saved` has is taken from there.
        """
        pool = self.batch_size * (BATCHES_IN_A_POOL if isinstance(attack, BallAttack) else 1)
        # No rows split into one empty part, which an attack need not be able to take.
        for number, part in enumerate(torch.split(rows, pool) if len(rows) else ()):
            key = f"{name}/{number}"
            result = saved.get(key)
            if result is None:
                result = self._attacked(attack, part.to(self.x.device), key, eot or self.eot)
                saved.put(key, result)
            yield part, Crafted(**result)

    @torch.no_grad()
    def look(self, x: Tensor, *, draw: str = "votes") -> Seen:
        """Classify images `x`, as many as there are; noise is the same for each, look after look.

        Another `draw` gives other noise.
        """
        scored = MeanPrediction(self.model, self.votes) if self.random else self.model
        with self._drawing(draw):
            logits = torch.cat([scored(part) for part in torch.split(x, self.batch_size)])
        margins = -margin(logits, self.y).float()
        return Seen(predictions(logits).cpu().numpy(), margins.cpu().numpy())

    def _attacked(self, attack: Attack, rows: Tensor, key: str, eot: int) -> Mapping[str, object]:
        averaged = MeanPrediction(self.model, eot) if self.random else self.model
        metered = Metered(averaged, self.batch_size, eot if self.random else 1)
        generator = streams.stream(self.seed, f"evaluation/{key}", self.x.device)
        with self._drawing(f"noise/{key}"):
            x_adv = attack(metered, self.x[rows], self.y[rows], generator=generator)
        return {
            "x_adv": x_adv,
            "forward_passes": metered.forward_passes,
            "backward_passes": metered.backward_passes,
            "non_finite": int(metered.non_finite),
        }

    @contextmanager
    def _drawing(self, name: str) -> Iterator[None]:
        """Let the model's noise, of whatever kind, be that of `name` for the block."""
        own = streams.derived_seed(self.seed, name)
        devices = [self.x.device] if self.x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), drawing_from(self.model, own):
            torch.manual_seed(own)
            yield
