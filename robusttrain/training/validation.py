"""Validate a model between epochs without disturbing its training."""

from dataclasses import dataclass

import torch
from torch import nn

from robusttrain import seeding
from robusttrain.attacks import Attack, states_threat, under
from robusttrain.data import Samples, portions
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.voting import least_votes
from robusttrain.report.terminal import Terminal
from robusttrain.runtime import distributed
from robusttrain.threat import Threat, named


@dataclass(frozen=True)
class Validator:
    """Measures accuracies as an evaluation does, but with fewer draws of noise.

    Parameters
    ----------
    model
        The model, in any mode.
    threats
        The threat models that an attack searches in turn: what is right under all of them counts.
    seed
        Seed of the run.
    terminal
        Where the progress is shown.
    """

    model: nn.Module
    threats: tuple[Threat, ...]
    seed: int
    terminal: Terminal

    def __call__(
        self, name: str, samples: Samples, attack: Attack | None, batch_size: int
    ) -> tuple[float | None, float | None]:
        """Clean accuracy, and accuracy under `attack`; both None without images or without attack.

        Random numbers come from the stream `name`. A pass has at most `batch_size` images. Several
        processes share the images.
        """
        if samples.size == 0 or attack is None:
            return None, None
        # A few draws of a randomised model are enough to compare epochs.
        votes = max(10, least_votes(self.model))
        suite = self.searches(name, attack)
        settings = Evaluation(suite, batch_size=batch_size, eot=1, votes=votes)
        seed = distributed.own_seed(seeding.derived_seed(self.seed, name))
        own = _share(samples)
        wrong = {"clean": 0, "adversarial": 0}
        with self.terminal.progress(name, own.size) as bar:
            for portion in portions(own, batch_size):
                ledger = evaluate(
                    self.model,
                    portion,
                    settings,
                    threat=self.threats[0],
                    seed=seed,
                    progress=bar,
                )
                wrong["clean"] += int(ledger.misclassified.sum())
                wrong["adversarial"] += int(ledger.union.sum())
        total = distributed.summed(wrong)
        return 1 - total["clean"] / samples.size, 1 - total["adversarial"] / samples.size

    def searches(self, name: str, attack: Attack) -> dict[str, Attack]:
        """The attack under each threat model; as it is where there is one, or it states none."""
        if len(self.threats) == 1 or not states_threat(attack):
            return {name: attack}
        return {named(name, each, len(self.threats)): under(attack, each) for each in self.threats}


def _share(samples: Samples) -> Samples:
    """The samples that this process evaluates."""
    if distributed.size() == 1:
        return samples
    return samples.take(torch.arange(samples.size)[distributed.share(samples.size)])
