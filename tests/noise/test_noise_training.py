"""Training with noise: new draws in every pass, penalties, no decay of learnt noise."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from robusttrain.attacks import Attack
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.noise import Noise
from robusttrain.noise.bayes import Bayes
from robusttrain.noise.draws import wanted_draws
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.layer import Progress, noise_layers, penalty
from robusttrain.noise.learn2perturb import Learn2Perturb
from robusttrain.optim.optimizers import SGD, Adam, AdamW, Optimizer
from robusttrain.training.engine import Batch
from toys.noise import LEARNT, MECHANISMS, Seen, images, network, noisy, ready, trainer, weights_of


def learnt(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the noise."""
    return [p for layer in noise_layers(model) for p in layer.parameters()]


class Indifferent(Defense):
    """A defense whose loss is 0 whatever the parameters are."""

    def outer(self, model: nn.Module, *arguments: Any, **keys: Any) -> Objective:
        return Objective(0 * torch.stack([p.sum() for p in model.parameters()]).sum())


# Draws


@pytest.mark.parametrize("attack", [FGSM(eps=0.0), PGD(eps=0.0, steps=3)])
def test_every_pass_of_adversarial_training_sees_another_draw(attack: Attack) -> None:
    """With radius 0 all passes get the same images, so all differences are noise."""
    witness, x = Seen(), images()
    model = nn.Sequential(witness, *network()).train()
    Gaussian(0.2).install(model, 7)
    made = trainer(model, WorstCase(attack))
    made.engine.train_batch(made.defense, Batch(x, torch.zeros(5).long()), made.history)
    assert len(witness.inputs) > 1
    for one, other in pairwise([x, *witness.inputs]):
        assert 0.1 < (one - other).std() < 0.4


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_the_seed_decides_the_weights(mechanism: str) -> None:
    weights = []
    for seed in (7, 7, 8):
        model = noisy(mechanism, seed, train=True)
        list(trainer(model, Standard()).epochs())
        weights.append(weights_of(model))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# Learnt noise


@pytest.mark.parametrize("mechanism", LEARNT)
@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
def test_weight_decay_leaves_the_noise_alone(mechanism: str, optimizer: type[SGD | Adam]) -> None:
    quiet: dict[str, Noise] = {"learn2perturb": Learn2Perturb(gamma=0.0), "bayes": Bayes(kl=0.0)}
    model = ready(network(), quiet.get(mechanism) or MECHANISMS[mechanism]())
    noise_before = [p.detach().clone() for p in learnt(model)]
    mine = {id(p) for p in learnt(model)}
    others = [p for p in model.parameters() if id(p) not in mine and p.dim() > 1]
    before = [p.detach().clone() for p in others]
    made = trainer(model, Indifferent(), optimizer=optimizer(lr=0.05, weight_decay=1.0))
    list(made.epochs())
    assert noise_before
    assert all(map(torch.equal, learnt(model), noise_before))
    # All other parameters had weight decay.
    assert all(p.norm() < old.norm() for p, old in zip(others, before, strict=True))


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_every_parameter_is_trained_once(mechanism: str) -> None:
    model = noisy(mechanism)
    made = trainer(model, Standard(), optimizer=SGD(0.1, weight_decay=0.3))
    groups = made.engine.optimizer.param_groups
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {id(p) for p in learnt(model)}


@pytest.mark.parametrize("mechanism", LEARNT)
def test_all_rates_follow_the_schedule(mechanism: str) -> None:
    made = trainer(noisy(mechanism), Standard(), optimizer=SGD(0.1))
    made.engine.scheduler.base_lrs = [0.05] * len(made.engine.scheduler.base_lrs)
    list(made.epochs())
    assert {group["lr"] for group in made.engine.optimizer.param_groups} == {0.05}


@pytest.mark.parametrize("mechanism", LEARNT)
@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(0.01)])
def test_the_noise_is_learnt_from_the_loss(mechanism: str, optimizer: Optimizer) -> None:
    """If noise only increases the loss, training makes it smaller."""
    noises: dict[str, Noise] = {
        "learn2perturb": Learn2Perturb(1.0, gamma=0.0), "bayes": Bayes(0.3, kl=0.0),
    }  # fmt: skip
    model = ready(network(), noises.get(mechanism) or MECHANISMS[mechanism]())
    before = torch.cat([p.detach().flatten() for p in learnt(model)]).mean()
    list(trainer(model, Standard(), optimizer=optimizer, epochs=10).epochs())
    assert torch.cat([p.detach().flatten() for p in learnt(model)]).mean() < before


# Penalties


def test_the_penalty_of_learn2perturb_is_minimised_with_tau_of_its_epoch() -> None:
    """With no other loss a step is log sigma += lr gamma / (2 tau) sqrt(sigma)."""
    model = ready(network(), Learn2Perturb(initial=0.2, gamma=0.3))
    made = trainer(model, Indifferent(), optimizer=SGD(0.5, 0.0, 0.0), epochs=3)
    list(made.epochs())
    log_sigma = torch.tensor(0.2, dtype=torch.float64).log()
    for tau in (1, 1, 3 / 2, 3 / 2, 11 / 6, 11 / 6):
        log_sigma = log_sigma + 0.5 * 0.3 / (2 * tau) * (log_sigma / 2).exp()
    for p in learnt(model):
        torch.testing.assert_close(p.double(), log_sigma.expand_as(p), rtol=1e-5, atol=0)


def test_the_divergence_is_minimised_by_its_share_of_each_image() -> None:
    """With no other loss a step is mean -= lr kl mean / (prior^2 images), for 64 images."""
    model = network()
    Bayes(kl=0.4, prior=0.5).install(model, 0)
    names = [f"{place}.parametrizations.weight.original" for place in (0, 3, 5)]
    before = [model.get_parameter(name).detach().clone() for name in names]
    list(trainer(model, Indifferent(), optimizer=SGD(0.5, 0.0, 0.0), epochs=2).epochs())
    for name, old in zip(names, before, strict=True):
        # Two epochs of two batches.
        expected = old.double() * (1 - 0.5 * 0.4 / (0.25 * 64)) ** 4
        torch.testing.assert_close(model.get_parameter(name).double(), expected)


def test_the_loss_of_the_report_is_that_of_the_images() -> None:
    model = network()
    Bayes(kl=1e6).install(model, 0)
    (epoch,) = trainer(model, Indifferent(), optimizer=SGD(1e-12)).epochs()
    assert epoch.loss == 0


def test_noise_that_is_off_in_training_adds_no_penalty() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(1), nn.Linear(32, 3))
    for noise in (Learn2Perturb(train=False), Bayes(train=False), Gaussian(train=False, draws=4)):
        noise.install(model, 0)
    model(torch.zeros(1, 1, 6, 6))
    assert penalty(model, Progress(1, 10)) is None
    assert wanted_draws(model) is None
