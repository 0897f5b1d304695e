import pytest
import torch

from robusttrain.attacks.none import NoAttack
from robusttrain.attacks.uniform import Uniform
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from toys.attacks import Affine, everywhere, generator


@pytest.mark.parametrize("norm", list(Norm))
def test_draws_a_random_start_and_asks_the_model_nothing(norm: Norm) -> None:
    calls = []
    model, x = Affine(2, 12), everywhere(5, 1, 3, 4)
    model.register_forward_hook(lambda *_: calls.append(1))
    x_adv = Uniform(norm=norm, eps=0.3)(model, x, torch.zeros(5).long(), generator=generator(4))
    assert torch.equal(x_adv, ball(Threat(norm, 0.3)).random_start(x, generator(4)))
    assert not calls


def test_no_attack_leaves_the_images_alone() -> None:
    x = everywhere(5, 1, 3, 4)
    assert torch.equal(NoAttack()(Affine(2, 12), x, torch.zeros(5).long()), x)
