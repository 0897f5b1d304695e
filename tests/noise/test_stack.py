"""Several mechanisms on one model: each acts as if it were alone, with its own stream."""

import torch
from torch import nn

from robusttrain.noise.bayes import Bayes
from robusttrain.noise.draws import wanted_draws
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.layer import Progress, noise_layers, penalty
from robusttrain.noise.learn2perturb import Learn2Perturb
from robusttrain.noise.pni import PNIWeights
from robusttrain.noise.stack import Stack
from robusttrain.seeding import derived_seed
from toys.noise import images, network


def stacked(**mechanisms: object) -> nn.Sequential:
    model = network().eval()
    Stack(mechanisms).install(model, 3)  # type: ignore[arg-type]
    return model


def test_it_is_one_mechanism_after_the_other() -> None:
    model, by_hand, x = stacked(a=Gaussian(0.2, predict=True), b=PNIWeights()), network(), images()
    Gaussian(0.2, predict=True).install(by_hand, derived_seed(3, "a"))
    PNIWeights().install(by_hand, derived_seed(3, "b"))
    by_hand.eval()
    for _ in range(2):
        assert torch.equal(model(x), by_hand(x))
    assert len(noise_layers(model)) == 4


def test_twice_the_same_noise_has_twice_the_variance() -> None:
    model = nn.Sequential(nn.Identity())
    Stack({"one": Gaussian(0.3), "two": Gaussian(0.4)}).install(model, 3)
    noise = model(torch.zeros(1, 1, 300, 300)).double()
    # The standard error of the deviation is 0.0012. With equal draws the deviation would be 0.7.
    assert abs(noise.std().item() - 0.5) < 0.006


def test_the_draws_of_one_do_not_depend_on_the_others() -> None:
    x = images()
    for others in ({"b": Gaussian(0.0, predict=True)}, {"b": PNIWeights(initial=0.0)}):
        alone = stacked(a=Gaussian(0.2, predict=True))
        both = stacked(**others, a=Gaussian(0.2, predict=True))
        assert torch.equal(alone(x), both(x))


def test_penalties_add_up() -> None:
    parts = {"bayes": Bayes(kl=1.0), "perturb": Learn2Perturb(gamma=1.0)}
    models = [stacked(**parts), *(stacked(**{name: part}) for name, part in parts.items())]
    values = []
    for model in models:
        model(images())
        values.append(penalty(model, Progress(2, 10)))
    whole, one, other = values
    torch.testing.assert_close(whole, one + other)  # type: ignore[operator]


def test_the_number_of_draws_is_the_largest_of_all_mechanisms() -> None:
    assert wanted_draws(stacked(a=Gaussian(), b=PNIWeights())) is None
    assert wanted_draws(stacked(a=Gaussian(draws=2), b=Gaussian(draws=4), c=PNIWeights())) == 4


def test_an_empty_stack_is_no_noise() -> None:
    assert noise_layers(stacked()) == []
