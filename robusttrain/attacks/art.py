"""The attacks of the Adversarial Robustness Toolbox (Nicolae et al. 2018)."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robusttrain.attacks.external import ORDERS, ExternalAttack, Search, classes_of

# Names that do not say it.
NORMS = {"BasicIterativeMethod": "linf", "DeepFool": "l2", "NewtonFool": "l2", "ElasticNet": "l1"}


@dataclass
class ART(ExternalAttack):
    """An attack of ART, such as ProjectedGradientDescent (`pip install 'robusttrain[art]'`).

    Its batches are those of the evaluation. A step `eps_step` is not longer than the radius, which
    ART's own default would exceed in small balls. Attacks without a radius look for the smallest
    perturbation: what they find outside of the ball is projected on it.
    """

    library = "art"
    command = "pip install 'robusttrain[art]'"

    @classmethod
    def known(cls) -> Mapping[str, Callable[..., Any]]:
        """The attacks on a classifier."""
        from art.attacks import EvasionAttack, evasion

        found = {key: kind for key, kind in vars(evasion).items() if inspect.isclass(kind)}
        return {
            key: kind for key, kind in found.items()
            if issubclass(kind, EvasionAttack)
            and {"classifier", "estimator"} & inspect.signature(kind).parameters.keys()
        }  # fmt: skip

    def norms(self) -> Collection[str]:
        """The norm in the name of the attack."""
        stated = re.search(r"L(Inf|\d)", NORMS.get(self.name, self.name), re.IGNORECASE)
        return [stated[0].lower()] if stated else []

    def prepared(self, model: nn.Module, x: Tensor, seed: int) -> Search:
        """The search; one image more tells how many classes there are. ART computes in float32."""
        from art.estimators.classification import PyTorchClassifier

        taken = self.arguments
        longest = min(self.eps, taken["eps_step"].default) if "eps_step" in taken else None
        settings = self.settings(
            eps=self.eps, norm=ORDERS[self.norm], eps_step=longest, batch_size=len(x),
            targeted=False, verbose=False,
        )  # fmt: skip
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes_of(model, x),
            clip_values=(0.0, 1.0), device_type="gpu" if x.is_cuda else "cpu",
        )  # fmt: skip
        attack = self.known()[self.name](classifier, **settings)

        def search(x: Tensor, y: Tensor) -> Tensor:
            found = attack.generate(x=x.cpu().numpy(), y=y.cpu().numpy())
            x_adv = torch.from_numpy(found).to(x.device)
            return x_adv if "eps" in taken else self.projected(x_adv, x)

        return search
