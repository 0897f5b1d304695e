"""Noise on the command line: every option, stacks, and noise from checkpoints."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from robusttrain import load_model, seeding
from robusttrain.api.arguments import unstacked
from robusttrain.cli import main
from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.data import Split, as_input
from robusttrain.data.digits import Digits
from robusttrain.models.network import network
from robusttrain.noise.additive import AdditiveLayer
from robusttrain.noise.layer import noise_layers, predicts_randomly
from robusttrain.threat import Threat
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.trainer import Trainer
from toys.noise import quiet

OPTIONS = sorted(file.stem for file in (CONF / "noise").glob("*.yaml"))

# The words of a short run.
TINY = [
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=32", "dataset.validation=0",
    "dataset.image_shape=[1,8,8]", "dataset.num_classes=4", "model=small_cnn", "model.width=2",
    "epochs=1", "batch_size=32", "device=cpu", "keep_memory=false",
]  # fmt: skip
LOOK = [
    "evaluation=quick", "evaluation.audit=false", "evaluation.eot=1", "evaluation.votes=3",
    "evaluation.attacks.pgd.steps=2", "~evaluation.attacks.apgd_ce", "~evaluation.attacks.uniform",
]  # fmt: skip

Command = Callable[..., Path]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Run a command line in this process; returns the run directory."""
    place = tmp_path_factory.mktemp("runs")
    numbers = count()
    with pytest.MonkeyPatch.context() as patch:
        # The command line sets this variable; the patch restores it after the tests.
        patch.setenv("HYDRA_FULL_ERROR", "1")

        def run(*words: str) -> Path:
            folder = place / f"run {next(numbers)}"
            there = [f"hydra.run.dir='{folder}'"]
            quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
            GlobalHydra.instance().clear()
            main.main("robusttrain", [*words, *there, *quiet])
            return folder

        yield run
    GlobalHydra.instance().clear()


@pytest.fixture(scope="module")
def stack(command: Command) -> Path:
    """A run with two mechanisms, both active in prediction."""
    return command(
        *TINY, *LOOK, "noise=[gaussian,pni_w]", "noise.mechanisms.gaussian.sigma=1/16",
        "noise.mechanisms.gaussian.predict=true", "noise.mechanisms.pni_w.initial=0.1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def augmented(command: Command) -> Path:
    """A run of SmoothAdv."""
    return command(
        *TINY, "stages=[train]", "defense=madry", "attack.steps=2", "noise=gaussian",
        "noise.sigma=0.25", "noise.draws=2",
    )  # fmt: skip


def reported(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "report.csv", keep_default_na=False).set_index("attack")


def additive(folder: Path) -> list[AdditiveLayer]:
    """The additive noise layers of a saved model."""
    return [layer for layer in noise_layers(load_model(folder)) if isinstance(layer, AdditiveLayer)]


# Every option


def composed(*words: str) -> Config:
    """The objects that the command line builds from these words."""
    schema.register()
    overrides = [override for word in words for override in unstacked(word)]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", overrides)
    return configs.build(configs.with_numbers(OmegaConf.create(config)))


@pytest.fixture(scope="module")
def digits() -> Split:
    return Digits().load()[0].take(torch.arange(96))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_the_default_model_against_attacks(option: str, digits: Split) -> None:
    words = "noise=[gaussian,pni_w]" if option == "stack" else f"noise={option}"
    config = composed(words, "defense=madry", "attack.steps=2", "epochs=1", "batch_size=32")
    model = network(config.model, config.noise, config.dataset.info(), 0)
    assert bool(noise_layers(model)) is (option != "none")
    before = [p.detach().clone() for p in model.parameters()]
    recipe = Recipe(config.defense, config.optimizer, config.schedule, config.training)
    data = TrainingData(digits, digits.take(torch.arange(0)), config.dataset)
    threat = Threat(config.norm, config.eps)
    trainer = Trainer(model, recipe, data, threat, seed=0, terminal=quiet())
    (epoch,) = trainer.epochs()
    assert np.isfinite(epoch.loss)
    assert not any(map(torch.equal, model.parameters(), before))
    with torch.no_grad():
        passes = [model.eval()(as_input(digits.images)) for _ in range(2)]
    assert all(output.isfinite().all() for output in passes)
    assert torch.equal(*passes) is not predicts_randomly(model)


@pytest.mark.parametrize("words", [["noise.sigma=1/8"], ["noise.sigma=0.125", "noise.at=first"]])
def test_settings_are_keys(words: list[str]) -> None:
    noise = composed("noise=laplace", "noise.predict=true", "noise.vote=majority", *words).noise
    assert (noise.sigma, noise.predict, noise.vote) == (0.125, True, "majority")  # type: ignore[attr-defined]


# Stacks


def test_the_settings_of_a_stack_reach_its_mechanisms(stack: Path) -> None:
    (layer,) = additive(stack)
    assert (layer.noise.sigma, layer.on_predict) == (0.0625, True)
    state = load_model(stack).state_dict()
    scales = [float(value) for key, value in state.items() if key.endswith("scale")]
    assert len(scales) == 4
    assert all(0 < abs(scale - 0.1) < 0.05 for scale in scales)


def test_a_stack_is_reported_in_the_order_of_the_command(stack: Path) -> None:
    assert set(reported(stack)["noise"]) == {"gaussian+pni_w"}


def test_a_stack_is_evaluated_again_from_its_checkpoint(stack: Path, command: Command) -> None:
    again = command("stages=[evaluate]", f"checkpoint='{stack}'", "device=cpu", *LOOK)
    known, found = reported(stack), reported(again)
    assert found["noise"].tolist() == known["noise"].tolist()
    assert found["accuracy"].tolist() == known["accuracy"].tolist()


def test_a_stack_is_trained_further_from_its_checkpoint(stack: Path, command: Command) -> None:
    onward = ["stages=[train]", f"checkpoint='{stack}'", "optimizer.lr=1e-20", "epochs=1"]
    second = command("device=cpu", "keep_memory=false", *onward)
    weights = [load_model(folder).state_dict() for folder in (stack, second)]
    assert len(noise_layers(load_model(second))) == 5
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value)


def test_the_same_mechanism_twice_gets_two_names(command: Command) -> None:
    folder = command(
        *TINY, "stages=[train]", "noise=[gaussian, gaussian]", "noise.mechanisms.gaussian.sigma=.1",
        "noise.mechanisms.gaussian_1.sigma=0.2", "noise.mechanisms.gaussian_1.at=first",
    )  # fmt: skip
    layers = additive(folder)
    assert [(layer.noise.sigma, layer.noise.at) for layer in layers] == [
        (0.1, "input"),
        (0.2, "first"),
    ]
    assert layers[0].seed != layers[1].seed


def test_training_on_draws_reports_shares_over_them(augmented: Path) -> None:
    assert additive(augmented)[0].draws == 2
    # Of 64 images with two draws each.
    hits = pd.read_csv(augmented / "train.csv")["train_robust_accuracy"][0] * 128
    assert hits == pytest.approx(round(hits), abs=1e-2)


def test_any_trained_model_can_be_smoothed(augmented: Path, command: Command) -> None:
    smooth = command(
        "stages=[evaluate]", f"checkpoint='{augmented}'", "device=cpu", *LOOK,
        "noise=[smoothing]", "noise.mechanisms.smoothing.sigma=0.5", "evaluation.votes=20",
    )  # fmt: skip
    assert set(reported(smooth)["noise"]) == {"smoothing"}
    assert reported(smooth)["accuracy"].max() > 0


# Refusals

REFUSED = {
    "noise=gaussian noise.at=frist": r"at=frist is not allowed: .*input, first",
    "noise=[gaussian,pni_w] noise.mechanisms.gaussian.sigma=-1": (
        r"noise\.mechanisms\.gaussian\.sigma=-1.* is not allowed"
    ),
    "noise=[gaussian,pni_w] noise.mechanisms.gaussian.sgma=1": (
        r"noise\.mechanisms\.gaussian\.sgma=1 is not allowed"
    ),
    "noise=[gaussian,gaussiam]": r"gaussiam.* is not allowed",
    "noise=[]": r"noise\.mechanisms",
    "noise=rse model=mlp": r"noise=rse needs a convolution",
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_bad_input_gets_one_message_before_any_work(words: str, command: Command) -> None:
    tiny = [word for word in TINY if not word.startswith("model") or "model=" not in words]
    with pytest.raises(SystemExit, match=rf"^robusttrain: .*{REFUSED[words]}") as refusal:
        command(*tiny, *words.split())
    # A second line may list the keys.
    assert str(refusal.value).count("\n") <= 1


@pytest.mark.parametrize(
    ("word", "overrides"),
    [
        ("noise=gaussian", ["noise=gaussian"]),
        ("model=[a,b]", ["model=[a,b]"]),
        ("noise.at=[a]", ["noise.at=[a]"]),
        ("noise=[rse]", ["noise=stack", "+noise@noise.mechanisms.rse=rse"]),
        (
            "noise=[a, b,a]",
            [
                "noise=stack", "+noise@noise.mechanisms.a=a", "+noise@noise.mechanisms.b=b",
                "+noise@noise.mechanisms.a_2=a",
            ],
        ),
    ],
)  # fmt: skip
def test_only_a_list_of_noises_is_short_for_a_stack(word: str, overrides: list[str]) -> None:
    assert unstacked(word) == overrides


def test_the_noise_of_a_run_has_its_own_stream() -> None:
    config = composed("noise=gaussian")
    model = network(config.model, config.noise, config.dataset.info(), 5)
    (layer,) = noise_layers(model)
    assert layer.seed == seeding.derived_seed(5, "noise")
