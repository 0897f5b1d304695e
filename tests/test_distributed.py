"""Several processes against one with as many times the batch, and what they say and leave."""

import io
import json
import multiprocessing
import re
import subprocess
import sys
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

from robusttrain import checkpoint, distributed, replicas
from robusttrain.attacks.fgsm import FGSM
from robusttrain.attacks.pgd import PGD
from robusttrain.data import Split, hold_out
from robusttrain.data.synthetic import Synthetic
from robusttrain.defenses import Defense
from robusttrain.defenses.alpha_mix import AlphaMix
from robusttrain.defenses.rt import RT
from robusttrain.defenses.standard import Standard
from robusttrain.defenses.trades import TRADES
from robusttrain.defenses.worst_case import WorstCase
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation
from robusttrain.evaluation.certification import Certification
from robusttrain.evaluation.examination import examined
from robusttrain.noise import NoiseLayer, Progress, Switches, attach
from robusttrain.noise.gaussian import Gaussian
from robusttrain.optimizers import SGD
from robusttrain.precision import Precision
from robusttrain.report.ledger import Ledger
from robusttrain.report.terminal import Terminal
from robusttrain.schedules import OneCycle
from robusttrain.tally import Epoch
from robusttrain.threat import Norm
from robusttrain.training import Trainer, Training

pytestmark = pytest.mark.long

EPS, BATCH = 0.05, 16
# 101 images in batches of 32: the last has five, two of them for the first process.
DATA = Synthetic([1, 4, 4], 3, train_size=132, test_size=41, noise=0.3, validation=31)
GREEDY = PGD(eps=EPS, steps=3, random_start=False)


@dataclass
class Nudged:
    """PGD from next to the image, without a draw."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **keys: Any) -> Tensor:
        return GREEDY(model, (x + EPS / 2).clamp(0, 1), y, **keys)


DEFENSES: dict[str, Defense] = {
    "standard": Standard(),
    "alpha_mix": AlphaMix(GREEDY),
    "rt": RT(eps=EPS),
    "madry": WorstCase(GREEDY),
    # Its attack comes between two passes that are descended together.
    "trades": TRADES(Nudged()),
}


def quiet() -> Terminal:
    return Terminal(Console(file=io.StringIO()))


def _worker(work: Callable[[], Any], rank: int, size: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    with distributed.member(dist.FileStore(str(meeting), size), rank, size):
        torch.save(work(), meeting.with_name(f"{rank}.pt"))


def together(work: Callable[[], Any], folder: Path, size: int = 2) -> list[Any]:
    """What `work` gives in each of `size` processes that know of each other."""
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
    """Images in float64, so that rounding hides nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Pull(NoiseLayer):
    """No noise, but a penalty on a parameter of its own."""

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
    defense: Defense, batch_size: int, model: nn.Module | None = None, **keys: Any
) -> Trainer:
    train, validation = hold_out(DATA.load()[0], DATA.validation, 0)
    settings = {"epochs": 2, "batch_size": batch_size, "precision": Precision.fp32, **keys}
    return Trainer(
        network() if model is None else model, defense, SGD(0.2), OneCycle(0.5),
        Training(validation_attack=FGSM(eps=EPS), clip_gradient=1.0, **settings),
        train=train, validation=validation, dataset=DATA, norm=Norm.linf, eps=EPS, seed=0,
        terminal=quiet(),
    )  # fmt: skip


def trained(batch_size: int, norm: bool) -> dict[str, tuple[list[Epoch], dict[str, Tensor]]]:
    results = {}
    for name, defense in DEFENSES.items():
        made = trainer(defense, batch_size, network(norm), sync_batchnorm=norm)
        results[name] = list(made.epochs()), made.model.state_dict()
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


@dataclass
class Overheard(PGD):
    """PGD that notes when it is at work."""

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
    assert isinstance(made.forward, replicas.Replicas)

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        TRAFFIC.append("r")
        future: torch.futures.Future[Any] = dist.all_reduce(
            bucket.buffer(), async_op=True
        ).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    made.forward.together.register_comm_hook(None, reduce)
    made.forward.together.register_forward_pre_hook(lambda *_: TRAFFIC.append("f"))
    with pytest.MonkeyPatch.context() as patched:
        for name in ("all_reduce", "broadcast", "all_gather_object", "gather_object"):
            patched.setattr(dist, name, noted(getattr(dist, name)))
        list(made.epochs())
    return "".join(TRAFFIC)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_crafting_speaks_to_nobody_and_a_step_once(mode: str, tmp_path: Path) -> None:
    attack = Overheard(eps=EPS, steps=3, mode=mode)  # type: ignore[arg-type]

    def work() -> list[str]:
        return [
            overheard(WorstCase(attack), False),
            overheard(AlphaMix(attack), False),
            overheard(WorstCase(attack), True),
        ]

    for plain, twice, synchronised in together(work, tmp_path):
        # The statistics of BatchNorm and the figures come at the end.
        assert plain == "[]frc" * 9 + "cc"
        assert twice == "[]ffrc" * 9 + "cc"
        # A sum of moments in the pass, and one of their gradients in the way back.
        assert re.fullmatch(r"(\[\]fccrc){9}cc", synchronised)


def test_each_process_draws_for_itself_and_the_first_as_if_alone(tmp_path: Path) -> None:
    def work() -> list[Any]:
        model = network()
        Gaussian(0.1).install(model, 5)
        model.append(nn.Dropout(0.5))
        torch.manual_seed(3)
        made = trainer(Standard(), BATCH, model)
        seeds = [layer.seed for layer in replicas.noise_layers(model)]
        return [
            {name: stream.initial_seed() for name, stream in made.streams.items()},
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


def test_votes_are_counted_at_the_next_batch(tmp_path: Path) -> None:
    def work() -> list[Any]:
        vote = distributed.Vote()
        said = [15 if batch == 2 and distributed.rank() == 1 else 0 for batch in range(5)]
        return [*(vote(s, 0) for s in said), vote.last(distributed.rank() + 1, 1)]

    none, some = [0, 0], [15, 0]
    assert together(work, tmp_path) == [[none, none, none, some, none, [2, 1]]] * 2
    alone = distributed.Vote()
    assert [alone(15, 0), alone(0, 1), alone.last(3)] == [[15, 0], [0, 1], [3]]


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"

    def work() -> list[Any]:
        def append() -> int:
            with log.open("a") as file:
                file.write(f"{distributed.rank()}")
            return distributed.rank()

        return [
            distributed.in_turns(append),
            distributed.from_main(distributed.rank),
            distributed.gathered(distributed.rank()),
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


def test_what_cannot_be_trained_together_is_refused(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.used(x.flatten(1))
            return logits

    def work() -> list[str]:
        few = trainer(Standard(), BATCH)
        few.train = few.train.take(torch.arange(1))
        return [
            refusal(lambda: list(trainer(Standard(), BATCH, Idle()).epochs())),
            refusal(lambda: replicas_of(1)),
        ]

    def replicas_of(images: int) -> Trainer:
        made = trainer(Standard(), BATCH)
        return Trainer(
            network(), Standard(), SGD(0.2), OneCycle(0.5), made.settings,
            train=made.train.take(torch.arange(images)), validation=made.validation, dataset=DATA,
            norm=Norm.linf, eps=EPS, seed=0, terminal=quiet(),
        )  # fmt: skip

    for idle, few in together(work, tmp_path):
        assert "leaves out parameters: idle.weight, idle.bias" in idle
        assert few == "1 training images cannot be divided over 2 processes"


# Evaluation


def ledger_of(ledger: Ledger) -> list[Any]:
    tables = ledger.samples(), ledger.report("linf")
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
        folder = tmp_path / f"partial{distributed.suffix()}"
        done = examined(
            model, DATA.load()[1], settings, norm=Norm.linf, eps=EPS, seed=0, folder=folder,
            origin=None, terminal=quiet(),
        )  # fmt: skip
        kept = done.pieces.path.is_dir()
        distributed.together()
        done.pieces.remove()
        return done.found, kept

    (alone, _), ((first, kept), second) = work(), together(work, tmp_path)
    assert second[0] is None
    # Each has kept its own pieces; a process without an image has none.
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
        return examined(
            model, split, settings, norm=Norm.l2, eps=0.1, seed=0,
            folder=tmp_path / f"partial{distributed.suffix()}", origin=None, terminal=quiet(),
        ).found  # fmt: skip

    alone, (first, _) = work(), together(work, tmp_path)
    timeless = ([{**vars(i), "seconds": 0} for i in f.certificates.images] for f in (alone, first))
    ours, theirs = timeless
    assert len(ours) == 7
    assert ours == theirs
    assert str(first.certificates.audit) == str(alone.certificates.audit)


# The command line

RUN = [
    "defense=alpha_mix", "attack=pgd", "attack.steps=2", "noise=gaussian", "noise.predict=true",
    "dataset=synthetic", "model=mlp", "dataset.crop=1", "dataset.flip=true", "epochs=6",
    "batch_size=32", "evaluation=quick", "evaluation.samples=21", "evaluation.audit=false",
    "evaluation.eot=2", "evaluation.votes=5", "training.checkpoint_minutes=0.0001",
    "optimizer=sgd", "device=cpu",
]  # fmt: skip

KILLED = """
import os, signal
from robusttrain.__main__ import main
from robusttrain.attacks.pgd import PGD
search, calls = PGD.search, []
def searching(self, *arguments):
    calls.append(0)
    if len(calls) == 30 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return search(self, *arguments)
PGD.search = searching
main()
"""

# Imports once, then forks processes as torchrun would start them.
DRIVER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import scipy.stats
from torch.distributed import TCPStore
from robusttrain import cli
from robusttrain.__main__ import main

outside = dict(os.environ)
os.environ |= {
    "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
stores = []

def start(name, arguments, size=2):
    stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(stores[-1].port)}
    return [begin(f"{name}.{rank}", arguments, rank) for rank in range(size)]

def begin(name, arguments, rank):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with open(name, "ab", 0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv[1:] = arguments
    code = 1
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else print(left.code) or 1
    finally:
        sys.stdout.flush()
        os._exit(code)

def end(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

run = json.loads(sys.argv[1])
codes = {"whole": end(start("whole.txt", [*run, "hydra.run.dir=whole"]))}
children = start("term.txt", [*run, "hydra.run.dir=term"])
while not Path("term", "checkpoint.pt").exists():
    time.sleep(0.001)
# Only one of them is told.
os.kill(children[1], signal.SIGTERM)
codes["told"] = end(children)
codes["one"] = end(start("one.txt", ["resume=term"], size=1))
codes["resumed"] = end(start("resumed.txt", ["resume=term"]))
codes["sweep"] = end(start("sweep.txt", ["-m", *run]))
codes["wrong"] = end(start("wrong.txt", [*run, "eps=-1", "hydra.run.dir=wrong"]))
codes["gone"] = end(start("gone.txt", ["resume=nowhere"]))
# torchrun itself; the second process is killed, with no time for a word.
launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
with open("killed.txt", "w") as file:
    codes["killed"] = subprocess.run(
        [sys.executable, *launch, sys.executable, "-c", sys.argv[2], *run, "hydra.run.dir=killed"],
        env=outside, stdout=file, stderr=file,
    ).returncode
codes["revived"] = end(start("revived.txt", ["resume=killed"]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("driven")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(RUN), KILLED],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def said(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}.txt.{rank}").read_text() for rank in range(2)]


def same(one: Path, other: Path) -> None:
    for name in ("train.csv", "report.csv", "samples.csv"):
        tables = (
            pd.read_csv(run / name).drop(columns="seconds", errors="ignore") for run in (one, other)
        )
        pd.testing.assert_frame_equal(*tables)
    for name in ("best.pt", "checkpoint.pt"):
        weights, others = (checkpoint.load(run / name).model for run in (one, other))
        assert all(torch.equal(weights[key], others[key]) for key in (*weights, *others)), name


def test_one_process_writes_and_speaks_for_all(driven: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = driven
    assert codes["whole"] == [0, 0]
    first, second = said(folder, "whole")
    assert first.count("epoch 6/6") == 1
    assert second == ""
    made = {path.name for path in folder.iterdir() if path.is_dir()}
    assert made == {"whole", "term", "killed"}
    assert json.loads((folder / "whole/manifest.json").read_text())["processes"] == 2
    assert not list((folder / "whole").glob("evaluation.partial*"))
    assert (folder / "whole/robusttrain.log").read_text().count("epoch 6/6") == 1
    assert len(pd.read_csv(folder / "whole/samples.csv")) == 21


def test_processes_that_are_told_to_stop_leave_after_the_same_batch_and_go_on(
    driven: tuple[Path, dict[str, Any]],
) -> None:
    folder, codes = driven
    assert codes["told"] == [143, 143]
    assert re.search(
        r"stopped by SIGTERM: torchrun .*-m robusttrain resume=", said(folder, "term")[0]
    )
    assert (codes["one"], codes["resumed"]) == ([1], [0, 0])
    assert "was trained by 2 processes, not by 1" in (folder / "one.txt.0").read_text()
    assert "going on behind batch" in said(folder, "resumed")[0]
    same(folder / "term", folder / "whole")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sweep", "-m is not allowed under torchrun"),
        ("wrong", "eps=-1 is not allowed"),
        ("gone", "resume=nowhere is no directory of a run"),
    ],
)
def test_a_refusal_is_said_once(
    name: str, message: str, driven: tuple[Path, dict[str, Any]]
) -> None:
    folder, codes = driven
    assert codes[name] == [1, 1]
    both = "".join(said(folder, name))
    assert re.search(rf"robusttrain: process \d of 2: {message}", both)
    assert both.count(message) == 1
    assert "Traceback" not in both


def test_a_process_that_is_killed_ends_the_job_and_it_goes_on(
    driven: tuple[Path, dict[str, Any]],
) -> None:
    folder, codes = driven
    assert codes["killed"] == 1
    told = (folder / "killed.txt").read_text()
    # torchrun may have told the first process to stop before it has noticed.
    lost = "robusttrain: process 0 of 2: another process of this run has ended"
    assert lost in told or "stopped by SIGTERM" in told
    assert re.search(r"torchrun --nproc_per_node=2 -m robusttrain resume=\S*killed goes on", told)
    assert codes["revived"] == [0, 0]
    assert "going on behind batch" in said(folder, "revived")[0]
    same(folder / "killed", folder / "whole")
