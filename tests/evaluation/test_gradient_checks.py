"""Gradients that predict nothing are told from those that do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import open_session
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.gradient_checks import gradient_shares
from robusttrain.noise.gaussian import Gaussian
from robusttrain.threat import Norm, Threat

CLASSES, PIXELS = 5, 16
THREATS = [Threat(Norm.linf, 0.05), Threat(Norm.l2, 0.5), Threat(Norm.l1, 2.0)]
IMAGES = torch.randint(
    0, 256, (60, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def network(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


class Decoy(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, shown: Tensor, decoy: Tensor) -> Tensor:
        return shown

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, gradients[0]


class Behind(nn.Module):
    def __init__(self, mask: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.mask = network(), mask
        self.other = network(seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self, x)


def hard_labels(model: Any, x: Tensor) -> Tensor:
    labels = 5.0 * nn.functional.one_hot(model.inner(x).argmax(1), CLASSES)
    return Decoy.apply(labels, model.other(x))


def shares(model: nn.Module, threat: Threat) -> Any:
    settings = Evaluation({"pgd": PGD()})
    y = torch.arange(len(IMAGES)) % CLASSES
    _, subject = open_session(model.eval(), Split(IMAGES, y), settings, 0)
    return gradient_shares(Probe(subject, PGD(norm=threat.norm, eps=threat.eps)))


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_network_follows_its_gradient_at_any_scale(threat: Threat, scale: float) -> None:
    found = shares(Behind(lambda model, x: scale * model.inner(x)), threat)
    assert found.misleading == found.non_finite == 0
    # Cross-entropy is flat where the model is sure beyond what float32 can tell.
    assert found.zero == 0 or scale == 1e4


def test_noise_that_is_the_same_in_both_passes_misleads_nobody() -> None:
    model = network()
    Gaussian(0.3, predict=True).install(model, 0)
    assert shares(model, THREATS[0]).misleading == 0


MASKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "hard labels with a decoy": hard_labels,
    "reversed": lambda model, x: Decoy.apply(model.inner(x), -model.inner(x)),
    "too large": lambda model, x: Decoy.apply(model.inner(x), 100 * model.inner(x)),
    "of another network": lambda model, x: Decoy.apply(model.inner(x), model.other(x)),
}


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_gradient_that_is_not_the_outputs_is_found(name: str, threat: Threat) -> None:
    assert shares(Behind(MASKS[name]), threat).misleading > 50


def test_a_straight_through_gradient_of_a_quantised_input_leads_somewhere() -> None:
    """It predicts nothing over a short step, and the mean slope over a long one."""
    model = Behind(lambda model, x: model.inner(Decoy.apply((255 * x).round() / 255, x)))
    assert shares(model, THREATS[0]).misleading < 10


def test_a_flat_output_has_a_zero_gradient_and_none_that_misleads() -> None:
    found = shares(Behind(lambda model, x: model.inner(x).round()), THREATS[0])
    assert found.zero == 100
    assert found.misleading == 0
