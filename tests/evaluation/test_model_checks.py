"""What is looked at in a model before it is attacked: each defect is seen, and nothing else is."""

import math

import pytest
import torch
from torch import Tensor, nn

from robusttrain.data import Split, as_input
from robusttrain.errors import InputError
from robusttrain.evaluation import model_checks
from robusttrain.models.linear import Linear
from robusttrain.models.normalize import Normalize
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.noise.gaussian import Gaussian


def images(count: int = 60, channels: int = 1) -> Tensor:
    """Dark images of various contrast, so that no usual normalisation is near their own."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, 4, 4, generator=generator).pow(3)


def seeded(model: nn.Module) -> nn.Module:
    """The model with weights that depend on nothing else."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def linear(channels: int = 1) -> nn.Module:
    return seeded(Linear().build(5, (channels, 4, 4)))


class Stuck(nn.Module):
    """A network that stays in the mode that it is in, as exported programs do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> "Stuck":
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits


# --- images ------------------------------------------------------------------------------------


def split_of(pixels: Tensor) -> Split:
    return Split(pixels.expand(2, 3, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("high", [255, 2])
def test_bytes_of_any_type_are_pixels(dtype: torch.dtype, high: int) -> None:
    pixels = torch.zeros(2, 3, 4, 4).to(dtype)
    pixels[0, 0, 0, 0] = high
    model_checks.refuse_outside_box(split_of(pixels), "mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("high", [1, 2])
def test_pixels_that_pass_are_in_the_box_for_the_model(dtype: torch.dtype, high: int) -> None:
    samples = split_of(torch.full((2, 3, 4, 4), high).to(dtype))
    seen = as_input(samples.images)
    if dtype.is_floating_point == (high == 1):
        model_checks.refuse_outside_box(samples, "mine")
        assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    else:
        with pytest.raises(InputError):
            model_checks.refuse_outside_box(samples, "mine")


def test_black_bytes_are_pixels() -> None:
    model_checks.refuse_outside_box(split_of(torch.zeros(1, dtype=torch.uint8)), "mine")


@pytest.mark.parametrize(
    ("low", "high", "named"),
    [
        (-2.1179, 2.64, "from -2.118 to 2.64"),
        (0.0, 255.0, "from 0 to 255"),
        (0.0, 256.0, "from 0 to 256"),
        (-1.0, 255.0, "from -1 to 255"),
        (0.0, math.nan, "from nan to nan"),
        (0.0, math.inf, "from 0 to inf"),
    ],
)
def test_what_stands_for_no_pixel_is_refused_with_its_range(
    low: float, high: float, named: str
) -> None:
    pixels = torch.full((2, 3, 4, 4), low)
    pixels[1, 2, 3, 0] = high
    with pytest.raises(InputError, match=rf"^dataset=mine .* {named}: .* bytes from 0 to 255"):
        model_checks.refuse_outside_box(split_of(pixels), "mine")


def test_a_sample_is_drawn_from_the_rows_alone_and_from_all_classes() -> None:
    """Test sets may come sorted by class."""
    count = 4 * model_checks.IMAGES
    pixels = torch.arange(count).remainder(256).to(torch.uint8)[:, None, None, None]
    split = Split(pixels, torch.arange(count) // model_checks.IMAGES)
    x, y = model_checks.sample(split, torch.arange(count))
    assert len(x) == len(y) == model_checks.IMAGES
    assert y.bincount().min() > model_checks.IMAGES / 8
    x, y = model_checks.sample(split, torch.tensor([3, 1999]))
    assert sorted((x.flatten() * 255).tolist()) == pytest.approx([3, 1999 % 256])
    assert sorted(y.tolist()) == [0, 3]


# --- gradients ---------------------------------------------------------------------------------


class Cut(nn.Module):
    """A linear model of what is left of an image."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut, self.linear = cut, linear()

    def forward(self, x: Tensor) -> Tensor:
        if self.cut == "no_grad":
            with torch.no_grad():
                logits: Tensor = self.linear(x)
            return logits
        cut = {"detach": x.detach(), "integers": (x * 4).int().float(), "round": x.round()}
        whole: Tensor = self.linear(cut[self.cut])
        return whole


@pytest.mark.parametrize("cut", ["no_grad", "detach", "integers"])
def test_a_model_without_gradients_is_refused_by_name(cut: str) -> None:
    with pytest.raises(InputError, match=r"^model=theirs passes no gradient"):
        model_checks.refuse_without_gradient(Cut(cut), images(), "theirs")


def test_a_gradient_of_0_is_one() -> None:
    """That is for the audit to find."""
    model = Cut("round")
    model_checks.refuse_without_gradient(model, images(), "theirs")
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- softmax -----------------------------------------------------------------------------------


class _Centred(nn.Module):
    """Logits of either sign, which may sum to anything."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True) + 1 / logits.shape[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_probabilities_are_told_from_logits(channels: int) -> None:
    x, logits = images(channels=channels), linear(channels)
    finding = model_checks.softmax_outputs(nn.Sequential(logits, nn.Softmax(1)), x)
    assert finding.figure == 1
    assert "leave out the softmax" in finding.message
    for last in (nn.Identity(), nn.LogSoftmax(1), nn.Sigmoid(), nn.ReLU(), _Centred()):
        finding = model_checks.softmax_outputs(nn.Sequential(logits, last), x)
        assert finding.figure < 1
        assert finding.message == ""


def test_half_precision_is_no_excuse() -> None:
    """1000 probabilities in bfloat16 do not quite sum to 1."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = x.flatten(1).repeat(1, 63)[:, :1000]
            return logits.softmax(1).bfloat16().float()

    assert model_checks.softmax_outputs(Rounded(), images()).message


# --- train mode --------------------------------------------------------------------------------


def dropping(share: float) -> nn.Module:
    return nn.Sequential(linear(), nn.ReLU(), nn.Dropout(share))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return PreActResNet(blocks=[1, 1], width=4).build(5, (1, 4, 4))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_active_dropout_is_seen(share: float) -> None:
    torch.manual_seed(0)
    finding = model_checks.train_mode(Stuck(dropping(share).train()), images())
    assert finding.figure > 0.05
    assert "two passes" in finding.message
    assert model_checks.train_mode(dropping(share).train(), images()).message == ""


class Affine(nn.Module):
    """offset + scale x."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.offset + self.scale * x


@pytest.mark.parametrize("count", [200, 20])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-6, 0), (1e6, 0), (1, 1e4), (1, -1e4)])
def test_statistics_of_the_batch_are_seen(count: int, scale: float, offset: float) -> None:
    """Whatever the outputs are multiplied by, or have in common."""

    def behind(model: nn.Module) -> nn.Module:
        return nn.Sequential(model, Affine(scale, offset))

    finding = model_checks.train_mode(behind(Stuck(residual().train())), images(count))
    assert finding.figure > 0.05
    assert "BatchNorm" in finding.message
    # Frozen at whatever it had, it is an ordinary model.
    for model in (Stuck(residual().eval()), residual().train()):
        finding = model_checks.train_mode(behind(model), images(count))
        assert finding.message == ""
        assert finding.figure < 1e-4


def test_a_batchnorm_without_statistics_of_its_own_is_seen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), linear())
    assert "BatchNorm" in model_checks.train_mode(model, images()).message


@pytest.mark.parametrize("width", [4, 3])
def test_declared_noise_is_no_dropout(width: int) -> None:
    """An image may get other noise in another batch: torch draws it in blocks."""
    model = nn.Sequential(nn.Flatten(1), seeded(nn.Linear(width, 5)))
    Gaussian(0.5, predict=True).install(model, 3)
    assert model_checks.train_mode(model, images()[:, :, :1, :width]).message == ""
    both = nn.Sequential(model, nn.Dropout(0.5))
    finding = model_checks.train_mode(Stuck(both.train()), images()[:, :, :1, :width])
    assert "two passes" in finding.message


# --- normalisation -----------------------------------------------------------------------------

WAYS = {
    "statistics of these images": None,
    "statistics of ImageNet": model_checks.IMAGENET,
    "the range [-1, 1]": ([0.5], [0.5]),
    "the range [0, 255]": ([0.0], [1 / 255]),
}


class Expecting(nn.Module):
    """A network with biases of the size of its inputs, which therefore needs its normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = linear(channels)

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.linear(z.tanh())
        return logits


def normalised(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(x - mean) / std channel by channel, by another road than the one that is tested."""
    means, stds = mean * (x.shape[1] // len(mean)), std * (x.shape[1] // len(std))
    planes = [(x[:, c] - means[c]) / stds[c] for c in range(x.shape[1])]
    return torch.stack(planes, 1)


@pytest.mark.parametrize(("way", "statistics"), WAYS.items(), ids=WAYS.keys())
def test_a_normalisation_outside_of_the_model_is_named(
    way: str, statistics: model_checks.Statistics | None
) -> None:
    """Labels are what the model says of images that are normalised as it expects them."""
    x, model = images(300, 3), Expecting(3)
    planes = [x[:, c] for c in range(3)]
    own = [float(p.mean()) for p in planes], [float(p.std()) for p in planes]
    y = model(normalised(x, *(statistics or own))).argmax(1)
    before = float((model(x).argmax(1) == y).float().mean())
    finding = model_checks.normalisation(model, x, y)
    assert before < 0.9
    assert finding.figure == pytest.approx(1 - before)
    assert f"is {before:.1%} on images in [0, 1], but 100.0% on" in finding.message
    assert way in finding.message
    assert "must be a layer of the model so that eps means pixels" in finding.message


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_that_takes_the_images_as_they_are_is_left_in_peace(channels: int) -> None:
    x, model = images(300, channels), Expecting(channels)
    finding = model_checks.normalisation(model, x, model(x).argmax(1))
    assert finding.figure <= 0
    assert finding.message == ""


def test_another_normalisation_than_that_of_the_model_is_named() -> None:
    """The candidates take the place of the layer, they do not come on top of it."""
    x, network = images(300), Expecting(1)
    raw = network(x).argmax(1)
    wrapped = nn.Sequential(Normalize([0.4], [0.1], 1), network)
    finding = model_checks.normalisation(wrapped, x, raw)
    assert "no normalisation" in finding.message
    assert "mean=[0.0] std=[1.0]" in finding.message
    assert "model.mean and model.std" in finding.message
    for y in (wrapped(x).argmax(1), nn.Sequential(Normalize([0.5], [0.5], 1), network)(x)):
        labels = y if y.dim() == 1 else y.argmax(1)
        finding = model_checks.normalisation(wrapped, x, labels)
        assert ("[-1, 1]" in finding.message) == (y.dim() == 2)


@pytest.mark.parametrize("count", [1, 4, 102])
@pytest.mark.parametrize("inner", [False, True])
def test_what_is_assumed_is_noted_however_few_images_there_are(count: int, inner: bool) -> None:
    """With the accuracy of the best alternative, here the one that the labels are from."""
    x, network = images(count, 3), Expecting(3)
    model = nn.Sequential(Normalize([0.4], [0.3], 3), network) if inner else network
    y = network(normalised(x, *model_checks.IMAGENET)).argmax(1)
    before = float((model(x).argmax(1) == y).float().mean())
    finding = model_checks.normalisation(model, x, y)
    start = "the model is assumed to take images in [0, 1]"
    start += ", which it normalises itself: " if inner else ": "
    assert finding.note.startswith(
        f"{start}clean accuracy is {before:.1%} of {count} images, and would be 100.0% on "
    )
    if count == 102:
        assert "std=[0.229, 0.224, 0.225] (statistics of ImageNet)" in finding.note
    same = model_checks.normalisation(model, x, model(x).argmax(1))
    assert same.message == ""
    assert f"is 100.0% of {count} images, and would be " in same.note


def test_a_channel_that_never_changes_can_be_normalised() -> None:
    x = images(50, 3)
    x[:, 1] = 0.25
    assert math.isfinite(model_checks.normalisation(linear(3), x, torch.zeros(50)).figure)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 7), (5, 5), (30, 9), (400, 90)])
def test_the_odds_are_those_of_a_sign_test(wins: int, losses: int) -> None:
    games = wins + losses
    favourable = sum(math.comb(games, count) for count in range(wins, games + 1))
    assert model_checks._odds(wins, losses) == pytest.approx(favourable / 2**games)


def test_a_gain_that_may_be_luck_is_not_told() -> None:
    """Nine images that only the other normalisation gets right are few, ten are enough."""
    x, model = images(300), Expecting(1)
    plain, other = model(x).argmax(1), model(2 * x - 1).argmax(1)
    differing = (plain != other).nonzero().flatten()
    assert len(differing) > 20
    for count, told in ((9, False), (10, True)):
        y = plain.clone()
        y[differing[:count]] = other[differing[:count]]
        # Of the others that differ, none has a label that either of both gives.
        y[differing[count:]] = 99
        finding = model_checks.normalisation(model, x, y)
        assert bool(finding.message) == told


# --- all together ------------------------------------------------------------------------------


def test_looking_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5).eval(), linear()).train()
    Gaussian(0.1, predict=True).install(model, 0)
    x, y = images(), torch.zeros(60, dtype=torch.int64)
    model(x)
    layer, stuck = model.noise_0, Stuck(dropping(0.5).train())
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    noise, stream = layer.rng_state_dict(), torch.get_rng_state()
    model_checks.refuse_without_gradient(model, x, "mine")
    model_checks.inspect(model, x, y, foreign=True)
    model_checks.inspect(stuck, x, y, foreign=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(layer.rng_state_dict()["cpu"], noise["cpu"])
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("channels", "inner", "more"), [(1, False, 4), (3, False, 5), (3, True, 6)]
)
def test_only_a_foreign_model_costs_further_passes(channels: int, inner: bool, more: int) -> None:
    passes: list[int] = []
    front = Normalize([0.5], [0.5], channels) if inner else nn.Identity()
    model = nn.Sequential(front, linear(channels))
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    x, y = images(100, channels), torch.zeros(100)
    few = 4 * model_checks.BATCH + model_checks.ALONE
    ours = model_checks.inspect(model, x, y, foreign=False)
    assert sum(passes) == 100 + few
    passes.clear()
    theirs = model_checks.inspect(model, x, y, foreign=True)
    assert sum(passes) == 100 * (1 + more) + few
    assert [finding.name for finding in theirs] == [*(f.name for f in ours), "normalisation"]


def test_one_image_is_enough_to_look_at() -> None:
    findings = model_checks.inspect(residual(), images(1), torch.tensor([0]), foreign=True)
    assert [finding.message for finding in findings] == ["", "", ""]
