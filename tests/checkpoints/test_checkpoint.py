"""Checkpoints: nothing is lost, damaged files are refused, and no foreign code is run."""

import copy
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robusttrain.checkpoints import checkpoint
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.errors import InputError
from robusttrain.models.mlp import MLP
from robusttrain.noise.layer import noise_layers
from robusttrain.runs.saved_model import load_model

CLASSES, SHAPE = 3, (1, 2, 2)
MODEL = {"_target_": "robusttrain.models.mlp.MLP", "widths": [5]}
REST = {"norm": "linf", "eps": 0.25, "seed": 1, "data_dir": "data"}
NOISE = {"_target_": "robusttrain.noise.none.NoNoise"}
GAUSSIAN = {
    "_target_": "robusttrain.noise.gaussian.Gaussian",
    "sigma": "${eps}",
    "train": True,
    "predict": True,
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP([5]).build(CLASSES, SHAPE)


def saved(network_: nn.Module | None = None, **config: Any) -> Checkpoint:
    model = network_ or network()
    optimizer = torch.optim.Adam(model.parameters())
    model(images()).sum().backward()
    optimizer.step()
    return Checkpoint(
        model=model.state_dict(),
        num_classes=CLASSES,
        image_shape=list(SHAPE),
        config={**REST, "model": MODEL, "noise": NOISE, **config},
        names={"model": "mlp"},
        epoch=3,
        training={"optimizer": optimizer.state_dict(), "torch": torch.get_rng_state()},
    )


def images() -> Tensor:
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    written = saved()
    written.save(tmp_path / "best.pt")
    for place in (tmp_path / "best.pt", tmp_path, str(tmp_path)):
        read = checkpoint.load(place)
        for key in ("num_classes", "image_shape", "config", "names", "epoch"):
            assert getattr(read, key) == getattr(written, key)
        for key, value in written.model.items():
            assert torch.equal(read.model[key], value)
        assert torch.equal(read.training["torch"], written.training["torch"])
        moments = read.training["optimizer"]["state"][0]["exp_avg"]
        assert torch.equal(moments, written.training["optimizer"]["state"][0]["exp_avg"])
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    saved().save(path)
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(InputError, match=rf"^checkpoint={re.escape(str(path))} cannot be read"):
            checkpoint.load(path)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(path)


def test_damaged_weights_are_refused_or_whole(tmp_path: Path) -> None:
    """Whichever byte is wrong, the loaded weights are never silently different."""
    path = tmp_path / "best.pt"
    written = saved()
    written.save(path)
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 97):
        flipped = bytes([content[position] ^ 0xFF])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            read = checkpoint.load(path)
        except InputError:
            refused += 1
            continue
        for key, value in written.model.items():
            assert torch.equal(read.model[key], value), position
    assert refused > 5


class _Executes:
    """An object that would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"

    def refused() -> None:
        why = "cannot be read: it is|is not a checkpoint of robusttrain"
        with pytest.raises(InputError, match=rf"^checkpoint={re.escape(str(path))} ({why})"):
            checkpoint.load(path)

    for text in (b"", b"\x00", b"hello\n", b"<html>not found</html>", b"PK\x03\x04", b"\x80\x02}q"):
        path.write_bytes(text)
        refused()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.csv", "1,2\n")
    refused()
    others: list[Any] = [
        network().state_dict(),
        {"model": network().state_dict(), "epoch": 3},
        {"format": "robusttrain checkpoint 0", **vars(saved())},
        torch.zeros(3),
        [1, 2],
        {"x": _Executes(tmp_path / "executed")},
        network(),
    ]
    for other in others:
        torch.save(other, path)
        refused()
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)
    refused()
    assert not (tmp_path / "executed").exists()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    places = {tmp_path / "no.pt": "is not there", tmp_path / "no" / "run": "is not there"}
    for place, problem in (places | {tmp_path: "has no best.pt: nothing was trained"}).items():
        with pytest.raises(InputError, match=f"^checkpoint=.* {problem}"):
            checkpoint.load(place)
        # The caller's key is in the message.
        with pytest.raises(InputError, match=f"^run=.* {problem}"):
            load_model(place)


def test_a_failed_save_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    saved().save(path)
    content = path.read_bytes()

    class Unsavable:
        def __reduce__(self) -> Any:
            raise RuntimeError("cannot be written")

    with pytest.raises(OSError, match="is the disk full"):
        replace(saved(), training={"x": Unsavable()}).save(path)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pt"]


def test_weights_of_another_model_are_refused_in_a_line(tmp_path: Path) -> None:
    wider, nested = MLP([6]).build(CLASSES, SHAPE), nn.Sequential(network())
    for other, named in ((wider, r"is \[5, 4\], in the model \[6, 4\]"), (nested, "is missing")):
        before = copy.deepcopy(other.state_dict())
        problem = rf"^checkpoint=run is of another model: \d tensors differ: .*{named}"
        with pytest.raises(InputError, match=problem) as refusal:
            saved().load_into(other, "run")
        assert "\n" not in str(refusal.value)
        after = other.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "nothing is loaded"


def test_a_loaded_model_computes_what_was_saved(tmp_path: Path) -> None:
    model = network()
    saved(model).save(tmp_path / "best.pt")
    for place in (tmp_path, tmp_path / "best.pt"):
        loaded = load_model(place)
        assert not loaded.training
        assert torch.equal(loaded(images()), model.eval()(images()))


def test_a_loaded_model_has_its_noise(tmp_path: Path) -> None:
    saved(noise=GAUSSIAN).save(tmp_path / "best.pt")
    loaded = load_model(tmp_path)
    (layer,) = noise_layers(loaded)
    assert layer.noise.sigma == 0.25
    outputs = torch.stack([loaded(images()) for _ in range(2)])
    assert not torch.equal(*outputs)
    assert torch.equal(load_model(tmp_path)(images()), outputs[0])


def touching(path: Path, target: str) -> dict[str, Any]:
    return {"_target_": target, "command": f"touch {path}", "path": str(path), "name": str(path)}


def test_no_flipped_bit_of_the_directory_changes_the_weights(tmp_path: Path) -> None:
    """The directory of a ZIP archive has no check sum; torch believes what it says of a record."""
    path, flipped = tmp_path / "best.pt", tmp_path / "flipped.pt"
    content = replace(saved(), model={"weight": torch.full((40,), 3.0)})
    content.save(path)
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    whole, refused = path.read_bytes(), 0
    for place in range(start, len(whole)):
        for bit in (0, 4, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            flipped.write_bytes(damaged)
            try:
                found = checkpoint.load(flipped)
            except InputError:
                refused += 1
                continue
            assert torch.equal(found.model["weight"], content.model["weight"]), (place, bit)
    assert refused > 100


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "os.mkdir",
        "robusttrain.report.files.os.system",
        "robusttrain.report.files.os.mkdir",
        "robusttrain.checkpoints.checkpoint.torch.load",
        "robusttrain.checkpoints.checkpoint.load",
        "robusttrain.report.files.Path",
        "robusttrain.models.mlp.nn.Linear",
        "robusttrain.checkpoints.external.ExportedProgram",
        "robusttrain.loggers.mlflow.MLflow",
        "robusttrain.evaluation.cache.Cache",
        "robusttrain_evil.Model",
        "robusttrain",
        "MLP",
        "",
    ],
)
@pytest.mark.parametrize("key", ["model", "noise"])
def test_a_configuration_builds_only_classes_of_the_project(
    tmp_path: Path, target: str, key: str
) -> None:
    executed = tmp_path / "executed"
    evil = touching(executed, target)
    # OmegaConf accepts tuples as lists, and weights_only allows them.
    for node in (evil, {**MODEL, "widths": [evil]}, {**MODEL, "widths": ({"a": evil},)}):
        saved(**{key: node}).save(tmp_path / "best.pt")
        named = rf"would build {re.escape(target)}, which is no component of robusttrain: .*trust"
        with pytest.raises(InputError, match=named):
            load_model(tmp_path)
        assert not executed.exists()


@pytest.mark.parametrize(
    "text",
    [
        "${evil}",
        "${oc.create:'{_target_: os.mkdir, path: PATH}'}",
        "${oc.decode:'{_target_: os.mkdir, path: PATH}'}",
        "${oc.${epsilon}:'{_target_: os.mkdir, path: PATH}'}",
        "\\${oc.create:'{_target_: os.mkdir, path: PATH}'}",
        "${oc.dict.values:evil}",
        "$${eps}{oc.create:'{_target_: os.mkdir, path: PATH}'}",
    ],
)
def test_no_reference_leads_around_that(tmp_path: Path, text: str) -> None:
    executed = tmp_path / "executed"
    text = text.replace("PATH", str(executed))
    evil = {"evil": touching(executed, "os.mkdir"), "epsilon": "create"}
    for node in (text, {**MODEL, "widths": text}, {**MODEL, "widths": (text,)}):
        for key in ("model", "noise"):
            saved(**evil, **{key: node}).save(tmp_path / "best.pt")
            with pytest.raises(Exception, match=r"compute|evil|_target_|build|node"):
                load_model(tmp_path)
            assert not executed.exists()


def test_a_saved_network_of_the_users_own_is_loaded_without_global_randomness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building its configuration creates the module, which draws its initial weights."""
    (tmp_path / "house_networks.py").write_text(
        "from torch import nn\nclass Flat(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Flatten(), nn.Linear(4, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    saved(model, model={"_target_": "house_networks.Flat"}).save(tmp_path / "best.pt")
    before = torch.get_rng_state()
    loaded = load_model(tmp_path, trust=["house_networks"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded(images()), model(images()))


def test_a_package_that_is_trusted_may_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "house_models.py").write_text(
        "from robusttrain.models.mlp import MLP\nclass Mine(MLP):\n    pass\n"
        "def function(**keys):\n    raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    saved(model={"_target_": "house_models.Mine", "widths": [5]}).save(tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"house_models\.Mine.*trust"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"house_models\.Mine.*trust"):
        load_model(tmp_path, trust=["house"])
    loaded = load_model(tmp_path, trust=["house_models"])
    assert torch.equal(loaded(images()), load_model(tmp_path, trust=["house_models"])(images()))


HOUSE = """
import functools
from os import system
from textwrap import dedent
from torch import nn


class Net(nn.Sequential):
    pass


def build_net(width=5):
    return Net(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


@functools.cache
def cached():
    return build_net()


number = 3
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "house_functions.py").write_text(HOUSE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_function_of_a_trusted_package_may_build(house: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    node = {"_target_": "house_functions.build_net", "width": 6}
    saved(model, model=node).save(house / "best.pt")
    with pytest.raises(InputError, match=r"would build house_functions\.build_net.*trust="):
        load_model(house)
    loaded = load_model(house, trust=["house_functions"])
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize(
    "name", ["system", "dedent", "number", "missing", "nn.Linear", "Net.append"]
)
def test_other_names_in_a_trusted_package_may_not(house: Path, name: str) -> None:
    """What it imports, what is no function, and what is not there."""
    saved(model={"_target_": f"house_functions.{name}"}).save(house / "best.pt")
    problem = rf"would build house_functions\.{re.escape(name)}, which is no class or function of"
    with pytest.raises(InputError, match=problem):
        load_model(house, trust=["house_functions"])


@pytest.mark.parametrize("target", ["config.build.build_component", "runs.trust.refuse_untrusted"])
def test_functions_of_robusttrain_may_not(tmp_path: Path, target: str) -> None:
    saved(model={"_target_": f"robusttrain.{target}"}).save(tmp_path / "best.pt")
    for trust in ([], ["robusttrain"]):
        with pytest.raises(InputError, match=rf"would build robusttrain\.{re.escape(target)}"):
            load_model(tmp_path, trust=trust)


def other(house: Path, **keys: Any) -> None:
    """A run whose model is that of another run, which needs trust in a package."""
    (house / "other").mkdir()
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    saved(net, model={"_target_": "house_functions.build_net"}).save(house / "other" / "best.pt")
    node = {"_target_": "robusttrain.load_model", "run": str(house / "other"), **keys}
    saved(net, model=node).save(house / "best.pt")


def test_another_run_is_loaded_with_the_trust_of_the_caller(house: Path) -> None:
    other(house, trust="${trust}")
    assert load_model(house, trust=["house_functions"])(images()).shape == (6, CLASSES)
    with pytest.raises(InputError) as caught:
        load_model(house)
    message = str(caught.value)
    assert message.startswith(
        f"run={house} cannot be loaded: model.run={house / 'other'} cannot be"
    )
    assert "would build house_functions.build_net, which is no component of robusttrain" in message


@pytest.mark.parametrize("trust", [["house_functions"], "${oc.env:HOME}", ["${trust}"], "${seed}"])
def test_a_configuration_cannot_extend_the_trust(house: Path, trust: object) -> None:
    other(house, trust=trust)
    with pytest.raises(InputError, match=r"would trust .* when it loads another run: it must be"):
        load_model(house)


def test_a_key_of_a_later_version_is_no_difference() -> None:
    saved = {"eps": 0.1, "training": {"epochs": 3, "curriculum": {"steps": [1, 2]}}}
    later = {**saved, "training": {**saved["training"], "keep": "best"}}  # type: ignore[dict-item]
    assert checkpoint.differing(saved, saved) == []
    assert checkpoint.differing(later, saved) == []
    assert checkpoint.differing({**later, "eps": 0.2}, saved) == ["eps"]
    assert checkpoint.differing(saved, later) == ["training"], "a key that is gone"
    other = {**saved, "training": {"epochs": 3, "curriculum": {"steps": [1]}}}
    assert checkpoint.differing(other, saved) == ["training"]
    assert checkpoint.differing({**saved, "seed": 1}, saved) == ["seed"]
