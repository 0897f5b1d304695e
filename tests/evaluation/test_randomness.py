"""Randomness that nobody declares is seen at any scale, and rounding is not taken for it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split
from robusttrain.evaluation import Evaluation, model_checks
from robusttrain.evaluation.attack_suite import PassingOver, attack_all, open_session
from robusttrain.evaluation.audit import PIECES, PIECES_OF_DRAWS, audit, pieces_of
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.randomness import LOOKS, SHARE, UNITS, apart, repeated
from robusttrain.evaluation.voting import classes_and_randomness
from robusttrain.models.first_conv import FirstConv2d
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.noise.gaussian import Gaussian
from robusttrain.threat import Norm, Threat

CLASSES = 5


def bytes_of(count: int = 16, seed: int = 1) -> Tensor:
    """Images as data sets have them: on the grid of bytes, many pixels black or white."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, 4, 4, generator=generator) * 3 - 1
    return (pixels.clamp(0, 1) * 255).round() / 255


class Plain(nn.Module):
    """offset + scale (W h), with h of 32 hidden units; subclasses change h or the way to sum up."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0, classes: int = CLASSES) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(16, 32), nn.Linear(32, classes)

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden

    def summed(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.last(hidden)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype)
        hidden = self.changed(self.first(x.flatten(1)).tanh(), x)
        return self.offset + self.scale * self.summed(hidden)


class Dropping(Plain):
    """Dropout in any mode."""

    p = 0.5

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        return F.dropout(hidden, self.p, training=True)


class Rarely(Dropping):
    """It drops one of the outputs in a hundred, and has few of them."""

    p = 0.01

    def summed(self, hidden: Tensor) -> Tensor:
        return F.dropout(super().summed(hidden), self.p, training=True)

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden


class OffTheGrid(Plain):
    """Noise for images that are not of bytes, as attacked ones are."""

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        off = (x * 255 - (x * 255).round()).abs().flatten(1).amax(1, keepdim=True) > 0.01
        return hidden + off * torch.randn_like(hidden)


class FarAway(Plain):
    """Noise for images with more grey than those that it knows, as large perturbations leave."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.known = bytes_of().flatten(1)

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        gaps = (x.flatten(1)[:, None] - self.known).abs().amax(2).amin(1)
        return hidden + (gaps > 8 / 255)[:, None] * torch.randn_like(hidden)


class OneImage(Plain):
    """Noise for one of the images, and in one class."""

    def summed(self, hidden: Tensor) -> Tensor:
        logits = super().summed(hidden).clone()
        logits[-1, 2] += 0.1 * torch.randn(())
        return logits


class OwnStream(Plain):
    """Noise from a stream that torch's global one has nothing to do with."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.stream = np.random.default_rng(0)

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden + torch.from_numpy(self.stream.normal(size=hidden.shape)).to(hidden)


class InTurn(Plain):
    """Differs from pass to pass by nothing that is drawn."""

    turn = 0

    def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
        self.turn += 1
        return hidden * (1 + 0.1 * (self.turn % 2))


class Reordered(Plain):
    """Adds in another order in each pass, as some devices do; the offset is one of the terms."""

    def __init__(self, scale: float = 1.0, offset: float = 0.0, classes: int = CLASSES) -> None:
        super().__init__(scale, 0.0, classes)
        self.term = offset / scale

    def summed(self, hidden: Tensor) -> Tensor:
        parts = hidden[:, None] * self.last.weight
        own = torch.full_like(parts[:, :, :1], self.term)
        parts = torch.cat([parts, own, self.last.bias[:, None].expand_as(own)], 2)
        total = torch.zeros_like(parts[:, :, 0])
        for term in torch.randperm(parts.shape[2]).tolist():
            total = total + parts[:, :, term]
        return total


def is_random(model: nn.Module, x: Tensor) -> bool:
    """What evaluation takes the model for; what the check of a model says must be the same."""
    torch.manual_seed(3)
    classes, random = classes_and_randomness(model.eval(), x)
    torch.manual_seed(3)
    finding = model_checks.train_mode(model, x)
    assert ("two passes" in finding.message) == random
    assert (finding.figure > 0) == bool(finding.message)
    assert classes == model(x).shape[1]
    return random


SCALES = [(1.0, 0.0), (1e-6, 0.0), (1e6, 0.0), (1e-30, 0.0), (1.0, 1e4), (1.0, -1e4), (1e3, 1e6)]
RANDOM: list[type[Plain]] = [
    Dropping, Rarely, OffTheGrid, FarAway, OneImage, OwnStream, InTurn,
]  # fmt: skip

scales = pytest.mark.parametrize(("scale", "offset"), SCALES)


@scales
@pytest.mark.parametrize("kind", RANDOM)
def test_undeclared_randomness_is_seen(kind: type[Plain], scale: float, offset: float) -> None:
    assert is_random(kind(scale, offset), bytes_of())


@scales
@pytest.mark.parametrize("kind", [Plain, Reordered])
@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize("count", [1, 16])
def test_rounding_is_no_randomness(
    kind: Callable[..., Plain], scale: float, offset: float, classes: int, count: int
) -> None:
    model = kind(scale, offset, classes)
    assert not is_random(model, bytes_of(count))


def test_sums_in_another_order_do_differ() -> None:
    """As otherwise the test above would prove nothing."""
    for scale, offset in SCALES:
        model, x = Reordered(scale, offset), bytes_of()
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [Plain, Reordered, Dropping])
def test_other_number_formats(kind: type[Plain], dtype: torch.dtype) -> None:
    """Wherever their results end up: outputs may be float32 though nothing else is."""

    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = kind().to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x).float()
            return logits

    for model in (kind().to(dtype), Widened()):
        assert is_random(model, bytes_of()) == (kind is Dropping)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("count", [4, 64])
def test_rare_draws_of_few_images_are_seen(p: float, count: int) -> None:
    """At p = .01 two passes over 4 images and 5 outputs are the same with probability 2/3."""
    model = Rarely()
    model.p = p
    assert is_random(model, bytes_of(count))


def reordering(model: nn.Module) -> nn.Module:
    """`model` with the channels that each layer adds up in another order in every pass."""

    def convolution(self: nn.Conv2d, x: Tensor) -> Tensor:
        order = torch.randperm(self.weight.shape[1])
        weight = self.weight[:, order]
        return F.conv2d(x[:, order], weight, self.bias, self.stride, self.padding)

    def linear(self: nn.Linear, x: Tensor) -> Tensor:
        order = torch.randperm(self.weight.shape[1])
        return F.linear(x[:, order], self.weight[:, order], self.bias)

    for module in model.modules():
        kinds: Any = {nn.Linear: linear, nn.Conv2d: convolution, FirstConv2d: convolution}
        if type(module) in kinds:
            module.forward = kinds[type(module)].__get__(module)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_deep_network_with_batchnorm_is_not_random(dtype: torch.dtype, factor: float) -> None:
    """With statistics of its own, and with all of its sums in another order each time."""
    torch.manual_seed(0)
    network = PreActResNet(blocks=[2, 2, 2, 2], width=16).build(10, (3, 16, 16))
    x = torch.rand(8, 3, 16, 16)
    for _ in range(10):
        network.train()(torch.rand_like(x))
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.mul_(factor)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x.to(dtype))
            return logits

    model = Cast()
    assert not is_random(model, x)
    reordering(model)
    with torch.no_grad():
        assert any(not torch.equal(model(x), model(x)) for _ in range(5))
    assert classes_and_randomness(model, x) == (10, False)


@pytest.mark.parametrize("kind", [Plain, Dropping])
def test_outputs_that_are_no_numbers(kind: type[Plain]) -> None:
    class Broken(kind):  # type: ignore[misc, valid-type]
        def summed(self, hidden: Tensor) -> Tensor:
            logits: Tensor = super().summed(hidden).clone()
            logits[1], logits[2, 0], logits[4] = torch.nan, torch.inf, -torch.inf
            return logits

    assert is_random(Broken(), bytes_of()) == (kind is Dropping)


def test_outputs_that_are_no_numbers_now_and_then_are_random() -> None:
    class Sometimes(Plain):
        def summed(self, hidden: Tensor) -> Tensor:
            return super().summed(hidden) / (torch.rand(()) > 0.5)

    assert is_random(Sometimes(), bytes_of())


def test_a_model_that_gives_all_images_the_same_is_not_random() -> None:
    class Constant(Plain):
        def summed(self, hidden: Tensor) -> Tensor:
            return torch.full((len(hidden), CLASSES), 3.0)

    assert not is_random(Constant(), bytes_of())
    assert not is_random(Plain(0.0), bytes_of())


def test_draws_without_consequences_are_no_randomness() -> None:
    class Idle(Plain):
        passes = 0

        def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
            self.passes += 1
            torch.rand(3)
            return F.dropout(hidden, 0.0, training=True)

    model, x = Idle(), bytes_of()
    assert classes_and_randomness(model, x) == (CLASSES, False)
    assert model.passes == 2 * (1 + LOOKS)


def test_declared_noise_is_not_looked_for() -> None:
    model = Plain()
    Gaussian(0.1, predict=True).install(model, 0)
    passes: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    assert classes_and_randomness(model.eval(), bytes_of()) == (CLASSES, True)
    assert passes == [1]
    # Behind it, other randomness is seen all the same.
    for inner, random in ((Plain(), False), (Dropping(), True)):
        Gaussian(0.1, predict=True).install(inner, 0)
        assert bool(model_checks.train_mode(inner, bytes_of()).message) == random


# --- the measure -------------------------------------------------------------------------------


def outputs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("one", "other", "figure"),
    [
        # The spread of the image is 4.
        ([[0.0, 4.0]], [[0.0, 5.0]], 0.25),
        ([[0.0, 4.0]], [[0.0039, 4.0]], 0.0),
        ([[0.0, 4.0]], [[0.0041, 4.0]], 0.0041 / 4),
        # That of the median image is 4, which is more.
        ([[1.0, 1.0], [0.0, 4.0], [0.0, 8.0]], [[1.0, 2.0], [0.0, 4.0], [0.0, 8.0]], 0.25),
        ([[1.0, 1.0], [0.0, 4.0], [0.0, 8.0]], [[1.0, 1.0], [0.0, 4.0], [0.0, 9.0]], 0.125),
        # 2^17 has units of 2^-6 in float32: less than 16 of them say nothing.
        ([[131072.0, 131073.0]], [[131072.25, 131073.0]], 0.0),
        ([[131072.0, 131073.0]], [[131072.5, 131073.0]], 0.5),
        ([[math.nan, 1.0], [0.0, 1.0]], [[math.nan, 1.0], [0.0, 1.0]], 0.0),
        ([[math.nan, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]], math.inf),
        ([[math.inf, 1.0]], [[-math.inf, 1.0]], math.inf),
        ([[1.0, 1.0]], [[2.0, 2.0]], math.inf),
    ],
)
def test_differences_are_shares_of_the_spread(
    one: list[list[float]], other: list[list[float]], figure: float
) -> None:
    found = apart(nn.Identity(), outputs(*one), outputs(*other))
    assert found == pytest.approx(figure, rel=1e-3)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(-60, 60), st.floats(-5, 0), st.floats(-1e3, 1e3))
def test_neither_scale_nor_offset_changes_the_figure(
    seed: int, exponent: int, size: float, offset: float
) -> None:
    """Of outputs in float64, which has digits enough to add an offset."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    other = one + 10**size * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    figure = apart(nn.Identity(), one, other)
    first, second = ((logits + offset) * 2.0**exponent for logits in (one, other))
    assert apart(nn.Identity(), first, second) == pytest.approx(figure, rel=1e-6, abs=1e-9)
    assert figure == 0 or figure > SHARE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_coarsest_format_decides_what_is_rounding(dtype: torch.dtype) -> None:
    unit = UNITS * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    one = outputs([0.0, 1.0], [0.0, 1.0])
    limit = max(SHARE, unit)
    for size, seen in ((0.9 * limit, False), (1.1 * limit, True)):
        for model, kind in ((nn.Linear(1, 1).to(dtype), torch.float32), (nn.Identity(), dtype)):
            other = one + torch.tensor([size, 0.0])
            if kind is torch.float32:
                assert (apart(model, one, other) > 0) == seen


def test_perturbed_images_are_images_and_not_of_bytes() -> None:
    """The look at them is at each other size, the smallest one within a byte."""
    shown: list[Tensor] = []

    class Watching(Plain):
        def changed(self, hidden: Tensor, x: Tensor) -> Tensor:
            shown.append(x)
            return hidden

    for x in (bytes_of(), torch.zeros(9, 1, 4, 4), torch.ones(9, 1, 4, 4), bytes_of(1)):
        shown.clear()
        found = repeated(Watching(), x)
        assert torch.equal(found.outputs, Watching()(x))
        clean, again, moved, once_more, _ = shown
        assert torch.equal(clean, x)
        assert torch.equal(again, x)
        assert torch.equal(once_more, moved)
        assert moved.min() >= 0
        assert moved.max() <= 1
        # Black and white pixels as well, which a cut to the box would leave every other time.
        assert (moved != x).float().mean() > 0.99
        sizes = (moved - x).abs().flatten(1).amax(1)
        assert 0 < sizes[0] <= 1 / 510 + 1e-6
        assert len(x) == 1 or sizes[-1] > 0.25
        grid = (moved * 255 - (moved * 255).round()).abs().flatten(1).amax(1)
        assert (grid > 0.05).all()


# --- evaluation --------------------------------------------------------------------------------

EPS, EOT, VOTES, STEPS = 0.1, 3, 4, 2
PROBE = PGD(eps=EPS, steps=STEPS)


def split() -> Split:
    return Split((bytes_of(12) * 255).to(torch.uint8), torch.arange(12) % CLASSES)


@scales
@pytest.mark.parametrize("kind", [*RANDOM, Plain])
def test_attacks_and_predictions_average_over_draws(
    kind: type[Plain], scale: float, offset: float
) -> None:
    model = kind(scale, offset).eval()
    _, subject = open_session(model, split(), Evaluation(eot=EOT, votes=VOTES), 0)
    assert subject.random == (kind is not Plain)
    # What was seen on all images holds for each.
    assert subject.take(torch.tensor([0])).random == subject.random
    # Looked at before the passes are counted.
    assert subject.climbed is model
    passes: list[bool] = []
    model.register_forward_hook(
        lambda module, inputs, output: passes.append(inputs[0].requires_grad)
    )
    subject.predict(subject.x)
    assert len(passes) == (VOTES if subject.random else 1)
    subject.attack(PROBE, np.arange(12), "pgd", threat=PROBE.threat)
    assert sum(passes) == STEPS * (EOT if subject.random else 1)


@pytest.mark.parametrize("kind", [*RANDOM, Plain])
@pytest.mark.parametrize("declared", [False, True])
def test_rows_without_noise_are_those_of_declared_noise(kind: type[Plain], declared: bool) -> None:
    """Nobody can switch off, or hold, what nobody knows."""
    model = kind().eval()
    Gaussian(0.05, predict=declared).install(model, 0)
    chosen = Evaluation({"pgd": PROBE}, eot=1, votes=2, probe=PROBE)
    index, subject = open_session(model.eval(), split(), chosen, 0)
    suite = chosen.suite(subject.num_classes, subject.random)
    ledger = attack_all(
        subject, index, suite, PassingOver.misclassified, threat=Threat(Norm.linf, EPS)
    )
    advances: list[int] = []
    closer = audit(Probe(subject, PROBE), suite, ledger, advances.append)
    rows = [control.attack for control in closer.controls]
    without = ["noise_off", "noise_off_attacked", "noise_fixed"] if declared else []
    draws = [f"eot_{count}" for count in (1, 5, 20, 80)] if declared or kind is not Plain else []
    assert rows == ["control", *without, *draws]
    names = [check.check for check in closer.checks]
    assert ("80 instead of 20 draws gain" in names) == bool(draws)
    assert ("accuracy lost with fixed or no noise" in names) == declared
    assert len(advances) == pieces_of(subject)
    assert declared or len(advances) == PIECES + PIECES_OF_DRAWS * subject.random
    undeclared = next(c for c in closer.checks if c.check == "undeclared draws change outputs by %")
    assert undeclared.verdict.value == ("fail" if kind is not Plain else "pass")
