"""The user's own architectures and data: built, checked against each other and evaluated."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robusttrain.errors import InputError
from robusttrain.models import build_model
from robusttrain.runs.saved_model import load_model
from toys.external import CLASSES, SHAPE, TINY, Answer, clean_accuracy, prepared

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


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        rows = x[:, 0]
        return self.head((rows + self.attention(rows, rows, rows)[0]).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])


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
    options = {
        "model/theirs": "build_net", "model/net": "Net", "dataset/floats": "Floats",
        "model/attentive": "Attentive", "model/recurrent": "Recurrent",
    }  # fmt: skip
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


def test_images_that_are_not_bytes_are_refused_before_any_work(tmp_path: Path, mine: str) -> None:
    with pytest.raises(InputError, match=r"^dataset=floats has images with values from -"):
        Answer(tmp_path / "run", mine, "dataset=floats", "model=theirs", "device=cpu")
    assert list((tmp_path / "run").iterdir()) == []


# torch's attention computes with the weights of its output layer and does not call it.
UNCALLED = "noise= has no effect in attention.out_proj, which the predictions do not use"


@pytest.mark.parametrize("noise", ["pni_a", "pni_w", "bayes", "none"])
def test_what_is_left_without_noise_is_named(tmp_path: Path, mine: str, noise: str) -> None:
    words = ["model=attentive", f"noise={noise}", "stages=[train]"]
    answer = Answer(tmp_path / "run", mine, *TINY, *words)
    assert (f"warning: {UNCALLED}" in answer.said.splitlines()) == (noise == "pni_a")
    assert ("has no effect" in answer.said) == (noise == "pni_a")


def test_noise_that_is_nowhere_is_refused(tmp_path: Path, mine: str) -> None:
    at = ["noise=gaussian", "noise.at=attention.out_proj"]
    with pytest.raises(
        InputError, match=r"^noise has no effect in attention\.out_proj, .*: choose"
    ):
        Answer(tmp_path / "run", mine, *TINY, "model=attentive", *at)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("noise", ["pni_w", "bayes"])
def test_weights_that_noise_cannot_reach_are_refused(tmp_path: Path, mine: str, noise: str) -> None:
    with pytest.raises(InputError, match=rf"^noise={noise} cannot reach .* GRU \(rnn\): choose"):
        Answer(tmp_path / "run", mine, *TINY, "model=recurrent", f"noise={noise}")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.fixture
def by_a_function(tmp_path: Path, mine: str) -> Path:
    """A run whose model is what a function returns."""
    Answer(tmp_path / "theirs", mine, *TINY, "model=theirs", "stages=[train]")
    return tmp_path / "theirs"


def test_a_model_by_a_function_is_trained_and_loaded_with_trust(
    by_a_function: Path, tmp_path: Path, mine: str
) -> None:
    again = [mine, *TINY, "stages=[evaluate]", f"checkpoint={by_a_function}"]
    with pytest.raises(InputError, match=r"would build their_package\.build_net.*trust="):
        prepared(*again)
    answer = Answer(tmp_path / "again", *again, "trust=[their_package]")
    loaded = load_model(by_a_function, trust=["their_package"])
    assert answer.accuracy("clean") == pytest.approx(clean_accuracy(loaded), abs=1e-6)


def test_what_trains_by_a_transfer_attack_is_loaded_with_its_source(
    by_a_function: Path, tmp_path: Path, mine: str
) -> None:
    source = [f"attack.source.run={by_a_function}", "attack.attack.steps=1"]
    trust = "trust=[their_package]"
    words = [mine, *TINY, "model=theirs", "attack=transfer", *source]
    Answer(tmp_path / "run", *words, "stages=[train]", trust)
    again = [mine, *TINY, "stages=[evaluate]", f"checkpoint={tmp_path / 'run'}"]
    prepared(*again, trust)
    with pytest.raises(InputError, match=r"would build their_package\.build_net.*trust="):
        prepared(*again)


@pytest.mark.parametrize("key", ["attack", "evaluation.attacks.other"])
def test_the_message_about_another_run_names_the_key_of_this_one(
    by_a_function: Path, mine: str, key: str
) -> None:
    option = "attack=transfer" if key == "attack" else f"+attack@{key}=transfer"
    problem = (
        rf"^{key}\.source\.run={by_a_function} cannot be loaded: the checkpoint's configuration "
        r"would build their_package\.build_net, which is no component of robusttrain: if you"
    )
    with pytest.raises(InputError, match=problem):
        prepared(mine, *TINY, option, f"{key}.source.run={by_a_function}")
