"""`model.weights`: which files fill an architecture, and what is refused of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robusttrain.checkpoints import safetensors_files
from robusttrain.checkpoints.external import CODE, Weights
from robusttrain.checkpoints.initial_weights import DEFAULT, InitialWeights
from robusttrain.errors import InputError
from robusttrain.models import build_model
from robusttrain.models.mlp import MLP
from robusttrain.models.timm import TimmModel
from robusttrain.models.torchvision import TorchvisionModel
from toys.external import CLASSES, SHAPE, images

COLOUR = (3, 32, 32)


class Net(nn.Module):
    """A backbone, and a head beside it."""

    def __init__(self, classes: int = CLASSES, channels: int = 1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6)
        )
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.backbone(x).relu())
        return logits


def net(seed: int, **keys: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**keys).eval()


def filled(
    path: Path, model: nn.Module | None = None, *, trains: bool = True, trust: tuple[str, ...] = (),
    **keys: Any,
) -> tuple[nn.Module, list[str]]:  # fmt: skip
    """A new network with the weights of a file, and the lines about it."""
    model = model or net(8)
    initial = InitialWeights(str(path), **keys)
    given = initial.read(trust)
    assert given is not None
    return model, initial.load_into(model, given, CLASSES, trains=trains)


def same(one: nn.Module, other: nn.Module) -> bool:
    return torch.equal(one.eval()(images()), other.eval()(images()))


def renamed(state: dict[str, Tensor], change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in state.items()}


# --- what is accepted ----------------------------------------------------------------------------

PREFIXES: dict[str, Callable[[str], str]] = {
    "none": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel and compiled": lambda name: f"module._orig_mod.{name}",
    "lightning": lambda name: f"model.module.{name}",
    "no backbone": lambda name: name.removeprefix("backbone."),
    "a backbone beside its head": (
        lambda name: name if name.startswith("fc") else f"model.{name}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", PREFIXES.values(), ids=PREFIXES.keys())
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, change: Callable[[str], str]) -> None:
    theirs = net(7)
    torch.save({"state_dict": renamed(theirs.state_dict(), change)}, tmp_path / "w.pt")
    assert same(filled(tmp_path / "w.pt")[0], theirs)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema", "mine.deeper"])
def test_the_key_chooses_among_several_state_dicts(tmp_path: Path, key: str) -> None:
    plain, averaged = net(6), net(7)
    above, _, below = key.partition(".")
    nested = {above: {below: averaged.state_dict()} if below else averaged.state_dict()}
    torch.save({"state_dict": plain.state_dict(), **nested}, tmp_path / "w.pt")
    assert same(filled(tmp_path / "w.pt")[0], plain)
    assert same(filled(tmp_path / "w.pt", weights_key=key)[0], averaged)


def test_averaged_weights_are_taken_if_there_are_no_others(tmp_path: Path) -> None:
    torch.save({"model_ema": net(7).state_dict()}, tmp_path / "w.pt")
    model, lines = filled(tmp_path / "w.pt")
    assert same(model, net(7))
    assert "under model_ema" in lines[0]


def test_safetensors_are_read_by_content_and_by_name(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.bin"):
        safetensors.torch.save_file(net(7).state_dict(), tmp_path / name)
        assert same(filled(tmp_path / name)[0], net(7))


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.torch.save_file(net(7).state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setattr(safetensors_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'robusttrain\[safetensors\]'"):
        filled(tmp_path / "w.safetensors")


def test_a_pickled_module_needs_consent(tmp_path: Path) -> None:
    for content in (net(7), {"model": net(7), "epoch": 3}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(InputError, match=r"model\.weights=.*trust=\[code\]"):
            filled(tmp_path / "w.pt")
        assert same(filled(tmp_path / "w.pt", trust=(CODE,))[0], net(7))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_said(tmp_path: Path, kind: torch.dtype) -> None:
    torch.save(net(7).to(kind).state_dict(), tmp_path / "w.pt")
    model, lines = filled(tmp_path / "w.pt")
    assert same(model, net(7).to(kind).float())
    assert str(kind).removeprefix("torch.") in lines[-1]


def test_weights_of_a_gpu_are_read_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What torch writes into the file of a tensor on a GPU.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(net(7).state_dict(), tmp_path / "w.pt")
    monkeypatch.undo()
    assert same(filled(tmp_path / "w.pt")[0], net(7))


def test_statistics_outside_of_a_wrapped_network_stay(tmp_path: Path) -> None:
    from robusttrain.config.model_section import Normalised

    torch.save(net(7).state_dict(), tmp_path / "w.pt")
    wrapped = build_model(Normalised(net(8), [0.3], [0.2]), CLASSES, SHAPE)
    model, lines = filled(tmp_path / "w.pt", wrapped)
    assert torch.equal(model(images()), net(7)((images() - 0.3) / 0.2))
    assert lines[0].endswith("values of the configuration: mean [0.3], std [0.2]")


# --- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [lambda layer: layer, parametrizations.weight_norm])
def test_a_head_of_other_classes_keeps_its_new_weights(
    tmp_path: Path, normed: Callable[[nn.Module], nn.Module]
) -> None:
    theirs, ours, fresh = net(7, classes=9), net(8), net(8)
    for model in (theirs, ours, fresh):
        model.fc = normed(model.fc)  # type: ignore[assignment]
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    _, lines = filled(tmp_path / "w.pt", ours)
    expected = theirs.state_dict() | {
        name: value for name, value in fresh.state_dict().items() if name.startswith("fc")
    }
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert [line for line in lines if "(fc) of 9 classes is replaced by one of 5" in line]


def test_a_new_head_is_not_evaluated(tmp_path: Path) -> None:
    torch.save(net(7, classes=9).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="head of 9 classes, and the data set has 5"):
        filled(tmp_path / "w.pt", trains=False)


# --- what is refused -----------------------------------------------------------------------------


def test_names_that_do_not_fit_are_listed_with_the_nearest(tmp_path: Path) -> None:
    state = net(7).state_dict()
    state["backbone.4.wieght"] = state.pop("backbone.4.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError) as caught:
        filled(tmp_path / "w.pt")
    text = str(caught.value)
    assert "not in the file: backbone.4.weight (near backbone.4.wieght)" in text
    assert "not in the model: backbone.4.wieght (near backbone.4.weight)" in text
    assert "model.strict=false" in text
    model, lines = filled(tmp_path / "w.pt", strict=False)
    assert "backbone.4.wieght" in lines[-1]
    assert torch.equal(model.fc.weight, net(7).fc.weight)
    assert torch.equal(model.backbone[4].weight, net(8).backbone[4].weight)


def test_other_channels_are_named_as_such(tmp_path: Path) -> None:
    torch.save(net(7, channels=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="for 3 channels there, for 1 here"):
        filled(tmp_path / "w.pt")


@pytest.mark.parametrize("strict", [True, False])
def test_another_architecture_is_one_message(tmp_path: Path, strict: bool) -> None:
    theirs = MLP(widths=[8]).build(CLASSES, SHAPE)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="is of another architecture: 0 tensors fit"):
        filled(tmp_path / "w.pt", strict=strict)


def test_no_weights_change_if_some_do_not_fit(tmp_path: Path) -> None:
    state = net(7).state_dict()
    del state["backbone.1.bias"]
    torch.save(state, tmp_path / "w.pt")
    model = net(8)
    with pytest.raises(InputError, match=r"not in the file: backbone\.1\.bias"):
        filled(tmp_path / "w.pt", model)
    assert same(model, net(8))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_was_cut_is_one_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save: Any = torch.save if name == "w.pt" else safetensors.torch.save_file
    save(net(7).state_dict(), path)
    for end in (0, 5, 100, path.stat().st_size - 10):
        whole = path.read_bytes()
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"^model\.weights=.*(damaged|empty)") as caught:
            filled(path)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)


def test_a_key_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    torch.save({"model_ema": net(7).state_dict()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"model\.weights_key=model_em .*near it: model_ema"):
        filled(tmp_path / "w.pt", weights_key="model_em")


def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(net(7), images()).save(tmp_path / "w.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match=r"is a program of TorchScript: .*checkpoint=FILE"):
        filled(tmp_path / "w.pt", trust=(CODE,))


def test_a_file_without_weights_names_what_is_in_it(tmp_path: Path) -> None:
    torch.save({"mine": {"deep": net(7).state_dict()}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"name one by model\.weights_key: mine\.deep"):
        filled(tmp_path / "w.pt")


# --- weights of the libraries --------------------------------------------------------------------


def test_default_weights_come_with_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    torch.manual_seed(7)
    theirs = models.squeezenet1_1().eval()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: theirs.state_dict()
    )
    architecture, initial = TorchvisionModel("squeezenet1_1"), InitialWeights(DEFAULT)
    given = initial.default(architecture, COLOUR)
    model = build_model(architecture, 1000, COLOUR)
    initial.load_into(model, given, 1000, trains=False)
    x = torch.rand(2, *COLOUR)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.equal(model.eval()(x), theirs((x - mean[:, None, None]) / std[:, None, None]))
    ten = build_model(architecture, 10, COLOUR)
    lines = initial.load_into(ten, given, 10, trains=True)
    assert "of 1000 classes is replaced by one of 10" in lines[1]


def test_default_weights_of_timm_are_adapted_by_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    torch.manual_seed(7)
    theirs = timm.create_model("test_vit").eval()
    name = "load_state_dict_from_hf"
    monkeypatch.setattr(f"timm.models._builder.{name}", lambda *a, **k: theirs.state_dict())
    size = theirs.pretrained_cfg["input_size"][-1]
    architecture = TimmModel("test_vit", image_size=size)
    initial = InitialWeights(DEFAULT)
    model = build_model(architecture, 1000, (1, 28, 28))
    given = initial.default(architecture, (1, 28, 28))
    initial.load_into(model, given, 1000, trains=False)
    x = torch.rand(2, 1, 28, 28)
    larger = nn.functional.interpolate(
        x.expand(-1, 3, -1, -1), (size, size), mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    assert torch.allclose(model.eval()(x), theirs((larger - mean) / std), atol=1e-5)
    # At another size timm resamples the embeddings of positions.
    assert isinstance(initial.default(TimmModel("test_vit"), COLOUR), Weights)


@pytest.mark.parametrize("architecture", [TorchvisionModel("resnet18"), TimmModel("resnet18")])
def test_a_download_that_fails_is_one_message(
    architecture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **keys: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fails)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fails)
    with pytest.raises(InputError, match=r"cannot be downloaded .*no network; .*weights=FILE"):
        InitialWeights(DEFAULT).default(architecture, COLOUR)


def test_default_weights_for_one_size_say_what_to_set() -> None:
    with pytest.raises(InputError, match=r"give model\.image_size=224"):
        InitialWeights(DEFAULT).default(TorchvisionModel("vit_b_16"), COLOUR)


def test_default_weights_are_of_libraries_only() -> None:
    with pytest.raises(InputError, match="only model=torchvision and model=timm"):
        InitialWeights(DEFAULT).default(MLP(), SHAPE)


@pytest.mark.parametrize("name", ["resnet81", "resnet18.nosuch"])
def test_a_name_that_timm_does_not_have_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=r"near it: .*resnet18"):
        TimmModel(name)


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robusttrain.models.timm.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'robusttrain\[timm\]'"):
        TimmModel()
