"""Models of others: what is believed of a state dict; programs are attacked as they are."""

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor, nn

from robusttrain import cli, experiment, foreign
from robusttrain import config as configs
from robusttrain.attacks import Attack
from robusttrain.attacks.crafting import BallAttack, Mode, cross_entropy, held_still
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoint import Checkpoint
from robusttrain.data import Info, as_input
from robusttrain.data.synthetic import Synthetic
from robusttrain.errors import InputError
from robusttrain.foreign import Kind, Program, Weights
from robusttrain.models import build_model
from robusttrain.models.mlp import MLP
from robusttrain.models.preact_resnet import PreActResNet
from robusttrain.models.small_cnn import SmallCNN
from robusttrain.models.torchvision import TorchvisionModel
from robusttrain.noise.gaussian import Gaussian
from robusttrain.report.terminal import Terminal
from robusttrain.saved import load_model

CLASSES, SHAPE = 5, (1, 8, 8)
RESNET = PreActResNet(blocks=[1, 1], width=4, mean=[0.4], std=[0.2])


def trained(architecture: Any = RESNET, shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """A network whose weights and statistics are none that a fresh one has."""
    torch.manual_seed(7)
    network: nn.Module = architecture.build(CLASSES, shape)
    network(torch.rand(30, *shape))
    return network.eval()


def images(count: int = 12) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(2))


def loaded(path: Path, architecture: Any = RESNET) -> tuple[nn.Module, str]:
    """The architecture with the weights of a file, and what was said of it."""
    weights = foreign.load(path)
    assert isinstance(weights, Weights)
    torch.manual_seed(8)
    model = build_model(architecture, CLASSES, SHAPE)
    return model.eval(), weights.load_into(model, path)


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
        # Before torch 0.4.1, BatchNorm counted nothing.
        lambda: torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path),
    ]  # fmt: skip
    for save in ways:
        save()
        model, _ = loaded(path)
        assert torch.equal(model(images()), theirs(images()))


def test_a_wrapped_model_is_loaded_as_it_was_wrapped(tmp_path: Path) -> None:
    """The prefixes are those that torch gives, not those that the tests make up."""
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
    assert line.endswith("the model normalises as it says: mean [0.4], std [0.2]")


def test_statistics_that_are_missing_are_those_of_the_configuration(tmp_path: Path) -> None:
    theirs = trained()
    state = {k: v for k, v in theirs.state_dict().items() if k not in ("0.mean", "0.std")}
    torch.save(state, tmp_path / "theirs.pt")
    model, line = loaded(
        tmp_path / "theirs.pt", PreActResNet(blocks=[1, 1], width=4, mean=[0.7], std=[0.1])
    )
    network = theirs[1:]
    assert torch.equal(model(images()), network((images() - 0.7) / 0.1))
    assert line.endswith("normalises as the configuration says: mean [0.7], std [0.1]")


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


def test_a_refused_state_dict_changes_nothing(tmp_path: Path) -> None:
    torch.save(trained(SmallCNN(2)).state_dict(), tmp_path / "theirs.pt")
    model = trained()
    before = model(images())
    weights = foreign.load(tmp_path / "theirs.pt")
    assert isinstance(weights, Weights)
    with pytest.raises(InputError, match="does not fit the model"):
        weights.load_into(model, "theirs.pt")
    assert torch.equal(model(images()), before)


def test_a_state_dict_does_not_take_away_the_noise(tmp_path: Path) -> None:
    theirs = trained()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    model = trained()
    Gaussian(0.3, predict=True).install(model, 0)
    weights = foreign.load(tmp_path / "theirs.pt")
    assert isinstance(weights, Weights)
    weights.load_into(model, "theirs.pt")
    assert not torch.equal(model(images()), model(images()))


# --- what is none ------------------------------------------------------------------------------


class _Executes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_what_is_no_model_is_refused_in_a_line(tmp_path: Path) -> None:
    path, executed = tmp_path / "theirs.pt", tmp_path / "executed"

    def refused(reason: str) -> None:
        with pytest.raises(
            InputError, match=rf"^checkpoint={re.escape(str(path))} .*{reason}"
        ) as e:
            foreign.load(path)
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
        refused("cannot be read: .*save the state dict by itself")
    torch.save({"x": _Executes(executed)}, path, _use_new_zipfile_serialization=False)
    refused("cannot be read")
    others: list[Any] = [
        {}, [torch.zeros(3)], torch.zeros(3), {0: torch.zeros(3)}, {"state_dict": {}, "epoch": 1},
        {"weights": {"a": torch.zeros(3)}}, {"net": {"a": 1.0}}, "model",
    ]  # fmt: skip
    for other in others:
        torch.save(other, path)
        refused("neither a checkpoint of robusttrain, nor a state dict .*, nor a program")


def ours() -> Checkpoint:
    state = trained().state_dict()
    return Checkpoint(state, CLASSES, list(SHAPE), {}, {"model": "preact_resnet18"}, 1, {})


def test_a_checkpoint_of_ours_is_no_stranger(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    ours().save(path)
    for place in (path, tmp_path):
        assert isinstance(foreign.load(place), Checkpoint)
    # Its weights under `model` would otherwise pass for somebody else's.
    torch.save({**vars(ours()), "format": "robusttrain checkpoint 0"}, path)
    with pytest.raises(InputError, match="is not a checkpoint of robusttrain"):
        foreign.load(path)


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    """torch reads them as they are."""
    path = tmp_path / "theirs.pt"
    torch.save({"weight": torch.arange(1000.0)}, path)
    content = path.read_bytes()
    place = content.index(torch.arange(1000.0)[500:510].numpy().tobytes())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(InputError, match="damaged"):
        foreign.load(path)


def test_code_of_others_gets_no_models_from_them(tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(InputError, match="is not a checkpoint of robusttrain"):
        load_model(tmp_path / "theirs.pt")


# --- programs ----------------------------------------------------------------------------------

Write = Callable[[nn.Module, Path], None]


def plain() -> nn.Module:
    """A network of torch's own layers, of all kinds that have a mode."""
    torch.manual_seed(7)
    front = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1)]
    network = nn.Sequential(*front, nn.Dropout(0.5), nn.Linear(256, CLASSES))
    network(torch.rand(30, *SHAPE))
    return network.eval()


def exported(model: nn.Module, path: Path, **batch: int) -> None:
    dynamic = ({0: torch.export.Dim("batch", **batch)},)
    torch.export.save(torch.export.export(model, (images(4),), dynamic_shapes=dynamic), path)


def exported_without_gradients(model: nn.Module, path: Path) -> None:
    with torch.no_grad():
        exported(model, path)


def scripted(model: nn.Module, path: Path) -> None:
    torch.jit.script(model).save(path)


def traced(model: nn.Module, path: Path) -> None:
    torch.jit.trace(model, images(2)).save(path)


def frozen(model: nn.Module, path: Path) -> None:
    torch.jit.freeze(torch.jit.script(model)).save(path)


def scripted_in_train_mode(model: nn.Module, path: Path) -> None:
    scripted(model.train(), path)
    model.eval()


WRITERS: dict[str, Write] = {
    "exported": exported,
    "exported without gradients": exported_without_gradients,
    "scripted": scripted,
    "traced": traced,
    "frozen": frozen,
    "scripted in train mode": scripted_in_train_mode,
}


def written(write: Write, model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(model, path)
    return path


class Opened:
    """A program as it was written, and what was made of it."""

    def __init__(self, write: Write, folder: Path) -> None:
        self.eager = plain()
        self.path = written(write, self.eager, folder / "net.of.theirs")
        program = foreign.load(self.path)
        assert isinstance(program, Program)
        self.program = program
        self.model = build_model(program, CLASSES, SHAPE)


@pytest.fixture(scope="module", params=WRITERS.values(), ids=WRITERS.keys())
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp("programs"))


def test_a_program_computes_what_its_author_wrote(opened: Opened) -> None:
    """The module that wrote it is the reference."""
    for count in (1, 2, 3, 65):
        x = images(count)
        torch.testing.assert_close(opened.model(x), opened.eager(x))
    assert opened.program.name == "net.of"
    assert str(opened.program) == f"checkpoint={opened.path}"


def test_a_program_lives_with_any_mode(opened: Opened) -> None:
    model, x = opened.model, images()
    expected = opened.eager(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert model.train().training
    assert not model.eval().training
    model.train()
    for mode in Mode:
        with held_still(model, mode):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model(x)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model(x), expected)


ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(eps=0.1),
    "fgsm l2": FGSM(norm="l2", eps=0.5),
    "pgd": PGD(eps=0.1, steps=4, random_start=False),
    "pgd least likely": PGD(eps=0.1, steps=3, label="least_likely", restarts=2),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_see_through_a_program(opened: Opened, attack: Attack) -> None:
    x = images()
    y = opened.eager(x).argmax(1)
    expected, actual = (
        attack(model, x, y, generator=torch.Generator().manual_seed(0))
        for model in (opened.eager, opened.model)
    )
    assert isinstance(attack, BallAttack)
    reached = cross_entropy(opened.eager(expected), y)
    assert (reached != cross_entropy(opened.eager(x), y)).all()
    # Where a gradient is all but 0, its sign hangs on rounding, on both sides.
    assert (actual - expected).abs().gt(1e-4).float().mean() < 0.01
    torch.testing.assert_close(
        cross_entropy(opened.eager(actual), y), reached, rtol=0.01, atol=0.01
    )


def test_noise_is_put_before_a_program(opened: Opened) -> None:
    from robusttrain.config import network

    model = network(opened.program, Gaussian(0.3, predict=True), Info(SHAPE, CLASSES, ()), 0)
    outputs = [model(images()) for _ in range(2)]
    assert not torch.allclose(*outputs)


def test_a_program_is_not_run_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        written(write, plain(), tmp_path / kind)
        for kind, write in (("torchscript", scripted), ("exported", exported))
    ]

    def run(*arguments: object, **keys: object) -> None:
        raise AssertionError

    for place in (torch.jit, torch.export, torch):
        monkeypatch.setattr(place, "load", run)
    assert [foreign.load(path) for path in paths] == [
        Program(paths[0], Kind.torchscript), Program(paths[1], Kind.exported)
    ]  # fmt: skip


def test_loading_a_program_warns_of_nothing(
    opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    """Formats that go out of use are no matter of whoever evaluates a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened.program.build(CLASSES, SHAPE)
    assert tuple(capfd.readouterr()) == ("", "")


class WithConstants(nn.Module):
    """Code that makes tensors, on the device where it was exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits + torch.arange(CLASSES) + torch.tensor([0.5] * CLASSES)


def test_an_exported_program_moves_with_its_constants(tmp_path: Path) -> None:
    """The device without memory stands for one that is not here."""
    program = foreign.load(written(exported, WithConstants(), tmp_path / "net.pt2"))
    assert isinstance(program, Program)
    model = build_model(program, CLASSES, SHAPE).to("meta")
    assert model(images(3).to("meta")).device == torch.device("meta")


def fixed(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (images(4),)), path)


def at_most_64(model: nn.Module, path: Path) -> None:
    exported(model, path, max=64)


def at_least_8(model: nn.Module, path: Path) -> None:
    exported(model, path, min=4)


class EvenOnly(nn.Module):
    """Wants pairs of images."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = x.unflatten(0, (-1, 2)).flatten(0, 1).flatten(1)
        return logits


def pairs(model: nn.Module, path: Path) -> None:
    dynamic = ({0: 2 * torch.export.Dim("half")},)
    torch.export.save(torch.export.export(EvenOnly(), (images(4),), dynamic_shapes=dynamic), path)


@pytest.mark.parametrize(
    ("write", "sizes"),
    [
        (fixed, "only 4"),
        (at_most_64, "only 0 to 64"),
        (at_least_8, "only 4 to"),
        (pairs, "only 2*"),
    ],
)
def test_a_program_for_some_batches_only_is_refused(
    tmp_path: Path, write: Write, sizes: str
) -> None:
    program = foreign.load(written(write, plain(), tmp_path / "net.pt2"))
    assert isinstance(program, Program)
    with pytest.raises(InputError) as caught:
        program.build(CLASSES, SHAPE)
    assert f"{tmp_path / 'net.pt2'} takes {sizes}" in str(caught.value)
    assert "dynamic_shapes=({0: torch.export.Dim('batch')},)" in str(caught.value)


class Sum(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x.flatten(1) + z.flatten(1)


def test_a_program_of_two_inputs_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Sum(), (images(2), images(2))), tmp_path / "net.pt2")
    program = foreign.load(tmp_path / "net.pt2")
    assert isinstance(program, Program)
    with pytest.raises(InputError, match="takes 2 inputs"):
        program.build(CLASSES, SHAPE)


def test_a_program_for_other_images_is_refused_in_a_line(opened: Opened) -> None:
    for shape in ((3, 8, 8), (2, 3, 3)):
        with pytest.raises(InputError) as caught:
            build_model(opened.program, CLASSES, shape)
        message = str(caught.value)
        assert message.startswith(f"model checkpoint={opened.path} cannot take images of shape")
        assert "\n" not in message
        # What was wrong, not that something was.
        assert "channels" in message or "size()[1]" in message, message


@pytest.mark.parametrize("write", [scripted, exported])
def test_a_damaged_program_is_refused_in_a_line_or_whole(tmp_path: Path, write: Write) -> None:
    eager = plain()
    path = written(write, eager, tmp_path / "net")
    content = path.read_bytes()
    refused: list[str] = []
    for place in range(100, len(content), len(content) // 30):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            program = foreign.load(path)
            assert isinstance(program, Program)
            model = build_model(program, CLASSES, SHAPE)
            torch.testing.assert_close(model(images()), eager(images()))
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(message.startswith(f"checkpoint={path} ") for message in refused)
    assert not [message for message in refused if "\n" in message]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        foreign.load(path)


def test_an_archive_that_only_claims_to_be_a_program_is_refused(tmp_path: Path) -> None:
    for name, kind in (
        ("net/archive_format", "torch.export"),
        ("net/constants.pkl", "TorchScript"),
    ):
        with zipfile.ZipFile(tmp_path / "net", "w") as archive:
            archive.writestr(name, "pt2")
        program = foreign.load(tmp_path / "net")
        assert isinstance(program, Program)
        with pytest.raises(
            InputError, match=f"cannot be loaded as a program of {kind}: "
        ) as caught:
            program.build(CLASSES, SHAPE)
        assert "\n" not in str(caught.value)


# --- whole evaluations -------------------------------------------------------------------------

# The options of a run that takes a moment.
TINY = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "device=cpu",
    "dataset.image_shape=[1,8,8]", f"dataset.num_classes={CLASSES}", "batch_size=32", "epochs=1",
    "evaluation=quick", "evaluation.eot=1", "evaluation.votes=1",
]  # fmt: skip
EVALUATE_MLP = [*TINY, "model=mlp", "model.widths=[32]", "stages=[evaluate]"]


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    configs.register()
    with hydra.initialize_config_dir(str(cli.CONF), version_base="1.3"):
        yield


def prepared(*overrides: str) -> tuple[configs.Config, experiment.Origin]:
    """What the command line makes of these words, where it is not in Hydra's hands."""
    composed = hydra.compose("config", list(overrides), return_hydra_config=True)
    names = {key: str(value) for key, value in composed.hydra.runtime.choices.items()}
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return cli._prepared(composed, names, list(overrides))


class Answer:
    """A run: what it said and what it left behind."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        import pandas as pd

        folder.mkdir()
        built, origin = prepared(*overrides)
        said = io.StringIO()
        experiment.run(built, origin, folder, Terminal(Console(file=said, soft_wrap=True)))
        self.said = said.getvalue()
        self.origin = origin
        if (folder / "report.csv").is_file():
            self.report = pd.read_csv(folder / "report.csv", keep_default_na=False)

    def accuracy(self, attack: str) -> float:
        """The accuracy in the row of an attack."""
        return float(self.report.set_index("attack")["accuracy"][attack])

    @property
    def labels(self) -> tuple[str, str]:
        """What the report calls model and defense."""
        return str(self.report["model"][0]), str(self.report["defense"][0])


def clean_accuracy(model: nn.Module) -> float:
    _, test = Synthetic(
        train_size=96, test_size=40, image_shape=[1, 8, 8], num_classes=CLASSES
    ).load()
    return float((model(as_input(test.images)).argmax(1) == test.labels).float().mean())


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """A network that has learned the synthetic problem, outside of robusttrain."""
    data = Synthetic(train_size=500, test_size=40, image_shape=[1, 8, 8], num_classes=CLASSES)
    train, _ = data.load()
    torch.manual_seed(0)
    network = MLP([32]).build(CLASSES, SHAPE)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(network(as_input(train.images)), train.labels).mean().backward()
        optimizer.step()
    assert clean_accuracy(network) > 0.9
    return network.eval()


def test_a_foreign_state_dict_is_evaluated(theirs: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, path)
    answer = Answer(tmp_path / "run", *EVALUATE_MLP, f"checkpoint={path}")
    assert answer.accuracy("clean") == pytest.approx(clean_accuracy(theirs), abs=1e-6)
    assert answer.accuracy("pgd") < answer.accuracy("clean")
    assert answer.labels == ("mlp", "foreign")
    assert answer.said.startswith(f"checkpoint={path} is a state dict of 4 tensors\n")
    assert "warning" not in answer.said
    # Nothing is known of how it was trained, but the user may know.
    told = Answer(tmp_path / "told", *EVALUATE_MLP, f"checkpoint={path}", "defense=standard")
    assert told.labels == ("mlp", "standard")


def test_the_command_line_describes_the_run_of_a_foreign_model(
    theirs: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.pt"
    torch.save(theirs.state_dict(), path)
    overrides = ["eps=0.07", "norm=l2", "seed=4"]
    config, origin = prepared(*EVALUATE_MLP, f"checkpoint={path}", *overrides)
    assert (config.eps, config.norm, config.seed) == (0.07, "l2", 4)
    assert origin.names["dataset"] == "synthetic"


def test_a_foreign_state_dict_is_trained_further(theirs: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    torch.save(theirs.state_dict(), path)
    further = [*EVALUATE_MLP[:-1], f"checkpoint={path}", "stages=[train]", "optimizer.lr=1e-9"]
    answer = Answer(tmp_path / "run", *further)
    assert answer.origin.names["defense"] == "madry"
    trained_further = load_model(tmp_path / "run").state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(trained_further[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("write", [scripted, exported])
def test_a_program_is_evaluated_like_its_source(
    theirs: nn.Module, tmp_path: Path, write: Write
) -> None:
    torch.save(theirs.state_dict(), tmp_path / "source.pt")
    path = written(write, theirs, tmp_path / "net.file")
    program, source = (
        Answer(tmp_path / name, *EVALUATE_MLP, f"checkpoint={tmp_path / name}.{suffix}")
        for name, suffix in (("net", "file"), ("source", "pt"))
    )
    assert program.labels == ("net", "foreign")
    assert f"checkpoint={path} is a program of" in program.said
    for attack in ("clean", "fgsm", "pgd", "worst_case"):
        assert program.accuracy(attack) == pytest.approx(source.accuracy(attack), abs=0.026)


def test_a_program_is_not_trained(theirs: nn.Module, tmp_path: Path) -> None:
    path = written(scripted, theirs, tmp_path / "net.ts")
    with pytest.raises(InputError, match=r"net\.ts is a program.*stages=\[evaluate\]"):
        Answer(tmp_path / "run", *TINY, f"checkpoint={path}")


class Outside(nn.Module):
    """A network that wants its images centred by somebody else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.network(z * 0.5 + 0.5)
        return logits


def in_train_mode(model: nn.Module, path: Path) -> None:
    exported(nn.Sequential(model, nn.Dropout(0.5)).train(), path)


@pytest.mark.parametrize(
    ("wrap", "write", "said"),
    [
        (lambda net: nn.Sequential(net, nn.Softmax(1)), exported, "leave out the softmax"),
        (lambda net: nn.Sequential(net, nn.Softmax(1)), scripted, "leave out the softmax"),
        (lambda net: net, in_train_mode, "dropout is active"),
        (Outside, exported, "wrap it"),
        (lambda net: net, exported, ""),
    ],
    ids=["softmax exported", "softmax scripted", "train mode", "normalisation", "sound"],
)
def test_what_is_wrong_with_a_model_is_said_before_the_report(
    theirs: nn.Module,
    tmp_path: Path,
    wrap: Callable[[nn.Module], nn.Module],
    write: Write,
    said: str,
) -> None:
    path = written(write, wrap(theirs).eval(), tmp_path / "net.pt2")
    answer = Answer(tmp_path / "run", *EVALUATE_MLP, "dataset.test_size=200", f"checkpoint={path}")
    warned = [line for line in answer.said.splitlines() if line.startswith("warning: ")]
    assert len(warned) == bool(said), answer.said
    assert said in "".join(warned)


# --- architectures of the user's own -----------------------------------------------------------

MINE = """
import torch
from torch import nn
from robusttrain.data import Info, Split


def build_net(width=16):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 5))


class Net(nn.Module):
    def __init__(self, outputs=5):
        super().__init__()
        self.body = nn.Linear(64, outputs)

    def forward(self, x):
        return self.body(x.flatten(1))


class Floats:
    validation, crop, flip = 0, 0, False

    def info(self):
        return Info((1, 8, 8), 5, tuple("abcde"))

    def load(self):
        split = Split(torch.randn(40, 1, 8, 8), torch.arange(40) % 5)
        return split, split
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_package.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"model/theirs": "build_net", "model/net": "Net", "dataset/floats": "Floats"}
    for option, name in options.items():
        file = tmp_path / "conf" / f"{option}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"_target_: their_package.{name}\n")
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


@pytest.mark.parametrize("option", ["theirs", "net"])
def test_an_architecture_of_the_users_own_takes_a_state_dict(
    tmp_path: Path, mine: str, option: str
) -> None:
    import their_package

    torch.manual_seed(5)
    network = {"theirs": their_package.build_net, "net": their_package.Net}[option]()
    torch.save({"net": network.state_dict()}, tmp_path / "weights.pt")
    answer = Answer(
        tmp_path / "run",
        mine,
        *TINY,
        "stages=[evaluate]",
        f"model={option}",
        f"checkpoint={tmp_path / 'weights.pt'}",
    )
    assert answer.accuracy("clean") == pytest.approx(clean_accuracy(network), abs=1e-6)
    assert answer.labels == (option, "foreign")


def test_an_architecture_that_does_not_fit_the_data_is_refused(mine: str) -> None:
    config, _ = prepared(mine, *TINY, "model=net", "+model.outputs=3")
    with pytest.raises(InputError, match=r"^model Net cannot take images .*\(2, 3\), not logits"):
        build_model(config.model, CLASSES, SHAPE)


def test_a_network_of_the_users_own_is_initialised_from_the_seed(mine: str) -> None:
    def weights(*overrides: str) -> Tensor:
        torch.rand(1)
        config, _ = prepared(mine, *TINY, "model=theirs", *overrides)
        parameters = build_model(config.model, CLASSES, SHAPE).parameters()
        return nn.utils.parameters_to_vector(parameters)

    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights("seed=1"))


def test_images_that_are_no_bytes_are_refused_before_any_work(tmp_path: Path, mine: str) -> None:
    with pytest.raises(InputError, match=r"^dataset=floats has images with values from -"):
        Answer(tmp_path / "run", mine, "dataset=floats", "model=theirs", "device=cpu")
    assert list((tmp_path / "run").iterdir()) == []
