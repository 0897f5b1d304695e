"""The attacks of Foolbox (Rauber et al. 2020)."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robusttrain.attacks.external import ExternalAttack, Search

NORMS = {math.inf: "linf", 2: "l2", 1: "l1", 0: "l0"}


@dataclass
class Foolbox(ExternalAttack):
    """An attack of Foolbox by its name, such as LinfPGD (`pip install 'robusttrain[foolbox]'`).

    Attacks that look for the smallest perturbation are called with the radius, too: what they find
    outside of the ball is cut to it by Foolbox.
    """

    library = "foolbox"
    command = "pip install 'robusttrain[foolbox]'"

    @classmethod
    def known(cls) -> Mapping[str, Callable[..., Any]]:
        """The attacks that measure perturbations by a norm."""
        from foolbox import attacks
        from foolbox.attacks.base import AttackWithDistance

        found = {key: kind for key, kind in vars(attacks).items() if inspect.isclass(kind)}
        return {key: kind for key, kind in found.items() if issubclass(kind, AttackWithDistance)}

    def norms(self) -> Collection[str]:
        """The norm of the distance that the attack minimises."""
        return [NORMS[self._built().distance.p]]

    def prepared(self, model: nn.Module, x: Tensor, seed: int) -> Search:
        """The search, which ends with one more pass."""
        from foolbox import Misclassification, PyTorchModel

        attack = self._built()
        seen = PyTorchModel(model, bounds=(0, 1), device=x.device)

        def search(x: Tensor, y: Tensor) -> Tensor:
            clipped: Tensor = attack(seen, x, Misclassification(y), epsilons=self.eps)[1]
            return clipped

        return search

    def _built(self) -> Any:
        from foolbox import distances

        distance = getattr(distances, self.norm.value)
        settings = self.settings(distance=distance, constraint=self.norm.value)
        return self.known()[self.name](**settings)
