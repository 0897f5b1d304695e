"""The attacks of torchattacks (Kim 2020)."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robusttrain.attacks.external import ExternalAttack, Search, classes_of


@dataclass
class Torchattacks(ExternalAttack):
    """An attack of torchattacks by its name, such as PGD (`pip install --no-deps torchattacks`).

    Attacks without a radius look for the smallest perturbation: what they find outside of the ball
    is projected on it.
    """

    library = "torchattacks"
    # It pins a version of requests that other packages refuse.
    command = "pip install --no-deps torchattacks"

    @classmethod
    def known(cls) -> Mapping[str, Callable[..., Any]]:
        """The attacks on one model."""
        import torchattacks

        found = {key: getattr(torchattacks, key) for key in torchattacks.__all__}
        return {
            key: kind for key, kind in found.items()
            if inspect.isclass(kind) and "model" in inspect.signature(kind).parameters
        }  # fmt: skip

    def norms(self) -> Collection[str]:
        """The norms in the docstring of the attack."""
        stated = re.search(r"Distance Measure\s*:(.*)", self.known()[self.name].__doc__ or "")
        return [word.lower() for word in re.findall(r"L\w+", stated[1])] if stated else []

    def prepared(self, model: nn.Module, x: Tensor, seed: int) -> Search:
        """The search; one image more tells how many classes there are, where the attack asks."""
        taken = self.arguments
        known = {"n_classes": classes_of(model, x)} if "n_classes" in taken else {}
        settings = self.settings(
            eps=self.eps, max_epsilon=self.eps, norm=self.norm.capitalize(), seed=seed, **known
        )
        attack = self.known()[self.name](model, **settings)
        if {"eps", "max_epsilon"} & taken.keys():
            return lambda x, y: attack(x, y)
        return lambda x, y: self.projected(attack(x, y), x)
