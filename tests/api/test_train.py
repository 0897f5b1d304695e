"""`rt.train`: the training of the command line, on a model and on images of the caller's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robusttrain as rt
from robusttrain.data import Info, as_input
from robusttrain.data.digits import Digits
from robusttrain.errors import NonFiniteLossError
from robusttrain.models.mlp import MLP
from robusttrain.models.network import network
from robusttrain.noise.none import NoNoise
from robusttrain.threat import Norm, Threat
from toys.command_line import CommandLine

EPS = 0.1
X, Y = (part[:80] for part in Digits().load()[0])


def mlp(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        return network(MLP(widths=[16]), NoNoise(), Info((1, 8, 8), 10, ()), seed)


def trained(model: nn.Module, *overrides: str, x: Any = X, y: Any = Y, **more: Any) -> list[Any]:
    given = {"eps": EPS, "epochs": 2, "batch_size": 16, "progress": False} | more
    return [*rt.train(model, x, y, overrides=overrides, **given)]


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


WORDS = {
    "madry": ["attack.steps=2"],
    "trades": ["attack.steps=2", "averaging=ema"],
    "fgsm_rs": ["training.curriculum.eps_warmup=0.5", "dataset.crop=1"],
}


@pytest.mark.parametrize("defense", WORDS)
def test_weights_are_those_of_the_command_line(
    defense: str, command_line: CommandLine, tmp_path: Path
) -> None:
    """Those of the best epoch, averaged where weights are averaged."""
    words = [*WORDS[defense], "optimizer.lr=0.01"]
    common = ["model=mlp", "model.widths=[16]", f"eps={EPS}", "epochs=3", "batch_size=64", "seed=4"]
    answer = command_line.run("stages=[train]", f"defense={defense}", *common, *words, cwd=tmp_path)
    assert answer.code == 0, answer.said
    run = rt.load_run(answer.run_dir)
    ours, (train, _) = mlp(seed=4), Digits().load()
    epochs = trained(
        ours, *words, x=train.images, y=train.labels, defense=defense, epochs=3, batch_size=64,
        validation=150, seed=4,
    )  # fmt: skip
    assert same(weights(ours), weights(run.model))
    for epoch, row in zip(epochs, run.training.to_dict("records"), strict=True):
        assert f"{epoch.loss:.6g}" == f"{row['loss']:.6g}"
        assert f"{epoch.val_robust_accuracy:.6g}" == f"{row['val_robust_accuracy']:.6g}"


def test_after_each_epoch_the_model_has_its_weights_and_in_the_end_the_best_ones() -> None:
    model, seen = mlp(), {}
    for epoch in rt.train(
        model, X, Y, eps=EPS, epochs=4, batch_size=16, progress=False,
        overrides=["optimizer.lr=0.5", "attack.steps=1"],
    ):  # fmt: skip
        seen[epoch.rank, epoch.epoch] = weights(model)
    best = seen[max(seen)]
    assert same(weights(model), best)
    assert sum(same(best, one) for one in seen.values()) == 1


def test_without_validation_the_last_epoch_is_the_best() -> None:
    model, last = mlp(), []
    for epoch in rt.train(model, X, Y, eps=EPS, epochs=2, validation=0, progress=False):
        assert epoch.val_robust_accuracy is None
        last = weights(model)
    assert same(weights(model), last)


def test_a_loop_that_is_left_keeps_the_weights() -> None:
    model = mlp()
    for _ in rt.train(model, X, Y, eps=EPS, epochs=3, progress=False):
        now = weights(model)
        break
    assert same(weights(model), now)


def test_an_object_gets_the_threat_of_the_arguments_or_states_its_own() -> None:
    """Three ways to say the same."""
    attack = rt.attacks.PGD(steps=2)
    stated = rt.attacks.PGD(norm="l2", eps=0.5, steps=2)
    models = [mlp() for _ in range(3)]
    trained(models[0], defense=rt.defenses.WorstCase(attack), norm="l2", eps=0.5)
    trained(models[1], defense=rt.defenses.WorstCase(stated), eps=None)
    trained(models[2], "attack.steps=2", defense="madry", norm="l2", eps=0.5)
    assert same(weights(models[0]), weights(models[1]))
    assert same(weights(models[0]), weights(models[2]))
    assert attack.threat == Threat(Norm.linf, 8 / 255)


def test_a_data_set_is_as_good_as_its_images() -> None:
    models = [mlp(), mlp()]
    trained(models[0])
    trained(models[1], x=TensorDataset(as_input(X), Y), y=None)
    assert same(weights(models[0]), weights(models[1]))


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "function": ({"model": lambda x: x.flatten(1)}, ["model=function", "a module"]),
    "no radius": ({"eps": None}, ["eps=None", "name of a defense"]),
    "two radii": (
        {"defense": rt.defenses.WorstCase(rt.attacks.PGD(eps=0.3))},
        ["eps=0.1", "PGD", "linf, eps 0.3"],
    ),
    "no defense": ({"defense": "mdry"}, ["defense=mdry", "defense=madry"]),
    "epochs": ({"epochs": -1}, ["epochs=-1", "0 or more"]),
    "validation": ({"validation": 80}, ["validation=80", "leave some of the 80"]),
    "key": ({"overrides": ["optimizer.lrr=1"]}, ["optimizer.lrr=1", "optimizer.lr"]),
    "key of evaluation": ({"overrides": ["evaluation.samples=5"]}, ["evaluation.samples=5"]),
    "key of an object": (
        {"defense": rt.defenses.WorstCase(rt.attacks.PGD()), "overrides": ["attack.steps=3"]},
        ["overrides=attack.steps=3", "object"],
    ),
    "an average at a rate of 0": ({"overrides": ["averaging=swa"]}, ["averaging=swa"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused_when_the_function_is_called(name: str) -> None:
    arguments, words = REFUSED[name]
    given: dict[str, Any] = {"model": mlp(), "x": X, "y": Y, "eps": EPS} | arguments
    with pytest.raises(rt.InputError) as refused:
        rt.train(given.pop("model"), given.pop("x"), given.pop("y"), **given)
    for word in words:
        assert word in str(refused.value)


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(NonFiniteLossError, match="learning rate"):
        trained(mlp(), "optimizer.lr=1e38", epochs=3)
