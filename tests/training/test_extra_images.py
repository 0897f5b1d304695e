"""Training with extra images: what is trained on, and that it resumes bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch

from robusttrain.attacks.pgd import PGD
from robusttrain.data import Extra, Mapped, Split
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.optim.optimizers import SGD
from robusttrain.training.trainer import Trainer
from toys import training
from toys.training import state_of, trainer

SHARE = 0.25


def extra(mapped: bool = False) -> Extra:
    split = Synthetic([1, 4, 4], 3, train_size=37, seed=7).load()[0]
    rows = np.arange(split.size)
    samples = Mapped(split.images.numpy(), rows, split.labels, stream=True) if mapped else split
    return Extra(samples, SHARE, seed=0)


def made(**settings: Any) -> Trainer:
    return trainer(WorstCase(PGD(eps=0.1, steps=2)), batch_size=20, **settings)


def test_training_resumes_in_the_middle_of_an_epoch_bit_for_bit() -> None:
    whole = made(extra=extra())
    list(whole.epochs())
    stopped = made(extra=extra(), model=training.network())
    under_way = stopped.batches()
    for _ in range(whole.batches_per_epoch + 3):
        next(under_way)
    under_way.close()
    again = made(extra=extra(), model=training.network(1))
    again.model.load_state_dict(stopped.model.state_dict())
    again.load_state_dict(stopped.state_dict())
    list(again.epochs())
    assert torch.equal(state_of(again.model), state_of(whole.model))


def test_images_that_stay_in_their_file_train_the_same() -> None:
    weights = []
    for mapped in (False, True):
        one = made(extra=extra(mapped), model=training.network())
        list(one.epochs())
        weights.append(state_of(one.model))
    assert torch.equal(*weights)


def test_an_epoch_is_a_pass_over_the_training_images_with_more_batches() -> None:
    """100 training images in batches of 15 beside 5 extra ones: 7 batches, not 5."""
    one = made(extra=extra())
    assert (made().batches_per_epoch, one.batches_per_epoch) == (5, 7)
    (first, _) = one.epochs()
    assert one.engine.images == 100 + 6 * 5 + 3
    assert first.epoch == 1


def test_extra_images_are_not_validated_on() -> None:
    seen: list[int] = []
    one = made(extra=extra())
    one.validate = lambda name, samples, *more: seen.append(samples.size) or (None, None)  # type: ignore
    list(one.epochs())
    assert one.validation.size == 30
    assert set(seen) <= {one.validation.size, one.probe_images.size}


@pytest.mark.parametrize("microbatch", [None, 6])
def test_the_loss_is_the_mean_over_all_images(microbatch: int | None) -> None:
    """A step of plain SGD on one batch is that of autograd on the same images."""
    few = Split(*(part[:15] for part in Synthetic([1, 4, 4], 3, train_size=50).load()[0]))
    model = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(16, 3))
    plain = SGD(0.1, momentum=0, weight_decay=0, nesterov=False)
    one = trainer(model=model, train=few, extra=extra(), batch_size=20, epochs=1, optimizer=plain)
    one.history.microbatch_size = microbatch
    ((x, y),) = one.order.epoch(one.engine.streams["batches"].clone_state())
    assert len(y) == 20
    before = [weight.detach().clone() for weight in model.parameters()]
    gradients = torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(x), y), list(model.parameters())
    )
    list(one.epochs())
    for old, gradient, new in zip(before, gradients, model.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * gradient, atol=1e-6)
