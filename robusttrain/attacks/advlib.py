"""The attacks of the Adversarial Library (Rony et al.), which its package calls adv_lib."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from robusttrain.attacks.external import ORDERS, ExternalAttack, Search, classes_of
from robusttrain.threat import Norm

# Attacks that keep to a radius; to others, arguments of the same names are something else.
BOUNDED = ("apgd", "apgd_targeted", "pgd_linf")


@dataclass
class AdvLib(ExternalAttack):
    """A function of adv_lib, such as apgd or fmn (`pip install --no-build-isolation adv-lib`).

    Most look for the smallest perturbation: what they find outside of the ball is projected on it.
    """

    library = "adv_lib"
    command = "pip install --no-build-isolation adv-lib"

    @classmethod
    def known(cls) -> Mapping[str, Callable[..., Any]]:
        """The functions of its attacks."""
        from adv_lib import attacks

        return {key: found for key, found in vars(attacks).items() if inspect.isfunction(found)}

    def norms(self) -> Collection[str]:
        """The norm in the name of the function."""
        last = self.name.rpartition("_")[2]
        return [last] if last in set(Norm) else []

    def prepared(self, model: nn.Module, x: Tensor, seed: int) -> Search:
        """The search; one image more tells how many classes there are, where it is asked."""
        taken, order = self.arguments, ORDERS[self.norm]
        bounded = self.name in BOUNDED
        radius = {"eps": self.eps, "ε": self.eps} if bounded else {}
        known = {"num_classes": classes_of(model, x)} if "num_classes" in taken else {}
        settings = self.settings(
            norm=order, p=order, distance=self.norm.value, targeted=False, **radius, **known
        )
        inspect.signature(self.known()[self.name]).bind(model, x, x, **settings)
        search = partial(self.known()[self.name], model, **settings)
        return search if bounded else lambda x, y: self.projected(search(x, y), x)
