"""Exported files against the networks that they were made of, in the runtimes that read them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robusttrain.checkpoints import external
from robusttrain.errors import InputError
from robusttrain.export import Runner
from robusttrain.export.files import FORMATS, FromBytes, compared, write_checked
from robusttrain.export.programs import TorchExport
from robusttrain.models import Architecture, build_model
from robusttrain.models.conv_net import ConvNet
from robusttrain.models.linear import Linear
from robusttrain.models.madry_cnn import MadryCNN
from robusttrain.models.mlp import MLP
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.torchvision import TorchvisionModel
from robusttrain.models.wide_resnet import WideResNet

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

SHAPE = (3, 16, 16)
FAMILIES: dict[str, Architecture] = {
    "linear": Linear(),
    "mlp": MLP(widths=[12, 7]),
    "small_cnn": SmallCNN(width=4),
    "conv_net": ConvNet(channels=[4, 6], strides=[1, 2], hidden=[9]),
    "contrast": ConvNet(channels=[4], strides=[2], hidden=[], contrast=2.5),
    "madry_cnn": MadryCNN(channels=[4, 6], hidden=9),
    "preact_resnet": PreActResNet(blocks=[1, 1, 1, 1], width=8),
    "wide_resnet": WideResNet(depth=10, width=1),
    "torchvision": TorchvisionModel("resnet18", mean=[0.5], std=[0.25]),
}
PROGRAMS = [name for name, format in FORMATS.items() if format.holds_code]


def network(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(FAMILIES[family], 10, SHAPE)
    # Statistics of BatchNorm other than those of a new network.
    with torch.no_grad():
        model.train()(torch.rand(16, *SHAPE))
    return model.eval()


def images(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file of a family in a format, which is written once."""
    folder = tmp_path_factory.mktemp("exported")

    def file(family: str, name: str) -> Path:
        path = folder / f"{family}{FORMATS[name].suffix}"
        if not path.exists():
            about = {"input": "images"}
            write_checked(network(family), images(8), path, FORMATS[name], about)
        return path

    return file


# ONNX takes seconds for each, so that it has one family with each kind of layer.
EACH = [
    *((family, name) for family in FAMILIES for name in FORMATS if name != "onnx"),
    *((family, "onnx") for family in ("contrast", "madry_cnn", "preact_resnet")),
]


@pytest.mark.parametrize(("family", "name"), EACH)
@pytest.mark.parametrize("count", [1, 5])
def test_batches_of_any_size_have_the_logits_of_the_network(
    family: str, name: str, count: int, files: Callable[[str, str], Path]
) -> None:
    model = network(family)
    runner = FORMATS[name].opened(files(family, name), model)
    with torch.no_grad():
        torch.testing.assert_close(
            runner(images(count)), model(images(count)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_read_back_with_the_gradients_of_the_network(
    name: str, files: Callable[[str, str], Path]
) -> None:
    path = files("madry_cnn", name)
    loaded = external.load(path, ["code"])
    assert isinstance(loaded, external.ExportedProgram)
    gradients = []
    for model in (network("madry_cnn"), loaded.loaded()):
        x = images(3).requires_grad_()
        model(x).logsumexp(1).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_onnx_needs_no_trust_since_it_has_no_code(files: Callable[[str, str], Path]) -> None:
    assert external.load(files("madry_cnn", "onnx"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_for_bytes_divide_by_255_and_have_no_gradients(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{FORMATS[name].suffix}"
    bytes_ = (images(8) * 255).to(torch.uint8)
    model, about = FromBytes(network("linear")), {"input": "images, uint8, values from 0 to 255"}
    write_checked(model, bytes_, path, FORMATS[name], about)
    logits = FORMATS[name].opened(path, model)(bytes_[:3])
    torch.testing.assert_close(logits, network("linear")(bytes_[:3] / 255), rtol=1e-4, atol=1e-5)
    loaded = external.load(path, ["code"])
    assert isinstance(loaded, external.ExportedProgram)
    with pytest.raises(InputError, match="--uint8"):
        loaded.loaded()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_files_say_what_they_take(name: str, files: Callable[[str, str], Path]) -> None:
    path = files("madry_cnn", name)
    assert metadata(path) == {"input": "images"}


def metadata(path: Path) -> Mapping[str, str]:
    if path.suffix == ".onnx":
        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    if path.suffix == ".safetensors":
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata())
    extra = {"robusttrain.json": ""}
    if path.suffix == ".pt":
        torch.jit.load(path, _extra_files=extra)
    else:
        torch.export.load(path, extra_files=extra)
    return dict(json.loads(extra["robusttrain.json"]))


def test_safetensors_have_the_names_and_values_of_the_state_dict(
    files: Callable[[str, str], Path],
) -> None:
    reader = pytest.importorskip("safetensors.torch")
    saved, own = reader.load_file(files("preact_resnet", "safetensors")), network("preact_resnet")
    assert saved.keys() == own.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in own.state_dict().items())


class Negated(TorchExport):
    """A format that writes another network than it is given."""

    def write(
        self, network: nn.Module, example: Tensor, path: Path, about: Mapping[str, str]
    ) -> None:
        class Other(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return -network.get_submodule("1")(x.flatten(1))

        super().write(Other().eval(), example, path, about)


def test_no_file_is_left_that_computes_something_else(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval()
    with pytest.raises(InputError, match=r"net.pt2 was not written: .* of 8 predictions"):
        write_checked(plain, images(8), tmp_path / "net.pt2", Negated(), {})
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Data(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, : int(x.sum())]

    with pytest.raises(InputError, match=r"net.pt2 cannot be written: "):
        write_checked(Data().eval(), images(8), tmp_path / "net.pt2", FORMATS["torch_export"], {})
    assert not list(tmp_path.iterdir())


def shifted(by: float) -> tuple[nn.Module, Runner]:
    """A network, and a runner whose first logit is larger `by` that much."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval()
    return model, lambda x: model(x) + by * torch.eye(10)[0]


@pytest.mark.parametrize(("by", "passes"), [(1e-5, True), (0.1, False), (float("nan"), False)])
def test_rounding_passes_and_nothing_else_does(by: float, passes: bool) -> None:
    torch.manual_seed(3)
    model, runner = shifted(by)
    if passes:
        assert compared(model, runner, images(8)).difference == pytest.approx(by, rel=0.1)
    else:
        with pytest.raises(InputError, match="computes other logits"):
            compared(model, runner, images(8))
