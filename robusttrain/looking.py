"""A look at a model between two epochs of its training, which leaves no trace there."""

from dataclasses import dataclass

from torch import nn

from robusttrain import streams
from robusttrain.attacks import Attack
from robusttrain.data import Split
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
        self, name: str, split: Split, attack: Attack | None, batch_size: int
    ) -> tuple[float | None, float | None]:
        """Clean accuracy, and that under `attack`, with draws that are those of `name` alone.

        No more than `batch_size` images are in one pass. Both are None where there are no images,
        or no attack.
        """
        if split.size == 0 or attack is None:
            return None, None
        # Few draws for a model that predicts at random: this only compares epochs.
        votes = max(10, least_votes(self.model))
        settings = Evaluation({name: attack}, batch_size=batch_size, eot=1, votes=votes)
        with self.terminal.progress(name, split.size) as bar:
            ledger = evaluate(
                self.model, split, settings,
                norm=self.norm, eps=self.eps, seed=streams.derived_seed(self.seed, name), bar=bar,
            )  # fmt: skip
        return 1 - float(ledger.misclassified.mean()), 1 - float(ledger.worst_case.mean())
