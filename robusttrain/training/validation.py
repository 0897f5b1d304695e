"""Validate a model between epochs without disturbing its training."""

from dataclasses import dataclass

import torch
from torch import nn

from robusttrain import seeding
from robusttrain.attacks import Attack
from robusttrain.data import Samples, portions
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.voting import least_votes
from robusttrain.report.terminal import Terminal
from robusttrain.runtime import distributed
from robusttrain.threat import Threat


@dataclass(frozen=True)
class Validator:
    """Accuracies that are measured as an evaluation measures them, but with less effort.

    Parameters
    ----------
    model
        In any mode.
    threat, seed
        Of the run.
    """

    model: nn.Module
    threat: Threat
    seed: int
    terminal: Terminal

    def __call__(
        self, name: str, samples: Samples, attack: Attack | None, batch_size: int
    ) -> tuple[float | None, float | None]:
        """Clean accuracy, and that under `attack`, with draws that are those of `name` alone.

        No more than `batch_size` images are in one pass. Both are None where there are no images,
        or no attack. Several processes share the images.
        """
        if samples.size == 0 or attack is None:
            return None, None
        # Few draws for a model that predicts at random: this only compares epochs.
        votes = max(10, least_votes(self.model))
        settings = Evaluation({name: attack}, batch_size=batch_size, eot=1, votes=votes)
        seed = distributed.own_seed(seeding.derived_seed(self.seed, name))
        mine = _part(samples)
        wrong = {"clean": 0, "attacked": 0}
        with self.terminal.progress(name, mine.size) as bar:
            for portion in portions(mine, batch_size):
                ledger = evaluate(
                    self.model,
                    portion,
                    settings,
                    threat=self.threat,
                    seed=seed,
                    progress=bar,
                )
                wrong["clean"] += int(ledger.misclassified.sum())
                wrong["attacked"] += int(ledger.union.sum())
        total = distributed.summed(wrong)
        return 1 - total["clean"] / samples.size, 1 - total["attacked"] / samples.size


def _part(samples: Samples) -> Samples:
    """What this process looks at of them."""
    if distributed.size() == 1:
        return samples
    return samples.take(torch.arange(samples.size)[distributed.share(samples.size)])
