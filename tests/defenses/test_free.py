"""Free adversarial training against the loop of the paper, and its state in checkpoints."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks import cross_entropy
from robusttrain.data import hold_out
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses.free import Free
from robusttrain.errors import InputError
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import Constant
from robusttrain.report.terminal import Terminal
from robusttrain.threat import Norm, Threat
from robusttrain.threat.balls import ball
from robusttrain.training.curriculum import Curriculum
from robusttrain.training.precision import Precision
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import Training
from robusttrain.training.trainer import Trainer
from toys.defenses import generator

EPS = 0.1


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(1), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
        return nn.Sequential(*layers).double()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Images so far from the faces of the box that no perturbation reaches them."""
    draws = generator()
    return [
        (0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=draws).double(), torch.arange(n) % 3)
        for n in sizes
    ]


def descended(defense: Free, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x_adv = defense.inner(model, x, y, generator=generator())
    for _ in range(defense.replays):
        optimizer.zero_grad()
        objective = defense.outer(model, x, x_adv, y, loss=cross_entropy)
        objective.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        x_adv = defense.advance(x, x_adv)


@pytest.mark.parametrize("step", [None, 0.03])
def test_it_is_the_loop_of_the_paper(step: float | None) -> None:
    """Algorithm 1, with a shorter and a longer batch among the others."""
    free, model = Free(eps=EPS, replays=3, step_size=step), network()
    for x, y in batches(6, 4, 7, 6):
        descended(free, model, x, y)
    by_hand, delta = network(), torch.zeros(7, 1, 4, 4, dtype=torch.float64)
    for x, y in batches(6, 4, 7, 6):
        for _ in range(3):
            noise = delta[: len(x)].clone().requires_grad_()
            F.cross_entropy(by_hand(x + noise), y).backward()
            with torch.no_grad():
                for parameter in by_hand.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
                assert noise.grad is not None
                delta[: len(x)] += (step or EPS) * noise.grad.sign()
                delta.clamp_(-EPS, EPS)
    torch.testing.assert_close(free.state_dict()["delta"], delta, rtol=0, atol=1e-12)
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", list(Norm))
def test_the_perturbation_stays_in_the_ball_and_images_in_the_box(norm: Norm) -> None:
    free, model, eps = Free(norm, 0.4, replays=4), network(), 0.4
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    corners = torch.rand(5, 1, 4, 4, generator=generator()).double().round()
    for _ in range(3):
        descended(free, model, corners, torch.arange(5) % 3)
    delta = free.state_dict()["delta"]
    assert (ball(Threat(norm, eps)).norm(delta) <= eps * (1 + 1e-9)).all()
    assert (ball(Threat(norm, eps)).norm(delta) > 0).all()
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)
    assert all((ball(Threat(norm, eps)).norm(x - corners) <= eps * (1 + 1e-9)).all() for x in seen)
    # The first replay of a batch starts where the last one has left it.
    assert torch.equal(seen[0], corners)
    assert not torch.equal(seen[4], corners)


class Counted(nn.Module):
    """Counts its forward passes, and the backward passes to the input and to the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.counts = {"forward": 0, "to input": 0, "to weights": 0}
        self.network[1].register_full_backward_hook(self._backward)
        self.network[1].weight.register_hook(lambda _: self._count("to weights"))

    def forward(self, x: Tensor) -> Tensor:
        self._count("forward")
        logits: Tensor = self.network(x)
        return logits

    def _backward(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._count("to input")

    def _count(self, key: str) -> None:
        self.counts[key] += 1


def test_a_replay_is_one_pass_each_way() -> None:
    model, ((x, y),) = Counted(), batches(6)
    descended(Free(eps=EPS, replays=5), model, x, y)
    assert model.counts == {"forward": 5, "to input": 5, "to weights": 5}


@pytest.mark.parametrize("norm", list(Norm))
def test_at_radius_zero_it_is_standard_training_on_replays(norm: Norm) -> None:
    model, by_hand, ((x, y),) = network(), network(), batches(6)
    descended(Free(norm, 0.0, replays=2), model, x, y)
    for _ in range(2):
        F.cross_entropy(by_hand(x), y).backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_settings_out_of_range_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"replays": 0}, {"step_size": 0.0}, {"eps": -1}]
    for keys in wrong:
        ((key, value),) = keys.items()
        with pytest.raises(InputError, match=rf"^{key}={value} is not allowed"):
            Free(**keys)


# Resuming

DATA = Synthetic([1, 4, 4], 3, train_size=130, test_size=10, noise=0.3, validation=30)


def trainer(curriculum: Curriculum) -> Trainer:
    split, validation = hold_out(DATA.load()[0], DATA.validation, 0)
    settings = Training(
        epochs=3, batch_size=32, precision=Precision.fp32, curriculum=curriculum
    )  # fmt: skip
    recipe = Recipe(Free(eps=EPS, replays=2), SGD(0.1), Constant(), settings)
    return Trainer(
        network().float(), recipe, TrainingData(split, validation, DATA), Threat(Norm.linf, EPS),
        seed=0, terminal=Terminal(Console(file=io.StringIO())),
    )  # fmt: skip


def weights(made: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(made.model.parameters()).detach().clone()


@pytest.mark.parametrize(
    "curriculum", [Curriculum(), Curriculum(1.0), Curriculum(1.0, per_batch=True)], ids=str
)
@pytest.mark.parametrize("done", [2, 4, 5])
def test_a_training_that_is_resumed_ends_the_same(
    done: int, curriculum: Curriculum, tmp_path: Path
) -> None:
    """Stopped within an epoch, at its end, and after the first batch of the next one."""
    whole = trainer(curriculum)
    list(whole.batches())
    stopped = trainer(curriculum)
    for _, _ in zip(range(done), stopped.batches(), strict=False):
        pass
    torch.save([stopped.model.state_dict(), stopped.state_dict()], tmp_path / "state.pt")
    ended = []
    for forgetful in (False, True):
        model, state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["defense"]["delta"].abs().max() > 0
        if forgetful:
            state["defense"] = {"delta": None}
        again = trainer(curriculum)
        again.model.load_state_dict(model)
        again.load_state_dict(state)
        list(again.batches())
        ended.append(weights(again))
    assert torch.equal(ended[0], weights(whole))
    assert not torch.equal(ended[1], weights(whole)), "nothing hangs on the perturbation here"


def test_a_growing_radius_keeps_the_perturbation() -> None:
    made = trainer(Curriculum(eps_warmup=1.0))
    largest = []
    for epoch in made.batches():
        delta = made.state_dict()["defense"]["delta"]
        if epoch is not None or made.position.batch == 1:
            largest.append(float(delta.abs().max()))
    radii = [EPS * epoch / 3 for epoch in (1, 2, 3)]
    assert largest == pytest.approx([radius for radius in radii for _ in range(2)])
