"""State dicts of other tools: how they are loaded; and files without a model."""

import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusttrain.checkpoints import external
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.checkpoints.external import ExportedProgram, Weights
from robusttrain.errors import InputError
from robusttrain.models import build_model
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.torchvision import TorchvisionModel
from robusttrain.noise.gaussian import Gaussian
from robusttrain.runs.saved_model import load_model
from toys.external import CLASSES, SHAPE, images

RESNET = PreActResNet(blocks=[1, 1], width=4, mean=[0.4], std=[0.2])


def trained(architecture: Any = RESNET) -> nn.Module:
    """A network whose weights and statistics differ from those of any new one."""
    torch.manual_seed(7)
    network: nn.Module = architecture.build(CLASSES, SHAPE)
    network(torch.rand(30, *SHAPE))
    return network.eval()


def weights_in(path: Path) -> Weights:
    weights = external.load(path)
    assert isinstance(weights, Weights)
    return weights


def loaded(path: Path, architecture: Any = RESNET) -> tuple[nn.Module, str]:
    """The architecture with the weights of a file, and the line that was printed."""
    torch.manual_seed(8)
    model = build_model(architecture, CLASSES, SHAPE)
    return model.eval(), weights_in(path).load_into(model, path)


# --- state dicts -------------------------------------------------------------------------------

NESTED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "alone": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda tensors: {"model_state_dict": tensors, "loss": 0.5},
    "model": lambda tensors: {"args": ["--wide"], "model": tensors},
    "net": lambda tensors: {"net": tensors, "acc": 95.0},
}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED.keys())
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "model."])
def test_a_state_dict_is_found_wherever_scripts_put_it(
    tmp_path: Path, nest: Callable[[dict[str, Tensor]], Any], prefix: str
) -> None:
    theirs = trained()
    tensors = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save(nest(tensors), tmp_path / "theirs.pt")
    model, _ = loaded(tmp_path / "theirs.pt")
    assert torch.equal(model(images()), theirs(images()))


def test_other_ways_to_save_a_state_dict(tmp_path: Path) -> None:
    theirs, path = trained(), tmp_path / "theirs.pt"
    state = theirs.state_dict()
    ways: list[Callable[[], None]] = [
        lambda: torch.save(state, path, _use_new_zipfile_serialization=False),
        lambda: torch.save({k: nn.Parameter(v, False) for k, v in state.items()}, path),
        lambda: torch.save({k: v.double() if v.is_floating_point() else v
                            for k, v in state.items()}, path),
        # Before torch 0.4.1, BatchNorm had no counter.
        lambda: torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path),
    ]  # fmt: skip
    for save in ways:
        save()
        model, _ = loaded(path)
        assert torch.equal(model(images()), theirs(images()))


def test_a_wrapped_model_is_loaded_as_it_was_wrapped(tmp_path: Path) -> None:
    """The prefixes are real ones of torch, not invented by the test."""
    theirs, path = trained(), tmp_path / "theirs.pt"
    for wrapped in (nn.DataParallel(theirs), torch.compile(theirs)):
        torch.save(wrapped.state_dict(), path)
        model, _ = loaded(path)
        assert torch.equal(model(images()), theirs(images()))


def test_statistics_in_the_file_are_the_models(tmp_path: Path) -> None:
    theirs = trained()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    model, line = loaded(tmp_path / "theirs.pt", PreActResNet(blocks=[1, 1], width=4))
    assert torch.equal(model(images()), theirs(images()))
    assert line.endswith("the model normalises with the values of the file: mean [0.4], std [0.2]")


def test_statistics_that_are_missing_are_those_of_the_configuration(tmp_path: Path) -> None:
    theirs = trained()
    state = {k: v for k, v in theirs.state_dict().items() if k not in ("0.mean", "0.std")}
    torch.save(state, tmp_path / "theirs.pt")
    model, line = loaded(
        tmp_path / "theirs.pt", PreActResNet(blocks=[1, 1], width=4, mean=[0.7], std=[0.1])
    )
    network = theirs[1:]
    assert torch.equal(model(images()), network((images() - 0.7) / 0.1))
    assert line.endswith("normalises with the values of the configuration: mean [0.7], std [0.1]")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_network_of_torchvision_is_loaded_behind_the_normalisation(
    tmp_path: Path, prefix: str
) -> None:
    from torchvision import models

    torch.manual_seed(3)
    theirs = models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=CLASSES).eval()
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "theirs.pt")
    ours = TorchvisionModel("shufflenet_v2_x0_5", mean=[0.3], std=[0.2])
    model, line = loaded(tmp_path / "theirs.pt", ours)
    colour = ((images() - 0.3) / 0.2).expand(-1, 3, -1, -1)
    assert torch.equal(model(images()), theirs(colour))
    assert "mean [0.3], std [0.2]" in line


def test_a_network_without_normalisation_says_nothing_of_one(tmp_path: Path) -> None:
    torch.save(trained(SmallCNN(2)).state_dict(), tmp_path / "theirs.pt")
    _, line = loaded(tmp_path / "theirs.pt", SmallCNN(2))
    assert line == f"checkpoint={tmp_path / 'theirs.pt'} is a state dict of 8 tensors"


def test_what_does_not_fit_is_counted_and_named_in_a_line(tmp_path: Path) -> None:
    theirs, path = trained().state_dict(), tmp_path / "theirs.pt"
    del theirs["0.mean"], theirs["0.std"]
    theirs["3.0.bn9.weight"] = theirs.pop("3.0.bn2.weight")
    theirs["3.0.bn9.bias"] = theirs.pop("3.0.bn2.bias")
    del theirs["2.0.conv1.weight"]
    theirs["8.weight"] = torch.zeros(7, 8)
    torch.save({"net": {f"module.{k}": v for k, v in theirs.items()}}, path)
    with pytest.raises(InputError) as caught:
        loaded(path)
    assert str(caught.value) == (
        f"checkpoint={path} does not fit the model: keys: 3 missing (first 2.0.conv1.weight), "
        "2 unexpected (first module.3.0.bn9.weight), 1 of another shape "
        "(first module.8.weight: (7, 8) in the checkpoint, (5, 8) in the model)"
    )


def averaged_away(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def of_another_model() -> dict[str, Tensor]:
    return trained(SmallCNN(2)).state_dict()


@pytest.mark.parametrize("key", ["state_dict_ema", "ema", "teacher.weights"])
def test_of_several_state_dicts_the_line_names_the_taken_one_and_others_that_fit(
    tmp_path: Path, key: str
) -> None:
    theirs, path = trained(), tmp_path / "theirs.pt"
    state = theirs.state_dict()
    outer, _, inner = key.partition(".")
    other: Any = averaged_away(state)
    other = {inner: other, "decay": 0.9} if inner else other
    more = {"optimizer": {"state": {0: {"step": torch.tensor(3)}}}, "critic": of_another_model()}
    torch.save({outer: other, "state_dict": state, **more}, path)
    model, line = loaded(path)
    assert torch.equal(model(images()), theirs(images()))
    start = f"checkpoint={path} is a state dict of {len(state)} tensors, which are under state_dict"
    assert line.startswith(f"{start}; {key} would fit, too; the model normalises")


def test_of_several_state_dicts_one_that_fits_is_taken(tmp_path: Path) -> None:
    theirs, path = trained(), tmp_path / "theirs.pt"
    torch.save({"model": of_another_model(), "generator": theirs.state_dict()}, path)
    model, line = loaded(path)
    assert torch.equal(model(images()), theirs(images()))
    assert "which are under generator; model does not fit" in line
    torch.save({"model": of_another_model(), "generator": of_another_model()}, path)
    with pytest.raises(InputError, match="does not fit the model: keys: "):
        loaded(path)


def test_a_file_with_one_state_dict_names_no_other(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    torch.save({"state_dict": trained(SmallCNN(2)).state_dict(), "epoch": 3}, path)
    _, line = loaded(path, SmallCNN(2))
    assert line == f"checkpoint={path} is a state dict of 8 tensors"


def of_lightning(theirs: nn.Module) -> dict[str, Any]:
    tensors = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    tensors["criterion.weight"] = torch.ones(CLASSES)
    return {"epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": tensors}


BESIDE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "averaged": (
        lambda theirs: torch.optim.swa_utils.AveragedModel(theirs).state_dict(),
        "it is of AveragedModel of torch.optim.swa_utils: module.* fits, but 1 tensors "
        "(first n_averaged) are beside it",
    ),
    "lightning": (
        of_lightning,
        "it is of Lightning: model.* fits, but 1 tensors (first criterion.weight) are beside it",
    ),
    "nobody": (
        lambda theirs: of_lightning(theirs)["state_dict"],
        "model.* fits, but 1 tensors (first criterion.weight) are beside it",
    ),
}


@pytest.mark.parametrize(("save", "reason"), BESIDE.values(), ids=BESIDE.keys())
def test_tensors_beside_a_network_that_fits_are_named(
    tmp_path: Path, save: Callable[[nn.Module], Any], reason: str
) -> None:
    theirs, path = trained(), tmp_path / "theirs.pt"
    torch.save(save(theirs), path)
    with pytest.raises(InputError) as caught:
        loaded(path)
    ending = "; save the state dict of that part alone"
    assert str(caught.value) == f"checkpoint={path} does not fit the model: {reason}{ending}"


def test_a_refused_state_dict_changes_nothing(tmp_path: Path) -> None:
    torch.save(trained(SmallCNN(2)).state_dict(), tmp_path / "theirs.pt")
    model = trained()
    before = model(images())
    weights = weights_in(tmp_path / "theirs.pt")
    with pytest.raises(InputError, match="does not fit the model"):
        weights.load_into(model, "theirs.pt")
    assert torch.equal(model(images()), before)


def test_a_state_dict_does_not_take_away_the_noise(tmp_path: Path) -> None:
    theirs = trained()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    model = trained()
    Gaussian(0.3, predict=True).install(model, 0)
    weights_in(tmp_path / "theirs.pt").load_into(model, "theirs.pt")
    assert not torch.equal(model(images()), model(images()))


# --- files without a state dict ------------------------------------------------------------------


class _Executes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_files_without_a_model_are_refused_in_a_line(tmp_path: Path) -> None:
    path, executed = tmp_path / "theirs.pt", tmp_path / "executed"

    def refused(reason: str) -> None:
        with pytest.raises(
            InputError, match=rf"^checkpoint={re.escape(str(path))} .*{reason}"
        ) as e:
            external.load(path)
        assert "\n" not in str(e.value)
        assert not executed.exists()

    for text in (b"", b"hello\n", b"<html>not found</html>", b"PK\x03\x04", b"\x80\x02}q"):
        path.write_bytes(text)
        refused("cannot be read")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.csv", "1,2\n")
    refused("cannot be read")
    for content in (trained(), {"state_dict": {}, "x": _Executes(executed)}):
        torch.save(content, path)
        refused("cannot be read: .*save only the state dict")
    torch.save({"x": _Executes(executed)}, path, _use_new_zipfile_serialization=False)
    refused("cannot be read")
    others: list[Any] = [
        {}, [torch.zeros(3)], torch.zeros(3), {0: torch.zeros(3)}, {"state_dict": {}, "epoch": 1},
        {"weights": {"a": torch.zeros(3)}}, {"net": {"a": 1.0}}, "model",
    ]  # fmt: skip
    for other in others:
        torch.save(other, path)
        refused("neither a checkpoint of robusttrain, nor a state dict .*, nor a program")


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weight=np.zeros(3))


def array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "npz": (arrays, "an archive of NumPy arrays"),
    "npy": (array, "an array of NumPy"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a pointer of Git LFS: .* git lfs pull",
    ),
    "page": (lambda path: path.write_text("<!DOCTYPE html>"), "a web page"),
    "module": (
        lambda path: torch.save(trained(), path),
        r"it holds a torch\.nn\.modules\.container\.Sequential: save only the state dict",
    ),
    "arguments": (
        lambda path: torch.save({"state_dict": {}, "args": Namespace()}, path),
        r"it holds a argparse\.Namespace: save only the state dict",
    ),
}


@pytest.mark.parametrize(("write", "kind"), KINDS.values(), ids=KINDS.keys())
def test_common_files_are_named(tmp_path: Path, write: Callable[[Path], object], kind: str) -> None:
    path = tmp_path / "theirs.pt"
    write(path)
    with pytest.raises(InputError, match=f"cannot be read: it is .*{kind}") as caught:
        external.load(path)
    assert "damaged" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_program_of_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    path.write_bytes(b"not a graph")
    program = external.load(path)
    assert isinstance(program, ExportedProgram)
    with pytest.raises(InputError, match=r"theirs.onnx cannot be loaded as a program of ONNX"):
        program.loaded()


def ours() -> Checkpoint:
    state = trained().state_dict()
    return Checkpoint(state, CLASSES, list(SHAPE), {}, {"model": "preact_resnet18"}, 1, {})


def test_a_checkpoint_of_robusttrain_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    ours().save(path)
    for place in (path, tmp_path):
        assert isinstance(external.load(place), Checkpoint)
    # Its weights under `model` could otherwise be taken for another tool's state dict.
    torch.save({**vars(ours()), "format": "robusttrain checkpoint 0"}, path)
    with pytest.raises(InputError, match="is not a checkpoint of robusttrain"):
        external.load(path)


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    """torch itself reads them without a check."""
    path = tmp_path / "theirs.pt"
    torch.save({"weight": torch.arange(1000.0)}, path)
    content = path.read_bytes()
    place = content.index(torch.arange(1000.0)[500:510].numpy().tobytes())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(InputError, match="damaged"):
        external.load(path)


def test_load_model_refuses_weights_without_their_network(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(InputError, match="is a state dict, without a network"):
        load_model(tmp_path / "theirs.pt")
