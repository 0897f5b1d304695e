"""Programs of TorchScript and torch.export: they are attacked as they are, or refused."""

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robusttrain.attacks import Attack
from robusttrain.attacks.attack_loss import Label, cross_entropy
from robusttrain.attacks.ball_attack import BallAttack
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode, frozen
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import external
from robusttrain.checkpoints.external import ExportedProgram, Kind
from robusttrain.data import Info
from robusttrain.errors import InputError
from robusttrain.models import build_model
from robusttrain.models.network import network
from robusttrain.noise import Noise
from robusttrain.noise.bayes import Bayes
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.pni import PNIWeights
from robusttrain.runs.saved_model import load_model
from robusttrain.threat import Norm
from toys.external import CLASSES, SHAPE, Write, exported, images, scripted, written


def plain() -> nn.Module:
    """A network with all kinds of torch's layers that have a mode."""
    torch.manual_seed(7)
    front = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1)]
    network = nn.Sequential(*front, nn.Dropout(0.5), nn.Linear(256, CLASSES))
    network(torch.rand(30, *SHAPE))
    return network.eval()


def exported_without_gradients(model: nn.Module, path: Path) -> None:
    with torch.no_grad():
        exported(model, path)


def traced(model: nn.Module, path: Path) -> None:
    torch.jit.trace(model, images(2)).save(path)


def frozen_program(model: nn.Module, path: Path) -> None:
    torch.jit.freeze(torch.jit.script(model)).save(path)


def scripted_in_train_mode(model: nn.Module, path: Path) -> None:
    scripted(model.train(), path)
    model.eval()


WRITERS: dict[str, Write] = {
    "exported": exported,
    "exported without gradients": exported_without_gradients,
    "scripted": scripted,
    "traced": traced,
    "frozen_program": frozen_program,
    "scripted in train mode": scripted_in_train_mode,
}


def program_in(path: Path) -> ExportedProgram:
    program = external.load(path, ["code"])
    assert isinstance(program, ExportedProgram)
    return program


# --- accepted programs ---------------------------------------------------------------------------


class Opened:
    """A module, and the model that was loaded from its program."""

    def __init__(self, write: Write, folder: Path) -> None:
        self.eager = plain()
        self.path = written(write, self.eager, folder / "net.of.theirs")
        self.program = program_in(self.path)
        self.model = build_model(self.program, CLASSES, SHAPE)


@pytest.fixture(scope="module", params=list(WRITERS.values()), ids=list(WRITERS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp("programs"))


def test_a_program_computes_what_its_author_wrote(opened: Opened) -> None:
    """The module that was exported is the reference."""
    for count in (1, 2, 3, 65):
        x = images(count)
        torch.testing.assert_close(opened.model(x), opened.eager(x))
    assert opened.program.name == "net.of"
    assert str(opened.program) == f"checkpoint={opened.path}"


def test_a_program_accepts_any_mode(opened: Opened) -> None:
    model, x = opened.model, images()
    expected = opened.eager(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert model.train().training
    assert not model.eval().training
    model.train()
    for mode in Mode:
        with frozen(model, mode):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model(x)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model(x), expected)


ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(eps=0.1),
    "fgsm l2": FGSM(norm=Norm.l2, eps=0.5),
    "pgd": PGD(eps=0.1, steps=4, random_start=False),
    "pgd least likely": PGD(eps=0.1, steps=3, label=Label.least_likely, restarts=2),
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
    # If a gradient is nearly 0, its sign depends on rounding, for both models.
    assert (actual - expected).abs().gt(1e-4).float().mean() < 0.01
    torch.testing.assert_close(
        cross_entropy(opened.eager(actual), y), reached, rtol=0.01, atol=0.01
    )


def test_noise_is_put_before_a_program(opened: Opened) -> None:
    info = Info(SHAPE, CLASSES, ())
    model = network(opened.program, Gaussian(0.3, predict=True), info, 0)
    outputs = [model(images()) for _ in range(2)]
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("noise", [PNIWeights(), Bayes()])
def test_the_weights_of_a_program_have_no_noise(opened: Opened, noise: Noise) -> None:
    """Moving a program to another device rebuilds it, which would drop the noise."""
    why = "cannot reach the weights of a program|needs a layer with weights: the model has none"
    with pytest.raises(InputError, match=rf"^noise=\w+ ({why})"):
        network(opened.program, noise, Info(SHAPE, CLASSES, ()), 0)


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
    assert [external.load(path, ["code"]) for path in paths] == [
        ExportedProgram(paths[0], Kind.torchscript), ExportedProgram(paths[1], Kind.exported)
    ]  # fmt: skip


@pytest.mark.parametrize("write", [scripted, exported])
def test_a_program_needs_consent(tmp_path: Path, write: Write) -> None:
    path = written(write, plain(), tmp_path / "net.file")
    for trust in ([], ["torch"]):
        with pytest.raises(InputError, match=r"runs its own code: .*add trust=\[code\]"):
            external.load(path, trust)
        with pytest.raises(InputError, match=r"^run=.*add trust=\[code\]"):
            load_model(path, trust=trust)
    assert load_model(path, trust=["code"])(images()).shape == (len(images()), CLASSES)


@pytest.mark.parametrize("write", [scripted, exported])
def test_in_a_run_directory_no_program_is_read(tmp_path: Path, write: Write) -> None:
    written(write, plain(), tmp_path / "best.pt")
    for read in (external.load, load_model):
        with pytest.raises(InputError, match=r"best\.pt is a program of .*, and no checkpoint"):
            read(tmp_path, trust=["code"])


def test_loading_a_program_warns_of_nothing(
    opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    """Deprecation of a format does not concern those who evaluate a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened.program.build(CLASSES, SHAPE)
    assert tuple(capfd.readouterr()) == ("", "")


class WithConstants(nn.Module):
    """Code that creates tensors, on the device where it was exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits + torch.arange(CLASSES) + torch.tensor([0.5] * CLASSES)


def test_an_exported_program_moves_with_its_constants(tmp_path: Path) -> None:
    """The meta device stands for a device that this machine does not have."""
    program = program_in(written(exported, WithConstants(), tmp_path / "net.pt2"))
    model = build_model(program, CLASSES, SHAPE).to("meta")
    assert model(images(3).to("meta")).device == torch.device("meta")


# --- refused programs ----------------------------------------------------------------------------


def fixed(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (images(4),)), path)


def at_most_64(model: nn.Module, path: Path) -> None:
    exported(model, path, max=64)


def at_least_4(model: nn.Module, path: Path) -> None:
    exported(model, path, min=4)


class EvenOnly(nn.Module):
    """A network that needs an even number of images."""

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
        (at_least_4, "only 4 to"),
        (pairs, "only 2*"),
    ],
)
def test_a_program_for_some_batches_only_is_refused(
    tmp_path: Path, write: Write, sizes: str
) -> None:
    program = program_in(written(write, plain(), tmp_path / "net.pt2"))
    with pytest.raises(InputError) as caught:
        program.build(CLASSES, SHAPE)
    assert f"{tmp_path / 'net.pt2'} takes {sizes}" in str(caught.value)
    assert "dynamic_shapes=({0: torch.export.Dim('batch')},)" in str(caught.value)


class Sum(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x.flatten(1) + z.flatten(1)


def test_a_program_of_two_inputs_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Sum(), (images(2), images(2))), tmp_path / "net.pt2")
    program = program_in(tmp_path / "net.pt2")
    with pytest.raises(InputError, match="takes 2 inputs"):
        program.build(CLASSES, SHAPE)


def test_a_program_for_other_images_is_refused_in_a_line(opened: Opened) -> None:
    for shape in ((3, 8, 8), (2, 3, 3)):
        with pytest.raises(InputError) as caught:
            build_model(opened.program, CLASSES, shape)
        message = str(caught.value)
        assert message.startswith(f"model checkpoint={opened.path} cannot take images of shape")
        assert "\n" not in message
        # The message names the cause.
        assert any(w in message for w in ("channels", "size()[1]", "shape[1]")), message


@pytest.mark.parametrize("write", [scripted, exported])
def test_a_damaged_program_is_refused_in_a_line_or_whole(tmp_path: Path, write: Write) -> None:
    eager = plain()
    path = written(write, eager, tmp_path / "net")
    content = path.read_bytes()
    refused: list[str] = []
    for place in range(100, len(content), len(content) // 30):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            model = build_model(program_in(path), CLASSES, SHAPE)
            torch.testing.assert_close(model(images()), eager(images()))
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(message.startswith(f"checkpoint={path} ") for message in refused)
    assert not [message for message in refused if "\n" in message]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        external.load(path, ["code"])


def test_an_archive_that_only_claims_to_be_a_program_is_refused(tmp_path: Path) -> None:
    for name, kind in (
        ("net/archive_format", "torch.export"),
        ("net/constants.pkl", "TorchScript"),
    ):
        with zipfile.ZipFile(tmp_path / "net", "w") as archive:
            archive.writestr(name, "pt2")
        program = program_in(tmp_path / "net")
        with pytest.raises(
            InputError, match=f"cannot be loaded as a program of {kind}: "
        ) as caught:
            program.build(CLASSES, SHAPE)
        assert "\n" not in str(caught.value)
