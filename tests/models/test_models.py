import copy
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robusttrain.config.folders import CONF
from robusttrain.errors import InputError
from robusttrain.models import Architecture, build_model
from robusttrain.models.conv_net import ConvNet
from robusttrain.models.linear import Linear
from robusttrain.models.madry_cnn import MadryCNN
from robusttrain.models.mlp import MLP
from robusttrain.models.normalize import Normalize
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.torchvision import TorchvisionModel
from robusttrain.models.wide_resnet import WideResNet
from robusttrain.runs.saved_model import load_model
from toys.external import TINY, Answer

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]

# Every family, small enough to differentiate twice quickly.
SMALL: dict[str, Architecture] = {
    "linear": Linear(),
    "mlp": MLP(widths=[12, 7]),
    "small_cnn": SmallCNN(width=4),
    "conv_net": ConvNet(channels=[4, 6, 5], strides=[1, 2, 2], hidden=[9, 7]),
    "contrast": ConvNet(channels=[4], strides=[2], hidden=[], contrast=2.5),
    "madry_cnn": MadryCNN(channels=[4, 6], hidden=9),
    "preact_resnet": PreActResNet(blocks=[1, 1, 1, 1], width=8),
    "wide_resnet": WideResNet(depth=10, width=1),
    "torchvision": TorchvisionModel("resnet18"),
}
NORMALISED = {
    "preact_resnet": PreActResNet,
    "wide_resnet": lambda **keys: WideResNet(depth=10, width=1, **keys),
    "torchvision": TorchvisionModel,
}

every_family = pytest.mark.parametrize("architecture", SMALL.values(), ids=SMALL.keys())
every_normalised = pytest.mark.parametrize("make", NORMALISED.values(), ids=NORMALISED.keys())


def built(
    architecture: Architecture | nn.Module, shape: tuple[int, int, int], classes: int = 10
) -> nn.Module:
    torch.manual_seed(0)
    return build_model(architecture, classes, shape)


def images(shape: tuple[int, int, int], count: int = 4) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def parameter_count(architecture: Architecture, shape: tuple[int, int, int]) -> int:
    with torch.device("meta"):
        model = architecture.build(10, shape)
    return sum(p.numel() for p in model.parameters())


def affine(before: int, after: int) -> int:
    return before * after + after


def convolution(before: int, after: int, kernel: int, bias: bool) -> int:
    return before * after * kernel**2 + bias * after


def block(before: int, after: int, stride: int) -> int:
    """A pre-activation block: two batch norms, two 3 x 3 kernels, perhaps a 1 x 1 shortcut."""
    norms = 2 * before + 2 * after
    kernels = convolution(before, after, 3, False) + convolution(after, after, 3, False)
    projected = before != after or stride != 1
    return norms + kernels + projected * convolution(before, after, 1, False)


class TestParameterCounts:
    def test_linear(self) -> None:
        assert parameter_count(Linear(), (1, 28, 28)) == 784 * 10 + 10

    def test_mlp(self) -> None:
        expected = affine(3072, 256) + affine(256, 256) + affine(256, 10)
        assert parameter_count(MLP(), (3, 32, 32)) == expected

    @pytest.mark.parametrize(("size", "spatial"), [(28, 7 * 7), (8, 2 * 2), (30, 7 * 7)])
    def test_small_cnn(self, size: int, spatial: int) -> None:
        convolutions = convolution(1, 16, 4, True) + convolution(16, 32, 4, True)
        expected = convolutions + affine(32 * spatial, 100) + affine(100, 10)
        assert parameter_count(SmallCNN(), (1, size, size)) == expected

    def test_madry_cnn(self) -> None:
        convolutions = convolution(1, 32, 5, True) + convolution(32, 64, 5, True)
        expected = convolutions + affine(7 * 7 * 64, 1024) + affine(1024, 10)
        assert parameter_count(MadryCNN(), (1, 28, 28)) == expected == 3_274_634

    def test_conv_net(self) -> None:
        convolutions = convolution(1, 32, 3, True) + convolution(32, 32, 4, True)
        convolutions += convolution(32, 64, 3, True) + convolution(64, 64, 4, True)
        hidden = affine(7 * 7 * 64, 512) + affine(512, 512)
        assert parameter_count(ConvNet(), (1, 28, 28)) == convolutions + hidden + affine(512, 10)

    def test_cnn7(self) -> None:
        """The network of Shi et al. 2021 and CTBench, from its YAML."""
        settings = yaml.safe_load((CONF / "model" / "cnn7.yaml").read_text())
        del settings["defaults"]
        widths = [1, 64, 64, 128, 128, 128]
        convolutions = sum(convolution(a, b, 3, True) + 2 * b for a, b in pairwise(widths))
        expected = convolutions + affine(14 * 14 * 128, 512) + 2 * 512 + affine(512, 10)
        assert parameter_count(ConvNet(**settings), (1, 28, 28)) == expected == 13_259_338

    @pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_conv_net_with_other_kernels(self, kernel: int, stride: int) -> None:
        """As torch computes the size of the result, for odd and even sides."""
        settings = ConvNet([2], [stride], kernels=[kernel], hidden=[], batch_norm=True)
        for side in (7, 8):
            assert build_model(settings, 3, (1, side, side + 1))(images((1, side, side + 1))).shape

    def test_conv_net_without_hidden_layers(self) -> None:
        expected = convolution(3, 5, 4, True) + affine(5 * 3 * 4, 10)
        assert parameter_count(ConvNet([5], [2], hidden=[]), (3, 7, 8)) == expected

    def test_preact_resnet18(self) -> None:
        stages = 2 * block(64, 64, 1)
        stages += block(64, 128, 2) + block(128, 128, 1)
        stages += block(128, 256, 2) + block(256, 256, 1)
        stages += block(256, 512, 2) + block(512, 512, 1)
        expected = convolution(3, 64, 3, False) + stages + 2 * 512 + affine(512, 10)
        assert parameter_count(PreActResNet(), (3, 32, 32)) == expected == 11_172_170

    def test_wide_resnet_28_10(self) -> None:
        stages = block(16, 160, 1) + 3 * block(160, 160, 1)
        stages += block(160, 320, 2) + 3 * block(320, 320, 1)
        stages += block(320, 640, 2) + 3 * block(640, 640, 1)
        expected = convolution(3, 16, 3, False) + stages + 2 * 640 + affine(640, 10)
        # The paper rounds it to 36.5M.
        assert parameter_count(WideResNet(), (3, 32, 32)) == expected == 36_479_194

    def test_torchvision_resnet18_changes_only_the_head(self) -> None:
        imagenet = 11_689_512
        expected = imagenet - affine(512, 1000) + affine(512, 10)
        assert parameter_count(TorchvisionModel("resnet18"), (3, 32, 32)) == expected


@every_family
class TestEveryFamily:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_logits(self, architecture: Architecture, shape: tuple[int, int, int]) -> None:
        logits = built(architecture, shape, classes=7)(images(shape))
        assert logits.shape == (4, 7)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    def test_images_need_not_be_square(self, architecture: Architecture) -> None:
        assert built(architecture, (3, 16, 24))(images((3, 16, 24))).shape == (4, 10)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_channels_last_changes_nothing(
        self, architecture: Architecture, shape: tuple[int, int, int]
    ) -> None:
        model, x = built(architecture, shape).eval(), images(shape)
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        actual = model(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    def test_a_copy_is_equal_and_independent(self, architecture: Architecture) -> None:
        model, x = built(architecture, (1, 8, 8)).eval(), images((1, 8, 8))
        expected = model(x)
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(twin(x), expected)

    def test_the_state_dict_rebuilds_the_network(self, architecture: Architecture) -> None:
        model, x = built(architecture, (1, 8, 8)).eval(), images((1, 8, 8))
        other = architecture.build(10, (1, 8, 8)).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_gradients_can_be_differentiated(
        self, architecture: Architecture, memory_format: torch.memory_format
    ) -> None:
        model = built(architecture, (1, 8, 8)).to(memory_format=memory_format)
        x = images((1, 8, 8)).to(memory_format=memory_format).requires_grad_()
        loss = cross_entropy(model(x), torch.arange(4))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.abs().sum()).backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(slopes) == len(list(model.parameters()))
        assert all(slope.isfinite().all() for slope in slopes)

    def test_forward_in_train_mode_is_not_random(self, architecture: Architecture) -> None:
        model = built(architecture, (1, 8, 8)).train()
        before = torch.get_rng_state()
        model(images((1, 8, 8)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_seed_decides_the_weights(self, architecture: Architecture) -> None:
        first, second = (built(architecture, (1, 8, 8)).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


class TestNormalize:
    def test_per_channel_by_hand(self) -> None:
        x = torch.full((1, 2, 1, 1), 0.5)
        y = Normalize([0.5, 0.1], [1.0, 0.2], channels=2)(x)
        torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 2.0]))

    def test_one_number_serves_all_channels(self) -> None:
        x = images((3, 4, 4))
        one, three = Normalize([0.4], [0.3], 3), Normalize([0.4] * 3, [0.3] * 3, 3)
        assert torch.equal(one(x), three(x))

    @every_normalised
    def test_a_shifted_mean_is_a_shifted_image(self, make: type[PreActResNet]) -> None:
        model = built(make(mean=[0.5, 0.4, 0.3], std=[0.25]), (3, 8, 8)).eval()
        shifted = built(make(mean=[0.6, 0.6, 0.6], std=[0.25]), (3, 8, 8)).eval()
        x, shift = images((3, 8, 8)), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(shifted(x + shift), model(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(shifted(x), model(x), rtol=1e-4, atol=1e-4)

    @every_normalised
    def test_std_scales_the_centred_image(self, make: type[PreActResNet]) -> None:
        model = built(make(mean=[0.0], std=[0.25]), (1, 8, 8)).eval()
        wider = built(make(mean=[0.0], std=[0.5]), (1, 8, 8)).eval()
        x = images((1, 8, 8))
        torch.testing.assert_close(wider(2 * x), model(x))

    @every_normalised
    def test_wrong_statistics_are_refused(self, make: type[PreActResNet]) -> None:
        with pytest.raises(InputError, match=r"std=\[0\.0\] .* above 0"):
            make(std=[0.0])
        with pytest.raises(InputError, match=r"mean=\[nan\] .* finite"):
            make(mean=[float("nan")])
        with pytest.raises(InputError, match=r"mean=\[0\.1, 0\.2\] .* channel of the images \(3\)"):
            built(make(mean=[0.1, 0.2]), (3, 8, 8))
        with pytest.raises(InputError, match=r"^std=\[\] is not allowed"):
            built(make(std=[]), (1, 8, 8))


class TestResidual:
    @pytest.mark.parametrize("make", [PreActResNet, lambda: WideResNet(depth=10, width=4)])
    def test_initial_spread_is_he_s(self, make: type[PreActResNet]) -> None:
        for module in built(make(), (3, 8, 8)).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                ratio = module.weight.std() * (fan_out / 2) ** 0.5
                assert ratio.item() == pytest.approx(1, rel=0.05)

    def test_each_stage_but_the_first_halves_the_image(self) -> None:
        model = built(PreActResNet(blocks=[2, 1, 1], width=2), (1, 16, 16))
        sizes = []
        for module in model:
            if isinstance(module, nn.Sequential):
                module.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
        model(images((1, 16, 16)))
        assert sizes == [(2, 16, 16), (4, 8, 8), (8, 4, 4)]

    def test_a_block_without_weights_passes_its_input_on(self) -> None:
        model = built(PreActResNet(blocks=[2], width=3), (1, 8, 8))
        stage = next(module for module in model if isinstance(module, nn.Sequential))
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        x = images((3, 8, 8))
        assert torch.equal(stage(x), x)

    @pytest.mark.parametrize("width", [3, 8])
    def test_a_narrow_shortcut_is_a_strided_convolution(self, width: int) -> None:
        """Where oneDNN's own convolution would write out of bounds."""
        model = built(PreActResNet(blocks=[1, 1], width=width), (1, 8, 8))
        (shortcut,) = (m.shortcut for m in model.modules() if getattr(m, "shortcut", None))
        x = images((width, 7, 8))
        expected = F.conv2d(x, shortcut.weight, stride=2)
        assert torch.allclose(shortcut(x), expected, atol=1e-6)

    def test_a_narrow_network_trains_in_channels_last(self) -> None:
        """In a separate process, since overwritten memory may crash it anywhere, later."""
        code = (
            "import torch\n"
            "from robusttrain.models.preact_resnet import PreActResNet\n"
            "model = PreActResNet(blocks=[1, 1], width=4).build(10, (1, 8, 8))\n"
            "model.to(memory_format=torch.channels_last)\n"
            "for _ in range(40):\n"
            "    x = torch.rand(64, 1, 8, 8).contiguous(memory_format=torch.channels_last)\n"
            "    model(x).sum().backward()\n"
            "    kept = [bytearray(size) for size in range(1, 3000, 37)]\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_dropout_acts_in_train_mode_only(self) -> None:
        model = built(WideResNet(depth=10, width=1, dropout=0.5), (1, 8, 8))
        x = images((1, 8, 8))
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


class TestConvNet:
    def test_a_stride_of_two_halves_the_image(self) -> None:
        model = built(ConvNet([2, 3, 4, 5], [1, 2, 1, 2], []), (1, 14, 9))
        sizes = []
        for module in model:
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
        model(images((1, 14, 9)))
        assert sizes == [(2, 14, 9), (3, 7, 4), (4, 7, 4), (5, 3, 2)]

    @pytest.mark.parametrize("stride", [1, 2])
    def test_a_convolution_by_hand(self, stride: int) -> None:
        model, x = built(ConvNet([2], [stride], []), (1, 6, 6)), images((1, 6, 6), 1)
        kernel, bias = model[0].weight, model[0].bias
        size, padded = kernel.shape[-1], nn.functional.pad(x, (1, 1, 1, 1))
        for row, column in [(0, 0), (1, 2)]:
            top, left = stride * row, stride * column
            window = padded[0, :, top : top + size, left : left + size]
            expected = (kernel * window).sum((1, 2, 3)) + bias
            torch.testing.assert_close(model[0](x)[0, :, row, column], expected)


class TestTorchvision:
    def test_grey_is_the_same_picture_in_three_channels(self) -> None:
        grey = built(TorchvisionModel("resnet18"), (1, 8, 8)).eval()
        colour = built(TorchvisionModel("resnet18"), (3, 8, 8)).eval()
        x = images((1, 8, 8))
        torch.testing.assert_close(grey(x), colour(x.repeat(1, 3, 1, 1)))

    def test_googlenet_has_no_second_output_in_train_mode(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = built(TorchvisionModel("googlenet"), (3, 32, 32)).train()
        assert model(images((3, 32, 32))).shape == (4, 10)

    def test_inception_has_no_second_output_in_train_mode(self) -> None:
        with torch.device("meta"):
            model = TorchvisionModel("inception_v3").build(10, (3, 75, 75)).train()
            assert model(torch.zeros(2, 3, 75, 75)).shape == (2, 10)

    def test_vision_transformers_take_small_images(self) -> None:
        with torch.device("meta"):
            model = TorchvisionModel("vit_b_16").build(10, (3, 32, 32))
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)

    def test_an_unknown_name_gets_close_ones(self) -> None:
        with pytest.raises(InputError, match=r"name=resnet81 is not .*resnet18"):
            TorchvisionModel("resnet81")

    def test_two_channels_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"name=resnet18 cannot take images of 2 channels"):
            built(TorchvisionModel("resnet18"), (2, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(widths=[8, 0]), r"widths=\[8, 0\]"),
        (lambda: SmallCNN(width=0), "width=0"),
        (lambda: ConvNet(channels=[], strides=[]), r"channels=\[\]"),
        (lambda: ConvNet(channels=[4, 0], strides=[1, 1]), r"channels=\[4, 0\]"),
        (lambda: ConvNet(channels=[4], strides=[1, 2]), r"strides=\[1, 2\] .* list of 1 numbers"),
        (lambda: ConvNet(channels=[4], strides=[3]), r"strides=\[3\] .* each 1 or 2"),
        (lambda: ConvNet(hidden=[512, 0]), r"hidden=\[512, 0\]"),
        (lambda: MadryCNN(channels=[]), r"channels=\[\]"),
        (lambda: MadryCNN(hidden=0), "hidden=0"),
        (lambda: PreActResNet(blocks=[]), r"blocks=\[\]"),
        (lambda: PreActResNet(blocks=[2, 0]), r"blocks=\[2, 0\]"),
        (lambda: PreActResNet(width=0), "width=0"),
        (lambda: WideResNet(depth=27), r"depth=27 .* 10, 16, 22, 28"),
        (lambda: WideResNet(depth=4), "depth=4"),
        (lambda: WideResNet(width=0), "width=0"),
        (lambda: WideResNet(dropout=1.0), r"dropout=1\.0"),
    ],
)
def test_values_out_of_range_are_refused(make: type[MLP], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@dataclass
class _Given:
    """An architecture whose network is made by the test."""

    network: nn.Module = field(repr=False)

    def build(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        return self.network


class _TwoHeads(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _Wordless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


class _Defective(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a defect")


class TestBuildModel:
    def test_the_trial_costs_no_randomness(self) -> None:
        noisy = _Given(nn.Sequential(nn.Flatten(1), nn.Linear(64, 10), nn.RReLU()))
        noisy.network[2].eval = lambda: noisy.network[2]  # type: ignore[method-assign]
        for architecture in (noisy, SmallCNN(width=2)):
            torch.manual_seed(3)
            architecture.build(10, (1, 8, 8))
            expected = torch.get_rng_state()
            torch.manual_seed(3)
            build_model(architecture, 10, (1, 8, 8))
            assert torch.equal(torch.get_rng_state(), expected)

    def test_the_trial_leaves_batch_norm_and_modes_alone(self) -> None:
        norm, frozen = nn.BatchNorm1d(64), nn.BatchNorm1d(64).eval()
        model = build_model(
            _Given(nn.Sequential(nn.Flatten(1), norm, frozen, nn.Linear(64, 10))), 10, (1, 8, 8)
        )
        assert model.training
        assert norm.training
        assert not frozen.training
        assert norm.num_batches_tracked == 0
        assert torch.equal(norm.running_var, torch.ones(64))

    def test_too_small_images_are_refused_in_one_line(self) -> None:
        expected = (
            r"^model TorchvisionModel\(name='squeezenet1_1'.*\) "
            r"cannot take images of shape \(1, 8, 8\): .*too small"
        )
        with pytest.raises(InputError, match=expected) as caught:
            built(TorchvisionModel("squeezenet1_1"), (1, 8, 8))
        assert "\n" not in str(caught.value)

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    @pytest.mark.parametrize("architecture", [SmallCNN(width=2), MadryCNN(hidden=2)])
    def test_images_that_vanish_are_refused(self, architecture: Architecture) -> None:
        with pytest.raises(InputError, match=r"cannot take images of shape \(1, 3, 3\)"):
            built(architecture, (1, 3, 3))

    def test_a_patch_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(InputError, match="indivisible by patch size"):
            built(TorchvisionModel("vit_b_16"), (1, 28, 28))

    def test_the_first_of_two_outputs_has_to_be_the_logits(self) -> None:
        with pytest.raises(InputError, match=r"returns a tensor of shape \(2, 1, 8, 8\), not"):
            built(_Given(_TwoHeads()), (1, 8, 8))

    def test_a_wrong_number_of_logits_is_refused(self) -> None:
        model = nn.Sequential(nn.Flatten(1), nn.Linear(64, 9))
        with pytest.raises(InputError, match=r"returns a tensor of shape \(2, 9\), not logits"):
            built(_Given(model), (1, 8, 8))

    def test_a_failure_without_words_is_named(self) -> None:
        with pytest.raises(InputError, match=r"^model _Given\(\) .*: AssertionError$"):
            built(_Given(_Wordless()), (1, 8, 8))

    def test_defects_are_not_blamed_on_the_images(self) -> None:
        with pytest.raises(KeyError, match="a defect"):
            built(_Given(_Defective()), (1, 8, 8))

    def test_a_network_is_tried_and_used_as_it_is(self) -> None:
        network = nn.Sequential(nn.Flatten(1), nn.Linear(64, 10))
        assert built(network, (1, 8, 8)) is network
        message = (
            r"^model Sequential cannot take images of shape \(3, 8, 8\): .*\(2x192 and 64x10\)"
        )
        with pytest.raises(InputError, match=message) as caught:
            built(network, (3, 8, 8))
        assert "\n" not in str(caught.value)

    def test_a_network_that_wants_more_than_images_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"^model Bilinear cannot .* missing 1 required"):
            built(nn.Bilinear(4, 4, 10), (1, 8, 8))

    @pytest.mark.parametrize("plan", [dict, (1, 2), nn.Linear])
    def test_what_builds_no_network_is_refused(self, plan: Any) -> None:
        with pytest.raises(InputError, match=r"must be .* nn\.Module.* or .*build\(num_classes, "):
            built(plan, (1, 8, 8))


def gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of the sum of their squares in the images."""
    point = x.clone().requires_grad_()
    logits = model(point)
    return logits, torch.autograd.grad(logits.square().sum(), point)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@every_family
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_a_script_computes_what_its_network_computes(
    architecture: Architecture, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    model, x = built(architecture, shape).eval(), images(shape)
    torch.jit.script(model).save(tmp_path / "script.pt")
    scripted = torch.jit.load(tmp_path / "script.pt")
    torch.testing.assert_close(gradient(scripted, x), gradient(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_the_model_of_a_default_run_is_scripted(tmp_path: Path) -> None:
    Answer(tmp_path / "run", *TINY, "stages=[train]")
    model, x = load_model(tmp_path / "run"), images(SHAPES[0])
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
