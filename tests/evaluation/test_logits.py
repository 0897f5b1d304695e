"""Behind a softmax there are logits, and attacks climb those."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robusttrain.attacks.apgd import APGD
from robusttrain.attacks.objectives import AttackObjective
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import attack_all, open_session
from robusttrain.evaluation.logits import WithoutSoftmax, without_softmax
from robusttrain.threat import Norm, Threat

EPS = 0.1


class Behind(nn.Module):
    """Probabilities of a linear model, computed by `softmax`."""

    def __init__(self, softmax: Callable[[Tensor], Tensor], scale: float = 1) -> None:
        super().__init__()
        self.softmax, self.scale = softmax, scale
        self.linear = nn.Linear(16, 4)
        nn.init.orthogonal_(self.linear.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.scale * self.linear(x.flatten(1)))


def by_hand(z: Tensor) -> Tensor:
    shares = (z - z.amax(1, keepdim=True)).exp()
    return shares / shares.sum(1, keepdim=True)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.Softmax(1),
    "functional": lambda z: F.softmax(z, dim=1),
    "torch": lambda z: torch.softmax(z, 1),
    "method": lambda z: z.softmax(1),
    "special": lambda z: torch.special.softmax(z, 1),
}
IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SOFTMAXES)
def test_logits_are_what_went_into_the_softmax(name: str) -> None:
    model = Behind(SOFTMAXES[name], scale=200).eval()
    logits = without_softmax(model, IMAGES)(IMAGES)
    assert torch.equal(logits, 200 * model.linear(IMAGES.flatten(1)))
    (gradient,) = torch.autograd.grad(logits.sum(), model.linear.weight)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("model", [
    Behind(by_hand), torch.jit.trace(Behind(nn.Softmax(1)).eval(), IMAGES),
])  # fmt: skip
def test_other_probabilities_have_their_logarithms(model: nn.Module) -> None:
    logits = without_softmax(model.eval(), IMAGES)(IMAGES)
    torch.testing.assert_close(logits.softmax(1), model(IMAGES))


def test_a_softmax_in_the_middle_stays() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Softmax(1), nn.Linear(4, 4)).eval()
    assert without_softmax(model, IMAGES) is model
    attention = WithoutSoftmax(nn.Sequential(nn.Flatten(), nn.Softmax(1), nn.ReLU(), nn.Softmax(1)))
    torch.testing.assert_close(attention(IMAGES), IMAGES.flatten(1).softmax(1))


def test_a_saturated_softmax_hides_nothing() -> None:
    """Of a linear model, the margin over each other class has a closed form at its worst point."""
    model = Behind(nn.Softmax(1), scale=2000).eval()
    pixels = (IMAGES * 255).to(torch.uint8)
    x = pixels.flatten(1).float() / 255
    y = model.linear(x).argmax(1)
    weight = model.linear.weight.detach()
    broken = torch.zeros(len(x), dtype=torch.bool)
    for other in range(4):
        slope = weight[other] - weight[y]
        room = torch.where(slope > 0, (1 - x).clamp(max=EPS), x.clamp(max=EPS))
        lead = model.linear(x)[:, other] - model.linear(x).gather(1, y[:, None]).squeeze(1)
        broken |= (lead + (slope.abs() * room).sum(1) > 0) & (y != other)
    settings = Evaluation({"apgd": APGD(eps=EPS, objective=AttackObjective.margin, targets=3)})
    threat = Threat(Norm.linf, EPS)
    index, subject = open_session(model, Split(pixels, y), settings, 0)
    ledger = attack_all(subject, index, settings.attacks, False, threat=threat)
    assert 0.2 < broken.float().mean() < 0.9
    np.testing.assert_array_equal(ledger.worst_case(threat), broken.numpy())
