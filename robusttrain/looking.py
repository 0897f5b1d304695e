"""A look at a model between two epochs of its training, which leaves no trace there."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from robusttrain import streams
from robusttrain.attacks import Attack
from robusttrain.data import Samples, portions
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.randomised import least_votes
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm


@dataclass(frozen=True)
class Look:
    """Accuracies that are measured as an evaluation measures them, but with less effort.

    Parameters
    ----------
    model
        In any mode.
    norm, eps, seed
        Of the run.
    """

    model: nn.Module
    norm: Norm
    eps: float
    seed: int
    terminal: Terminal

    def __call__(
        self, name: str, samples: Samples, attack: Attack | None, batch_size: int
    ) -> tuple[float | None, float | None]:
        """Clean accuracy, and that under `attack`, with draws that are those of `name` alone.

        No more than `batch_size` images are in one pass. Both are None where there are no images,
        or no attack.
        """
        if samples.size == 0 or attack is None:
            return None, None
        # Few draws for a model that predicts at random: this only compares epochs.
        votes = max(10, least_votes(self.model))
        settings = Evaluation({name: attack}, batch_size=batch_size, eot=1, votes=votes)
        seed = streams.derived_seed(self.seed, name)
        with self.terminal.progress(name, samples.size) as bar:
            ledgers = [
                evaluate(
                    self.model, portion, settings, norm=self.norm, eps=self.eps, seed=seed, bar=bar
                )
                for portion in portions(samples, batch_size)
            ]
        misclassified = np.concatenate([ledger.misclassified for ledger in ledgers])
        broken = np.concatenate([ledger.worst_case for ledger in ledgers])
        return 1 - float(misclassified.mean()), 1 - float(broken.mean())
