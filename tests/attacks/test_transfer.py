"""Transfer: the inner attack on the source, the victim's word never asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from robusttrain.attacks import threat_of, under
from robusttrain.attacks.attack_loss import cross_entropy
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.model_view import QueryCounter
from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.pgd import PGD
from robusttrain.attacks.transfer import Transfer
from robusttrain.checkpoints import checkpoint
from robusttrain.checkpoints.checkpoint import Checkpoint
from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.errors import InputError
from robusttrain.models.mlp import MLP
from robusttrain.noise.control import drawing_from
from robusttrain.noise.gaussian import Gaussian
from robusttrain.threat import Norm, Threat
from toys.attacks import Affine, everywhere, generator, tanh_network

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def images(count: int = 8) -> tuple[Tensor, Tensor]:
    return everywhere(count, 1, 3, 4), torch.arange(count) % 3


@pytest.mark.parametrize("attack", [FGSM(), PGD(restarts=2), PGD(norm=Norm.l2, eps=0.5)], ids=str)
def test_with_the_victim_as_the_source_it_is_the_attack_itself(attack: PGD) -> None:
    model, (x, y) = tanh_network(12, 3), images()
    x_adv = Transfer(model, attack)(model, x, y, generator=generator(1))
    assert torch.equal(x_adv, attack(model, x, y, generator=generator(1)))


def test_it_is_crafted_on_the_source_and_never_asks_the_victim() -> None:
    source, victim, (x, y) = tanh_network(12, 3, seed=1), tanh_network(12, 3, seed=2), images()
    metered, attack = QueryCounter(victim, 100), FGSM(eps=0.1)
    x_adv = Transfer(source, attack)(metered, x, y)
    assert (metered.forward_passes, metered.backward_passes) == (0, 0)
    assert torch.equal(x_adv, attack(source, x, y))
    assert not torch.equal(x_adv, attack(victim, x, y))


def test_the_loss_of_the_caller_is_the_one_that_is_climbed() -> None:
    source, (x, y) = tanh_network(12, 3), images()

    def towards(logits: Tensor, y: Tensor) -> Tensor:
        return -cross_entropy(logits, y)

    x_adv = Transfer(source, FGSM(eps=0.01))(nn.Identity(), x, y, loss=towards)
    before, after = (cross_entropy(source(z), y) for z in (x, x_adv))
    assert (after < before).all()


def test_it_states_the_threat_of_its_attack_and_none_where_that_has_none() -> None:
    transfer = Transfer(nn.Identity(), FGSM(norm=Norm.l1, eps=0.7))
    assert threat_of(transfer) == Threat(Norm.l1, 0.7)
    assert threat_of(Transfer(nn.Identity(), NoAttack())) is None
    assert under(transfer, Threat(Norm.l2, 0.1)).attack == FGSM(norm=Norm.l2, eps=0.1)


def test_the_attack_takes_as_many_targets_as_the_source_has() -> None:
    source, (x, y) = tanh_network(12, 3), images()
    x_adv = Transfer(source, PGD(targets=9))(source, x, y, generator=generator())
    assert torch.equal(x_adv, PGD(targets=2)(source, x, y, generator=generator()))


def test_a_source_with_noise_draws_what_the_generator_says_and_goes_on_as_before() -> None:
    source, (x, y) = tanh_network(12, 3), images()
    Gaussian(0.3, predict=True).install(source.eval(), 0)
    transfer = Transfer(source, PGD(steps=2))
    first, other, again = (transfer(source, x, y, generator=generator(seed)) for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with drawing_from(source, 0):
        expected = source(x)
    with drawing_from(source, 0):
        transfer(source, x, y)
        assert torch.equal(source(x), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_the_source_follows_the_images(device: str) -> None:
    source, (x, y) = tanh_network(12, 3), images()
    x_adv = Transfer(source, FGSM())(nn.Identity(), x.to(device), y.to(device))
    assert x_adv.device.type == device
    assert next(source.parameters()).device.type == device


def test_images_that_do_not_fit_the_source_are_refused_by_their_shape() -> None:
    transfer = Transfer(Affine(3, 5), FGSM())
    with pytest.raises(InputError, match=r"^source cannot take images of shape \(1, 3, 4\): \w+"):
        transfer(nn.Identity(), *images())


def test_labels_that_the_source_does_not_know_are_refused() -> None:
    transfer = Transfer(Affine(2, 12), FGSM())
    with pytest.raises(InputError, match=r"^source knows 2 classes: it must know class 2, too"):
        transfer(nn.Identity(), *images())


# --- from the command line ---------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run, with a network of 12 pixels and 3 classes."""
    torch.manual_seed(3)
    network = MLP([5]).build(3, (1, 3, 4))
    config = {"norm": "linf", "eps": 0.25, "seed": 1, "data_dir": "data"}
    config["model"] = {"_target_": "robusttrain.models.mlp.MLP", "widths": [5]}
    config["noise"] = {"_target_": "robusttrain.noise.none.NoNoise"}
    saved = Checkpoint(network.state_dict(), 3, [1, 3, 4], config, {}, 1, {})
    saved.save(tmp_path / "best.pt")
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


ADDED = ("evaluation=quick", "+attack@evaluation.attacks.transfer=transfer")


def built(*overrides: str) -> Any:
    node: DictConfig = hydra.compose("config", [*ADDED, *overrides])
    return configs.build(configs.with_numbers(node)).evaluation.attacks["transfer"]


def test_the_model_of_a_run_is_the_source(run: Path) -> None:
    transfer = built(f"evaluation.attacks.transfer.source.run={run}", "eps=0.2")
    x, y = images()
    weights = checkpoint.load(run).model
    assert torch.equal(transfer.source.state_dict()["1.weight"], weights["1.weight"])
    assert type(transfer.attack) is PGD
    assert (transfer.attack.steps, transfer.attack.restarts) == (50, 10)
    assert threat_of(transfer) == Threat(Norm.linf, 0.2)
    assert transfer(nn.Identity(), x.float(), y).shape == x.shape


def test_another_attack_is_chosen_with_settings_of_its_own(run: Path) -> None:
    transfer = built(
        f"evaluation.attacks.transfer.source.run={run}",
        "attack@evaluation.attacks.transfer.attack=mim",
        "evaluation.attacks.transfer.attack.eps=3/255",
        "evaluation.attacks.transfer.attack.decay=0.5",
    )
    assert type(transfer.attack).__name__ == "MIM"
    assert threat_of(transfer) == Threat(Norm.linf, 3 / 255)
    assert transfer.attack.decay == 0.5


def test_a_run_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^evaluation\.attacks\.transfer\.source.*is not there"):
        built(f"evaluation.attacks.transfer.source.run={tmp_path / 'gone'}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_is_a_source(tmp_path: Path) -> None:
    network, (x, y) = MLP([5]).build(3, (1, 3, 4)).eval(), images()
    x = x.float()
    torch.jit.save(torch.jit.trace(network, x[:1]), tmp_path / "net.pt")
    transfer = built(
        f"evaluation.attacks.transfer.source.run={tmp_path / 'net.pt'}", "trust=[code]", "eps=0.2"
    )
    expected = Transfer(network, transfer.attack)(network, x, y, generator=generator())
    found = transfer(nn.Identity(), x, y, generator=generator())
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_a_state_dict_has_no_network_to_craft_on(tmp_path: Path) -> None:
    torch.save(MLP([5]).build(3, (1, 3, 4)).state_dict(), tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"net\.pth is a state dict, without a network: a run, a"):
        built(f"evaluation.attacks.transfer.source.run={tmp_path / 'net.pth'}")


OWN = """\
defaults:
  - /schema/attack/Transfer@_here_
  - /attack@attack: fgsm

source:
  _target_: toys.attacks.tanh_network
  pixels: 12
  classes: 3
"""


def test_a_network_of_the_users_own_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "own.yaml").write_text(OWN)
    path = f"hydra.searchpath=[file://{tmp_path}]"
    added = "+attack@evaluation.attacks.own=own"
    node: DictConfig = hydra.compose("config", [path, "evaluation=quick", added])
    transfer = configs.build(configs.with_numbers(node)).evaluation.attacks["own"]
    assert isinstance(transfer, Transfer)
    weights = transfer.source.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in tanh_network(12, 3).state_dict().items())
