"""Several processes against one with a larger batch; their messages and files."""

import io
import multiprocessing
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split, as_input, hold_out
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense, Objective
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.fare import FARE
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError, NonFiniteLossError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.pipeline import EvaluationCache, Plan, run_evaluation
from robusttrain.evaluation.settings import Certification
from robusttrain.noise.gaussian import Gaussian
from robusttrain.noise.layer import NoiseLayer, Progress, Switches, attach
from robusttrain.optim.averaging import SWA, Averaging, NoAveraging
from robusttrain.optim.optimizers import SGD
from robusttrain.optim.schedules import OneCycle
from robusttrain.optim.weight_perturbation import AWP, NoPerturbation, WeightPerturbation
from robusttrain.report.ledger import Ledger
from robusttrain.report.terminal import Terminal
from robusttrain.runtime import distributed
from robusttrain.threat import Norm, Threat
from robusttrain.training import ddp
from robusttrain.training.metrics import Epoch
from robusttrain.training.precision import Precision
from robusttrain.training.recipe import Recipe, TrainingData
from robusttrain.training.settings import Training
from robusttrain.training.trainable import partly_frozen
from robusttrain.training.trainer import Trainer

pytestmark = pytest.mark.long

EPS, BATCH = 0.05, 16
# 101 images in batches of 32: the last has five, two of them for the first process.
DATA = Synthetic([1, 4, 4], 3, train_size=132, test_size=41, noise=0.3, validation=31)
GREEDY = PGD(eps=EPS, steps=3, random_start=False)


@dataclass
class Nudged:
    """PGD with a fixed start near the image, without random numbers."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return GREEDY(model, (x + EPS / 2).clamp(0, 1), y, **keys)


DEFENSES: dict[str, Defense] = {
    "standard": Standard(),
    "alpha_mix": AlphaMix(GREEDY),
    "rt": RT(eps=EPS),
    "madry": WorstCase(GREEDY),
    # Its attack comes between two passes with a common backward pass.
    "trades": TRADES(Nudged()),
}


def quiet() -> Terminal:
    return Terminal(Console(file=io.StringIO()))


def _worker(work: Callable[[], Any], rank: int, size: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    with distributed.join_group(dist.FileStore(str(meeting), size), rank, size):
        torch.save(work(), meeting.with_name(f"{rank}.pt"))


def together(work: Callable[[], Any], folder: Path, size: int = 2) -> list[Any]:
    """The results of `work` in each of `size` processes of one group."""
    fork = multiprocessing.get_context("fork")
    jobs = [
        fork.Process(target=_worker, args=(work, rank, size, folder / "meeting"))
        for rank in range(size)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(100)
    assert [job.exitcode for job in jobs] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


class Doubles(nn.Module):
    """Images in float64, so that rounding hides no error."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Pull(NoiseLayer):
    """A mechanism without noise, but with a penalty on its own parameter."""

    def __init__(self) -> None:
        super().__init__(Switches(), 0)
        self.own = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def penalty(self, progress: Progress) -> Tensor:
        return self.own.square().sum() / progress.images


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3, dtype=torch.float64),
        *([nn.BatchNorm2d(4, dtype=torch.float64)] if norm else []),
        nn.Softplus(), nn.Flatten(1), nn.Linear(16, 3, dtype=torch.float64),
    ]  # fmt: skip
    model = nn.Sequential(Doubles(), *layers)
    attach(model, Pull())
    return model


def trainer(
    defense: Defense,
    batch_size: int,
    model: nn.Module | None = None,
    weight_perturbation: WeightPerturbation | None = None,
    averaging: Averaging | None = None,
    **keys: Any,
) -> Trainer:
    train, validation = hold_out(DATA.load()[0], DATA.validation, 0)
    settings = {"epochs": 2, "batch_size": batch_size, "precision": Precision.fp32, **keys}
    recipe = Recipe(
        defense, SGD(0.2), OneCycle(0.5),
        Training(validation_attack=FGSM(eps=EPS), clip_gradient=1.0, **settings),
        weight_perturbation or NoPerturbation(), averaging or NoAveraging(),
    )  # fmt: skip
    return Trainer(
        network() if model is None else model, recipe, TrainingData(train, validation, DATA),
        Threat(Norm.linf, EPS), seed=0, terminal=quiet(),
    )  # fmt: skip


def trained(batch_size: int, norm: bool) -> dict[str, tuple[list[Epoch], dict[str, Tensor]]]:
    results = {}
    combined = [(name, defense, None) for name, defense in DEFENSES.items()]
    for name, defense, perturbation in [*combined, ("awp", DEFENSES["madry"], AWP(0.1))]:
        made = trainer(defense, batch_size, network(norm), perturbation, sync_batchnorm=norm)
        results[name] = list(made.epochs()), made.model.state_dict()
    # The scale of BatchNorm is frozen: its statistics are nevertheless those of all images.
    model, settings = network(norm), Training(trainable="1.*")
    with partly_frozen(model, settings, 3):
        made = trainer(DEFENSES["madry"], batch_size, model, AWP(0.1), sync_batchnorm=norm)
        results["partly frozen"] = list(made.epochs()), made.model.state_dict()
    model = network(norm)
    fare = FARE(Nudged()).with_original(model, 3)
    with partly_frozen(model, Training(), 3, fare):
        made = trainer(fare, batch_size, model, AWP(0.1), sync_batchnorm=norm)
        results["fare"] = list(made.epochs()), made.model.state_dict()
    return results


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "synchronised BatchNorm"])
def test_two_processes_train_as_one_with_twice_the_batch(norm: bool, tmp_path: Path) -> None:
    alone = trained(2 * BATCH, norm)
    for each in together(lambda: trained(BATCH, norm), tmp_path):
        for name, (epochs, weights) in each.items():
            expected_epochs, expected = alone[name]
            assert weights.keys() == expected.keys()
            for key, value in weights.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11, msg=key)
            figures = (
                [v for k, v in epoch.row().items() if k != "seconds"]
                for epoch in (*epochs, *expected_epochs)
            )
            ours_and_theirs = np.array([*figures], dtype=float)
            np.testing.assert_allclose(
                ours_and_theirs[:2], ours_and_theirs[2:], rtol=1e-6, err_msg=name
            )


def test_the_statistics_of_an_average_are_those_of_all_images(tmp_path: Path) -> None:
    def work() -> tuple[Tensor, Tensor]:
        made = trainer(Standard(), 64, network(norm=True), averaging=SWA(0.0), epochs=1)
        list(made.epochs())
        with made.averaged(), torch.no_grad():
            layers = made.model
            inputs = layers[1](layers[0](as_input(made.train.images)))
            return layers[2].running_mean.clone(), inputs.mean((0, 2, 3))

    (one, expected), (other, _) = together(work, tmp_path)
    assert torch.equal(one, other)
    # One batch of each process, with equal weight, of 51 and 50 images.
    torch.testing.assert_close(one, expected, rtol=0, atol=2e-3)


@dataclass
class Overheard(PGD):
    """PGD that records when it runs."""

    def search(self, *arguments: Any) -> Tensor:
        TRAFFIC.append("[")
        found = super().search(*arguments)
        TRAFFIC.append("]")
        return found


TRAFFIC: list[str] = []


def noted(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keys: Any) -> Any:
        TRAFFIC.append("c")
        return collective(*arguments, **keys)

    return call


def overheard(defense: Defense, sync: bool) -> str:
    """An epoch of nine batches: [crafting], f for a pass to descend, r for gradients reduced.

    c is a collective called from Python, such as the one that reduces gradients here.
    """
    TRAFFIC.clear()
    made = trainer(defense, 6, network(norm=True), epochs=1, sync_batchnorm=sync)
    made.settings.validation_attack = None
    assert isinstance(made.engine.forward, ddp.Replicas)

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        TRAFFIC.append("r")
        future: torch.futures.Future[Any] = dist.all_reduce(
            bucket.buffer(), async_op=True
        ).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    made.engine.forward.synchronised.register_comm_hook(None, reduce)
    made.engine.forward.synchronised.register_forward_pre_hook(lambda *_: TRAFFIC.append("f"))
    with pytest.MonkeyPatch.context() as patched:
        for name in ("all_reduce", "broadcast", "all_gather_object", "gather_object"):
            patched.setattr(dist, name, noted(getattr(dist, name)))
        list(made.epochs())
    return "".join(TRAFFIC)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_crafting_does_not_communicate_and_a_step_does_once(mode: str, tmp_path: Path) -> None:
    attack = Overheard(eps=EPS, steps=3, mode=mode)  # type: ignore[arg-type]

    def work() -> list[str]:
        return [
            overheard(WorstCase(attack), False),
            overheard(AlphaMix(attack), False),
            overheard(WorstCase(attack), True),
        ]

    for plain, twice, synchronised in together(work, tmp_path):
        # The statistics of BatchNorm and the figures are exchanged at the end.
        assert re.fullmatch(r"(\[\]frc){9}c+", plain)
        assert re.fullmatch(r"(\[\]ffrc){9}c+", twice)
        # A sum of moments in the forward pass, and one of their gradients in the backward pass.
        assert re.fullmatch(r"(\[\]fccrc){9}c+", synchronised)


@dataclass
class Poisoned(Standard):
    """Standard training, with a loss in one process that is non-finite the first `times`."""

    value: float
    times: int
    rank: int = 1
    seen: int = 0

    def outer(self, *arguments: Any, **keys: Any) -> Objective:
        """The loss, plus a term without gradient in the affected process."""
        objective = super().outer(*arguments, **keys)
        self.seen += 1
        bad = distributed.rank() == self.rank and 2 < self.seen <= 2 + self.times
        return objective._replace(loss=objective.loss + (self.value if bad else 0.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_processes_agree_on_non_finite_losses(value: float, tmp_path: Path) -> None:
    def work() -> list[Any]:
        results = []
        for on_nonfinite, times in (("skip", 1), ("rollback", 1), ("rollback", 99), ("stop", 1)):
            defense = Poisoned(value, times)
            made = trainer(defense, BATCH, on_nonfinite=on_nonfinite)
            message = failure(lambda made=made: list(made.epochs()))  # type: ignore[misc]
            weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
            results.append((made.history.rollbacks, made.history.lr_factor, message, weights))
        return results

    first, second = together(work, tmp_path)
    assert [result[:2] for result in first] == [(0, 1.0), (1, 0.5), (3, 0.125), (0, 1.0)]
    for ours, theirs in zip(first, second, strict=True):
        assert ours[:3] == theirs[:3]
        assert torch.equal(ours[3], theirs[3])
        assert ours[3].isfinite().all()
    assert [bool(result[2]) for result in first] == [False, False, True, True]


def failure(action: Callable[[], Any]) -> str:
    try:
        action()
    except NonFiniteLossError as error:
        return str(error)
    return ""


def test_each_process_has_its_own_draws_and_the_first_those_of_a_single_process(
    tmp_path: Path,
) -> None:
    def work() -> list[Any]:
        model = network()
        Gaussian(0.1).install(model, 5)
        model.append(nn.Dropout(0.5))
        torch.manual_seed(3)
        made = trainer(Standard(), BATCH, model)
        seeds = [layer.seed for layer in ddp.noise_layers(model)]
        return [
            {name: stream.initial_seed() for name, stream in made.engine.streams.items()},
            seeds,
            torch.initial_seed(),
        ]

    alone, (first, second) = work(), together(work, tmp_path)
    assert first == alone
    assert second[0]["batches"] == alone[0]["batches"]
    for name in ("augmentation", "attack", "same draws"):
        assert second[0][name] != alone[0][name]
    assert all(a != b for a, b in zip(second[1], alone[1], strict=True))
    assert second[2] != alone[2]


def test_a_maximum_is_returned_at_the_next_batch(tmp_path: Path) -> None:
    def work() -> list[Any]:
        vote = distributed.DelayedMax()
        said = [15 if batch == 2 and distributed.rank() == 1 else 0 for batch in range(5)]
        return [*(vote(s, 0) for s in said), vote.last(distributed.rank() + 1, 1)]

    none, some = [0, 0], [15, 0]
    assert together(work, tmp_path) == [[none, none, none, some, none, [2, 1]]] * 2
    alone = distributed.DelayedMax()
    assert [alone(15, 0), alone(0, 1), alone.last(3)] == [[15, 0], [0, 1], [3]]


def test_collectives(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"

    def work() -> list[Any]:
        def append() -> int:
            with log.open("a") as file:
                file.write(f"{distributed.rank()}")
            return distributed.rank()

        return [
            distributed.in_turns(append),
            distributed.broadcast(distributed.rank),
            distributed.gather(distributed.rank()),
            distributed.summed({"a": distributed.rank() + 1, "b": 1}),
            list(range(8))[distributed.share(8)],
        ]

    first, *others = together(work, tmp_path, size=3)
    assert first == [0, 0, [0, 1, 2], {"a": 6, "b": 3}, [0, 3, 6]]
    assert others == [
        [1, 0, None, {"a": 6, "b": 3}, [1, 4, 7]],
        [2, 0, None, {"a": 6, "b": 3}, [2, 5]],
    ]
    assert log.read_text()[0] == "0"


def refusal(make: Callable[[], Any]) -> str:
    try:
        make()
    except InputError as error:
        return str(error)
    return ""


def test_trainings_that_several_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.used(x.flatten(1))
            return logits

    def work() -> list[str]:
        def idle(perturbation: WeightPerturbation | None) -> Trainer:
            return trainer(Standard(), BATCH, Idle(), perturbation)

        return [
            refusal(lambda: list(idle(None).epochs())),
            refusal(lambda: list(idle(AWP()).epochs())),
            refusal(lambda: replicas_of(1)),
        ]

    def replicas_of(images: int) -> Trainer:
        made = trainer(Standard(), BATCH)
        recipe = Recipe(Standard(), SGD(0.2), OneCycle(0.5), made.settings)
        few = TrainingData(made.train.take(torch.arange(images)), made.validation, DATA)
        return Trainer(network(), recipe, few, made.threat, seed=0, terminal=quiet())

    for *idle, few in together(work, tmp_path):
        for refused in idle:
            assert "leaves out parameters: idle.weight, idle.bias" in refused
        assert few == "1 training images cannot be divided over 2 processes"


# Evaluation


def ledger_of(ledger: Ledger) -> list[Any]:
    tables = ledger.samples(), ledger.report(Threat(Norm.linf, EPS))
    return [[table.drop(columns="seconds", errors="ignore") for table in tables], ledger.arrays()]


@pytest.mark.parametrize("images", [41, 1])
def test_an_evaluation_is_divided_by_images(images: int, tmp_path: Path) -> None:
    settings = Evaluation(
        {"fgsm": FGSM(eps=EPS), "pgd": GREEDY}, survivors_only=True, samples=images, batch_size=8,
        save_adversarial=True,
    )  # fmt: skip
    made = trainer(Standard(), 32)
    list(made.epochs())
    model = made.model.float()
    model[0] = nn.Identity()  # type: ignore[operator]

    def work() -> Any:
        workplace = EvaluationCache(tmp_path / f"partial{distributed.suffix()}", None)
        plan = Plan(settings, Threat(Norm.linf, EPS), seed=0)
        done = run_evaluation(model, DATA.load()[1], plan, workplace, quiet())
        kept = done.pieces.path.is_dir()
        distributed.barrier()
        done.pieces.remove()
        return done.found, kept

    (alone, _), ((first, kept), second) = work(), together(work, tmp_path)
    assert second[0] is None
    # Each process has its own cache; a process without an image has none.
    assert images == 1 or kept
    assert second[1] == (images > 1)
    (ours, arrays), (theirs, expected) = ledger_of(first.ledger), ledger_of(alone.ledger)
    for table, other in zip(ours, theirs, strict=True):
        pd.testing.assert_frame_equal(table, other, rtol=1e-4, atol=1e-5)
    for name, values in arrays.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, expected[name], atol=1e-5)
        else:
            assert (values == expected[name]).all()
    assert not list(tmp_path.glob("partial*"))


def test_certificates_are_those_of_one_process(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(1), nn.Linear(16, 3))
    Gaussian(0.5).install(model, 0)
    split = Split(*(part[:7] for part in DATA.load()[1]))
    settings = Evaluation(
        {}, eot=2, votes=20, certification=Certification(n0=10, n=100, attack_steps=2)
    )

    def work() -> Any:
        workplace = EvaluationCache(tmp_path / f"partial{distributed.suffix()}", None)
        plan = Plan(settings, Threat(Norm.l2, 0.1), seed=0)
        return run_evaluation(model, split, plan, workplace, quiet()).found

    alone, (first, _) = work(), together(work, tmp_path)
    timeless = ([{**vars(i), "seconds": 0} for i in f.certificates.images] for f in (alone, first))
    ours, theirs = timeless
    assert len(ours) == 7
    assert ours == theirs
    assert str(first.certificates.audit) == str(alone.certificates.audit)
