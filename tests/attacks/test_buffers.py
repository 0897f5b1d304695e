"""Attacks in train mode leave every buffer of the model as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.model_view import Mode, frozen
from robusttrain.attacks.pgd import PGD
from toys.attacks import everywhere, generator, seeded


class Counter(nn.Module):
    """Counts its passes in one buffer, and replaces the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("latest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.latest = x.detach().mean()
        return x


class OwnBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that tracks whatever it is told."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return super().forward(x)


class Sharing(nn.Module):
    """Two modules whose statistics are the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.InstanceNorm2d(4, track_running_stats=True)
        self.other = nn.InstanceNorm2d(4, track_running_stats=True)
        self.other.running_mean = self.one.running_mean
        self.other.running_var = self.one.running_var

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(self.one(x))
        return out


def convolution() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "own batch norm": lambda: OwnBatchNorm(4),
    "instance norm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(convolution()),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(convolution()),
    "counter": Counter,
    "shared": Sharing,
    "script": lambda: torch.jit.script(nn.BatchNorm2d(4)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str) -> nn.Module:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), KINDS[kind](), nn.Flatten(1), nn.Linear(64, 3)
        )

    return seeded(build)


def batch() -> tuple[Tensor, Tensor]:
    return everywhere(6, 1, 4, 4, dtype=torch.float32), torch.arange(6) % 3


@every_kind
@pytest.mark.parametrize("mode", list(Mode))
def test_buffers_are_the_same_tensors_with_the_same_values(kind: str, mode: Mode) -> None:
    model, attack = network(kind), PGD(eps=0.1, steps=2, mode=mode)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    attack(model, *batch(), generator=generator())
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, values) in before.items():
        assert torch.equal(after[name], values), name
        assert after[name].data_ptr() == buffer.data_ptr(), name


@every_kind
def test_a_pass_before_the_attack_can_still_be_differentiated(kind: str) -> None:
    """As of defenses that attack the divergence from clean logits in train mode."""

    def slope(attack: BallAttack | None) -> Tensor:
        model, (x, y) = network(kind), batch()
        clean = model(x)
        if attack is not None:
            attack(model, x, y, generator=generator())
        clean.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(slope(PGD(eps=0.1, steps=2, mode=Mode.train)), slope(None))


def test_modules_that_share_buffers_share_them_during_the_attack() -> None:
    model = network("shared")
    sharing = model[1]
    with frozen(model, Mode.train):
        assert sharing.one.running_mean is sharing.other.running_mean
    assert sharing.one.running_mean is sharing.other.running_mean
