"""Models that write to their input: the images of the caller never change."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.bounds.intervals import Interval
from robusttrain.checkpoints import external
from robusttrain.checkpoints.external import ExportedProgram
from robusttrain.data import Info
from robusttrain.data.synthetic import Synthetic
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.attack_suite import evaluate
from robusttrain.models import build_model
from robusttrain.models.mlp import MLP
from robusttrain.models.network import network
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.layer import NoiseLayer, Switches, standard_normal
from robusttrain.noise.none import NoNoise
from robusttrain.noise.placement import put
from robusttrain.threat import Norm, Threat
from toys.external import CLASSES, SHAPE, Write, exported, images, scripted, written

INFO = Info(SHAPE, CLASSES, ())


class Net(nn.Module):
    """An affine network behind BatchNorm, with something in front of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, CLASSES)

    def head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(x.flatten(1)))
        return logits


class Clamps(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.data.clamp_(0.2, 0.8)
        return self.head(x)


class ClampsDetached(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.detach().clamp_(0.2, 0.8)
        return self.head(x)


class ClampsACopy(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.data.clamp_(0.2, 0.8)
        return self.head(x)


class Normalises(Net):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.4
        x /= 0.25
        return self.head(x)


class Rectifies(Net):
    """What changes no image of pixels, but fails where a gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.relu_())


class WithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.9)
        return self.head(x)


class WritesInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x.mul_(0.5)
        return self.head(x)


class DarkensWhite(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.data[x.data > 0.999] = 0.5
        return self.head(x)


class WritesThroughAView(Net):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().view(-1)
        flat[0] += 0.3
        return self.head(x)


class FailsInTraining(Clamps):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("never trained")
        return super().forward(x)


WRITERS: list[type[Net]] = [
    Clamps, ClampsDetached, Normalises, Rectifies, WithoutGradient, WritesInTraining, DarkensWhite,
    WritesThroughAView, FailsInTraining,
]  # fmt: skip


def from_file(write: Write) -> Callable[[nn.Module, Path], nn.Module]:
    def loaded(model: nn.Module, folder: Path) -> nn.Module:
        program = external.load(written(write, model.eval(), folder / "net"), ["code"])
        assert isinstance(program, ExportedProgram)
        return build_model(program, CLASSES, SHAPE)

    return loaded


def traced(model: nn.Module, path: Path) -> None:
    torch.jit.trace(model, images(2), check_trace=False).save(path)


def frozen_program(model: nn.Module, path: Path) -> None:
    torch.jit.freeze(torch.jit.script(model)).save(path)


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "module": lambda model, folder: build_model(model, CLASSES, SHAPE),
    "copy": lambda model, folder: copy.deepcopy(build_model(model, CLASSES, SHAPE)),
    "compiled": lambda model, folder: torch.compile(
        build_model(model, CLASSES, SHAPE), backend="eager"
    ),
    "scripted": from_file(scripted),
    "traced": from_file(traced),
    "frozen program": from_file(frozen_program),
    "exported": from_file(exported),
}
# Tracing and exporting know no `Tensor.data`, and freezing drops the detachment.
UNCONVERTED = [(Clamps, "traced"), (Clamps, "exported"), (ClampsDetached, "frozen program")]
CONVERTED = [
    (kind, way)
    for kind in (Clamps, ClampsDetached, Normalises, Rectifies)
    for way in WAYS
    if (kind, way) not in UNCONVERTED
]


def answer(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of their squares at the images, which are a leaf."""
    x = x.detach().requires_grad_()
    logits = model(x)
    (slope,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), slope


def assert_protected(model: nn.Module, wanted: Callable[[Tensor], Tensor], rows: int = 6) -> None:
    x = torch.cat([images(rows), torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)])
    before = x.clone()
    logits, slope = answer(model, x)
    assert torch.equal(x, before)
    expected, direction = answer(lambda seen: wanted(seen.clone()), x)  # type: ignore[arg-type]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(slope, direction)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_writer_computes_the_same_on_a_copy(kind: type[Net]) -> None:
    model, reference = kind(), kind()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    global_state = torch.get_rng_state()
    build_model(model, CLASSES, SHAPE)
    assert model.training
    assert torch.equal(torch.get_rng_state(), global_state)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_protected(model.eval(), reference.eval().forward)
    if kind is not FailsInTraining:
        assert_protected(model.train(), reference.train().forward)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "way"), CONVERTED)
def test_it_does_so_in_every_form(kind: type[Net], way: str, tmp_path: Path) -> None:
    model = WAYS[way](kind(), tmp_path).eval()
    assert_protected(model, kind().eval().forward)


@pytest.mark.filterwarnings("ignore")
def test_a_protected_model_can_be_scripted() -> None:
    model = build_model(Clamps(), CLASSES, SHAPE).eval()
    assert_protected(torch.jit.script(model), Clamps().eval().forward)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_network_takes_no_copy_and_is_refused() -> None:
    with pytest.raises(InputError, match=r"^model=\w+ writes to its input images: .*clone\(\)$"):
        build_model(torch.jit.script(Clamps()), CLASSES, SHAPE)


@pytest.mark.parametrize("architecture", [MLP([8]), SmallCNN(width=2)])
def test_other_models_copy_nothing(architecture: MLP | SmallCNN) -> None:
    for model in (
        build_model(architecture, CLASSES, SHAPE),
        network(architecture, NoNoise(), INFO, 0),
        network(architecture, Gaussian(0.1, at="first"), INFO, 0),
    ):
        assert not model._forward_pre_hooks


class WritingNoise(Switches):
    """Noise that is added in place."""

    def install(self, model: nn.Module, seed: int) -> None:
        put(_WritingLayer(self, seed), model, "input")


class _WritingLayer(NoiseLayer):
    def perturb(self, x: Tensor) -> Tensor:
        return x.add_(0.1 + 0 * self.drawn(x, standard_normal))


@pytest.mark.parametrize("switches", [{"train": False, "predict": True}, {"train": False}, {}])
def test_noise_that_writes_gets_the_copy(switches: dict[str, Any]) -> None:
    model = network(MLP([8]), WritingNoise(**switches), INFO, 0)
    for layer in model.modules():
        if isinstance(layer, NoiseLayer):
            layer.on_predict = True
    x = images()
    before = x.clone()
    noisy = model.eval()(x)
    assert torch.equal(x, before)
    quiet = network(MLP([8]), NoNoise(), INFO, 0).eval()
    torch.testing.assert_close(noisy, quiet(x + 0.1))


def test_bounds_still_go_through_a_protected_model() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(1), nn.Linear(64, CLASSES)).eval()
    honest = nn.Sequential(nn.ReLU(), *model[1:]).eval()
    build_model(model, CLASSES, SHAPE)
    bounds, expected = (net(Interval.around(images(), 0.1)) for net in (model, honest))
    assert torch.equal(bounds.lower, expected.lower)
    assert torch.equal(bounds.upper, expected.upper)


def test_attacked_images_stay_in_the_ball() -> None:
    """The figures are those of the same model with a clamp that writes nothing."""
    threat, data = Threat(Norm.linf, 0.1), Synthetic(image_shape=list(SHAPE), num_classes=CLASSES)
    attacks = {"fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, steps=5, keep_best=True)}
    _, test = data.load()
    before = test.images.clone()
    ledgers = [
        evaluate(
            build_model(model, CLASSES, SHAPE), test, Evaluation(attacks), threat=threat, seed=0
        )
        for model in (Clamps(), ClampsACopy())
    ]
    assert torch.equal(test.images, before)
    clean = test.images[torch.from_numpy(ledgers[0].index)].numpy() / np.float32(255)
    for ledger, honest in zip(*(each.outcomes.values() for each in ledgers), strict=True):
        assert (ledger.broken == honest.broken).all()
        assert ledger.invalid == 0
    assert ledgers[0].adversarial is not None
    assert np.abs(ledgers[0].adversarial[threat] - clean).max() <= 0.1 + 1e-6
