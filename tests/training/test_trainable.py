"""Trainings that change a part of a model: what is frozen stays bit for bit, attacks included."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robusttrain.api.training import train
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import Mode
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses import Defense
from robusttrain.defenses.free import Free
from robusttrain.defenses.ibp import IBP
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise.pni import PNIWeights
from robusttrain.optim.averaging import EMA, SWA, Averaging
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.weight_perturbation import AWP
from robusttrain.threat import Norm
from robusttrain.training.engine import Batch
from robusttrain.training.settings import Training
from robusttrain.training.trainable import partly_frozen, summary, trainable
from robusttrain.training.trainer import Trainer
from toys.training import DATA, EPS, network, state_of, trainer

CLASSES = 3

HEAD = {"4.weight", "4.bias"}


def frozen_training(model: nn.Module, defense: Defense | None = None, **keys: Any) -> Trainer:
    """A trainer of a model that is frozen already, with everything that moves weights."""
    return trainer(
        defense, model=model, optimizer=SGD(0.1, weight_decay=0.1), averaging=EMA(0.5),
        weight_perturbation=AWP(0.1), clip_gradient=1.0, **keys,
    )  # fmt: skip


DEFENSES: dict[str, Defense] = {
    "standard": Standard(),
    "worst_case": WorstCase(PGD(eps=EPS, steps=2)),
    "train mode": WorstCase(PGD(eps=EPS, steps=2, mode=Mode.train)),
    "trades": TRADES(PGD(eps=EPS, steps=2, start="gaussian")),
    "free": Free(eps=EPS),
    "rt": RT(eps=EPS),
    "ibp": IBP(NoAttack(), eps=EPS),
}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [*((name, "last:1") for name in DEFENSES), ("worst_case", "head"), ("worst_case", "*.bias")],
)
def test_frozen_parameters_stay_bit_for_bit_and_have_no_gradient(name: str, chosen: str) -> None:
    model = network()
    before, settings = copy.deepcopy(model.state_dict()), Training(trainable=chosen)
    trained = trainable(model, chosen, CLASSES)
    with partly_frozen(model, settings, CLASSES):
        made = frozen_training(model, DEFENSES[name], epochs=1)
        list(made.epochs())
        gradients = {n: p.grad is not None for n, p in model.named_parameters()}
        with made.averaged():
            averaged = copy.deepcopy(model.state_dict())
    assert gradients == {n: n in trained for n in gradients}
    for place, value in model.named_parameters():
        same = [torch.equal(before[place], now) for now in (value, averaged[place])]
        assert same == 2 * [place not in trained], place


@pytest.mark.parametrize("mode", Mode)
def test_attacks_find_the_same_images_through_frozen_parameters(mode: Mode) -> None:
    model, images = network(), DATA.load()[0]
    x, y = images.images[:8].float() / 255, images.labels[:8]

    def found() -> Tensor:
        attack = PGD(eps=EPS, steps=3, mode=mode)
        return attack(model, x, y, generator=torch.Generator().manual_seed(0))

    expected = found()
    with partly_frozen(model, Training(trainable="head"), CLASSES):
        assert torch.equal(found(), expected)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == HEAD


@pytest.mark.parametrize("averaging", [EMA(0.5), SWA(0.0)], ids=["ema", "swa"])
def test_a_resumed_training_is_the_uninterrupted_one(averaging: Averaging) -> None:
    settings = Training(trainable="last:1", batch_norm="frozen")  # type: ignore[arg-type]

    def begun(model: nn.Module) -> Trainer:
        optimizer = SGD(0.1, layer_decay=0.5, decay_norms_and_biases=False)
        defense = WorstCase(PGD(eps=EPS, steps=2))
        return trainer(defense, model=model, optimizer=optimizer, averaging=averaging)

    whole, again = network(), network(seed=1)
    with partly_frozen(whole, settings, CLASSES), partly_frozen(again, settings, CLASSES):
        first = begun(whole)
        running = first.batches()
        list(islice(running, 2))
        state = copy.deepcopy({"model": whole.state_dict(), **first.state_dict()})
        list(running)
        again.load_state_dict(state["model"])
        second = begun(again)
        second.load_state_dict(state)
        list(second.batches())
        with first.averaged(), second.averaged():
            assert torch.equal(state_of(whole), state_of(again))
    assert torch.equal(state_of(whole), state_of(again))


# Which parameters


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = weight_norm(nn.Linear(4, 4))
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)


CHOSEN = {
    "all": {"stem.*", "body.*", "head.*"},
    "head": {"head.*"},
    "last:1": {"body.*", "head.*"},
    "last:2": {"stem.*", "body.*", "head.*"},
    "stem.weight": {"stem.parametrizations.*"},
    "*.bias": {"stem.bias", "body.bias", "head.bias"},
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("word", CHOSEN)
def test_words_choose_parameters_whatever_wraps_the_model(word: str, wrapped: bool) -> None:
    def matching(patterns: set[str]) -> set[str]:
        return {
            n for n, _ in own.named_parameters()
            if any(n == p or n.startswith(p.removesuffix("*")) for p in patterns)
        }  # fmt: skip

    own = Own()
    expected = matching(CHOSEN[word])
    model = nn.Sequential(nn.Identity(), own) if wrapped else own
    found = trainable(model, word, CLASSES)
    assert {name.removeprefix("1.") for name in found} == expected
    assert trainable(model, [word, "head.bias"], CLASSES) >= found


REFUSED = {
    "haed.*": "matches no parameter of the model: nearest are head.*",
    "body": "matches no parameter of the model: nearest are body.*",
    "last:3": "last:1 to last:2: the model has 2 blocks before its head",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_the_model_does_not_have_is_refused_with_the_nearest_names(word: str) -> None:
    with pytest.raises(InputError) as caught:
        trainable(Own(), word, CLASSES)
    assert f"training.trainable={word} " in str(caught.value)
    assert REFUSED[word] in str(caught.value)


def test_nothing_to_train_and_no_head_are_refused() -> None:
    model = Own()
    model.head.requires_grad_(False)
    with pytest.raises(InputError, match=r"trainable=\[head\] leaves nothing to train"):
        trainable(model, ["head"], CLASSES)
    with pytest.raises(InputError, match="no weight of the model has 7 outputs"):
        trainable(model, "head", 7)


@pytest.mark.parametrize("value", ["last:0", "last:", "last:x", "", [], [1], None, 3])
def test_words_without_a_meaning_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match="all, head, last:N"):
        Training(trainable=value)


def test_what_the_model_itself_has_frozen_stays_so_and_everything_is_put_back() -> None:
    model = network()
    model[1].weight.requires_grad_(False)
    kinds = [type(module) for module in model.modules()]
    settings = Training(trainable="*.weight", batch_norm="frozen")  # type: ignore[arg-type]
    with partly_frozen(model, settings, CLASSES):
        needed = {n for n, p in model.named_parameters() if p.requires_grad}
        assert summary(model, "*.weight") == "training 48 of 267 parameters (*.weight)"
    assert needed == {"2.weight", "4.weight"}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.weight"]
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())


def test_parameters_of_noise_are_trained_with_the_head() -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 4), nn.Linear(4, CLASSES))
    PNIWeights().install(model, 0)
    before = copy.deepcopy(model.state_dict())
    with partly_frozen(model, Training(trainable="head"), CLASSES):
        list(frozen_training(model).epochs())
    same = {n for n, p in model.named_parameters() if torch.equal(before[n], p)}
    assert same == {"1.bias", "1.parametrizations.weight.original"}


# BatchNorm


@pytest.fixture
def frozen_norm() -> Iterator[nn.Module]:
    """A network whose BatchNorm is frozen, with statistics unlike those of any batch."""
    model = network()
    model[2].running_mean.fill_(0.3)
    model[2].running_var.fill_(2.0)
    with partly_frozen(model, Training(batch_norm="frozen"), CLASSES):  # type: ignore[arg-type]
        yield model


@pytest.mark.parametrize("name", ["worst_case", "train mode", "trades", "free", "rt", "ibp"])
def test_frozen_statistics_stay_bit_for_bit(name: str, frozen_norm: nn.Module) -> None:
    before = copy.deepcopy(dict(frozen_norm.named_buffers()))
    weight = frozen_norm[2].weight.clone()
    made = trainer(
        DEFENSES[name], model=frozen_norm, averaging=SWA(0.0), on_nonfinite="skip", epochs=1
    )
    list(made.epochs())
    with made.averaged():
        averaged = copy.deepcopy(dict(frozen_norm.named_buffers()))
    for place, value in frozen_norm.named_buffers():
        assert torch.equal(value, before[place])
        assert torch.equal(averaged[place], before[place])
    # The scale is a parameter.
    assert not torch.equal(frozen_norm[2].weight, weight)


def test_training_and_crafting_use_frozen_statistics_in_every_mode(frozen_norm: nn.Module) -> None:
    x, y = torch.rand(5, 1, 4, 4), torch.arange(5) % CLASSES
    outputs = {mode: frozen_norm.train(mode)(x) for mode in (False, True)}
    assert torch.equal(outputs[False], outputs[True])
    frozen_norm.train()
    one, other = (FGSM(eps=EPS, mode=mode)(frozen_norm, x, y) for mode in Mode)
    assert torch.equal(one, other)


def test_parts_of_a_batch_are_the_whole_batch_with_frozen_statistics() -> None:
    gradients = []
    for size in (None, 1):
        model = network().double()
        settings = Training(batch_norm="frozen")  # type: ignore[arg-type]
        with partly_frozen(model, settings, CLASSES):
            made = trainer(model=model)
            made.history.microbatch_size = size
            x, y = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(5)
            made.engine.train_batch(made.defense, Batch(x.double(), y.long()), made.history)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_a_model_without_batch_norm_is_refused() -> None:
    settings = Training(batch_norm="frozen")  # type: ignore[arg-type]
    with (
        pytest.raises(InputError, match=r"batch_norm=frozen has no effect on a model without"),
        partly_frozen(Own(), settings, CLASSES),
    ):
        pass


# From Python


def test_a_program_gets_its_model_back_with_every_flag_as_it_was() -> None:
    model = network()
    model[1].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    data = DATA.load()[0]
    words = ["training.trainable=head", "training.batch_norm=frozen", "attack.steps=2"]
    epochs = train(
        model, data.images[:40].float() / 255, data.labels[:40], eps=EPS, norm=Norm.linf,
        epochs=2, overrides=words, progress=False,
    )  # fmt: skip
    for _ in epochs:
        assert [p.requires_grad for p in model.parameters()] == flags
        assert type(model[2]) is nn.BatchNorm1d
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == HEAD
