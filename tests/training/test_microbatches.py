"""Batches that do not fit into memory, against the same batches with enough memory."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import Loss
from robusttrain.attacks.pgd import PGD
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.free import Free
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.noise.gaussian import Gaussian
from robusttrain.report.terminal import Terminal
from robusttrain.runtime.out_of_memory import is_out_of_memory, refused_where_too_large
from robusttrain.training.microbatches import halved_size, split_batch
from robusttrain.training.trainer import Trainer
from toys.training import DATA, EPS, Twice, network, state_of, trainer

FIXED = PGD(eps=EPS, steps=2, random_start=False)


@dataclass
class Short:
    """A forward pre-hook: more than `room` images do not fit, until `refusals` passes failed."""

    room: int
    refusals: int | None = None
    error: type[RuntimeError] = torch.OutOfMemoryError
    met: int = 0

    def __call__(self, model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > self.room and self.met != self.refusals:
            self.met += 1
            raise self.error("CUDA out of memory. DefaultCPUAllocator: can't allocate memory: ...")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(1), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def told(made: Trainer) -> str:
    file = made.terminal.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def short(model: nn.Module, hook: Short, defense: Defense | None = None, **keys: Any) -> Trainer:
    model.register_forward_pre_hook(hook)
    made = trainer(defense, model=model, **keys)
    made.terminal = Terminal(Console(file=io.StringIO(), width=300))
    made.engine.say = made.terminal.say
    return made


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(("room", "size"), [(31, 16), (10, 8), (1, 1)])
@pytest.mark.parametrize(
    "defense",
    [Standard(), Twice(), WorstCase(FIXED), AlphaMix(FIXED)],
    ids=lambda defense: type(defense).__name__,
)
def test_a_batch_in_parts_is_trained_on_as_a_whole_one(
    defense: Defense, room: int, size: int, error: type[RuntimeError]
) -> None:
    # 33 images in the last batch.
    data = replace(DATA, train_size=127)
    whole = trainer(defense, model=plain(), data=data)
    made = short(plain(), Short(room, error=error), defense, data=data, clip_gradient=0.3)
    whole.engine.max_gradient_norm = 0.3
    pairs = list(zip(whole.epochs(), made.epochs(), strict=True))
    assert made.history.microbatch_size == size
    torch.testing.assert_close(state_of(made.model), state_of(whole.model), rtol=0, atol=2e-6)
    for expected, epoch in pairs:
        assert epoch.loss == pytest.approx(expected.loss, rel=1e-5)
        assert epoch.train_clean_accuracy == expected.train_clean_accuracy
        assert epoch.train_robust_accuracy == expected.train_robust_accuracy
    assert told(made).count("out of memory") == {31: 1, 10: 2, 1: 5}[room]
    assert "BatchNorm" not in told(made)


def test_what_a_defense_keeps_for_each_place_in_a_batch_is_not_split() -> None:
    """Free would use the perturbation of one part for all parts."""
    made = short(plain(), Short(10), Free(eps=EPS, replays=2))
    message = (
        r"^batch_size=32 does not fit .* from batch to batch cannot split it: try batch_size=16$"
    )
    with pytest.raises(InputError, match=message):
        list(made.epochs())


def random_training(refusals: int, room: int = 0) -> Trainer:
    """A training in which every component draws random numbers."""
    model = network()
    model.append(nn.Dropout(0.2))
    Gaussian(0.2, draws=2).install(model, 5)
    torch.manual_seed(3)
    data = replace(DATA, crop=1, flip=True)
    attack = WorstCase(PGD(eps=EPS, steps=2))
    return short(model, Short(room, refusals), attack, data=data)


def test_a_batch_that_is_split_late_has_the_draws_of_one_that_was_split_before() -> None:
    """Whenever memory runs out, the streams return to where the whole batch began."""
    ready = random_training(0)
    ready.history.microbatch_size = 16
    expected = [replace(epoch, seconds=0) for epoch in ready.epochs()]
    # In the attack, and after it.
    for passes in (1, 3):
        made = random_training(0)
        hook = Late(passes)
        made.model.register_forward_pre_hook(hook)
        assert [replace(epoch, seconds=0) for epoch in made.epochs()] == expected
        assert hook.left == -1
        assert torch.equal(state_of(made.model), state_of(ready.model))
    assert "BatchNorm normalises each part separately" in told(made)


@dataclass
class Late:
    """Memory runs out in one pass, the number `left`."""

    left: int

    def __call__(self, model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.left -= self.left >= 0
        if self.left == 0:
            self.left = -1
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_training_in_parts_is_resumed_in_parts(tmp_path: Path) -> None:
    whole = short(plain(), Short(20), WorstCase(FIXED))
    list(whole.epochs())
    made = short(plain(), Short(20), WorstCase(FIXED))
    batches = made.batches()
    for _ in range(3):
        next(batches)
    torch.save({"model": made.model.state_dict(), **made.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    roomy = trainer(WorstCase(FIXED), model=plain())
    roomy.model.load_state_dict(saved.pop("model"))
    roomy.load_state_dict(saved)
    list(roomy.epochs())
    assert torch.equal(state_of(roomy.model), state_of(whole.model))


@dataclass
class BreaksBehind(Standard):
    """Memory runs out in a backward pass, after other parts have left gradients at the weights."""

    room: int

    def outer(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: Loss
    ) -> Objective:
        objective = super().outer(model, x, x_adv, y, loss=loss)
        return objective._replace(loss=_Breaking.apply(objective.loss, len(x) > self.room))


class _Breaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, breaks: bool) -> Tensor:
        ctx.breaks = breaks
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        if ctx.breaks:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return slope, None


def test_memory_may_run_out_on_the_way_back() -> None:
    whole, made = trainer(model=plain()), trainer(BreaksBehind(10), model=plain())
    for each in (whole, made):
        list(each.epochs())
    torch.testing.assert_close(state_of(made.model), state_of(whole.model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("model", "least"), [(plain, 1), (network, 2)])
def test_what_does_not_fit_in_the_smallest_parts_ends_with_a_message(
    model: Any, least: int
) -> None:
    made = short(model(), Short(0))
    message = rf"^batch_size=32 does not fit into memory, nor does a part of {least}"
    with pytest.raises(InputError, match=message):
        list(made.epochs())


def test_other_errors_are_not_taken_for_out_of_memory() -> None:
    @dataclass
    class Broken(Standard):
        def inner(self, *arguments: Any, **keys: Any) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(trainer(Broken()).epochs())


def test_the_message_of_torch_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@given(size=st.integers(1, 300), most=st.integers(1, 400) | st.none(), norm=st.booleans())
def test_parts_are_a_batch_cut_evenly(size: int, most: int | None, norm: bool) -> None:
    model = network() if norm else plain()
    x = torch.arange(size, dtype=torch.float32)[:, None]
    parts = split_batch(x, x[:, 0].long(), most, model)
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert all(torch.equal(images[:, 0].long(), labels) for images, labels in parts)
    sizes = [len(labels) for _, labels in parts]
    assert max(sizes) - min(sizes) <= 1
    least = 2 if norm else 1
    assert min(sizes) >= min(least, size)
    # BatchNorm allows no part of one image, so a batch of three cannot be split.
    assert max(sizes) <= (most or size) + norm * (least if (most or 2) < 2 else 1)


@given(size=st.integers(2, 300), most=st.integers(2, 300) | st.none())
def test_parts_get_smaller_until_they_cannot(size: int, most: int | None) -> None:
    for model, least in ((plain(), 1), (network(), 2)):
        sizes = [min(size, most or size)]
        while sizes[-1] > least:
            sizes.append(halved_size(size, most if len(sizes) == 1 else sizes[-1], model))
            assert least <= sizes[-1] < sizes[-2]
        with pytest.raises(InputError):
            halved_size(size, sizes[-1], model)


@pytest.mark.parametrize(("images", "advice"), [(9, "try size=4"), (1, "try a device with more")])
def test_a_size_that_does_not_fit_is_named(images: int, advice: str) -> None:
    with (
        pytest.raises(InputError, match=rf"^size={images} does not fit into memory: {advice}"),
        refused_where_too_large("size", images),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match=r"^another$"), refused_where_too_large("size", images):
        raise RuntimeError("another")
