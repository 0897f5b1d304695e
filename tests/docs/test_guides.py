"""Run the commands and the Python code on every page of the manual."""

import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robusttrain.models.preact_resnet import PreActResNet
from toys.command_line import Answer, CommandLine
from toys.manual import Block, blocks, pages, words

pytestmark = pytest.mark.long

# Arguments that make a command short: for commands without data of their own, for those that train,
# and for all.
DATA = [
    "dataset=synthetic", "dataset.train_size=80", "dataset.validation=16", "dataset.test_size=24",
]  # fmt: skip
TRAINING = ["epochs=1", "batch_size=64"]
ALWAYS = ["evaluation.samples=4", "evaluation.audit=false", "device=cpu"]
SUITE = "evaluation=quick"

# Further arguments for some commands, which are identified by words that only they contain.
RESNET = ["dataset.image_shape=[3,32,32]", "model.width=4", "model.blocks=[1,1,1,1]"]
SHORT = ["evaluation.attacks.square.queries=20"]
MORE = {
    "dataset=cifar10 model=preact_resnet18": RESNET,
    "checkpoint=theirs.pt": [*DATA, *RESNET[:1]],
    "checkpoint=net.pt2": [*DATA, *RESNET[:1]],
    "experiment=cifar10": RESNET,
    "experiment=mnist_best": ["model.channels=[8,8,8]", SUITE],
    "dataset=folder": ["dataset.image_size=32", "model.name=shufflenet_v2_x0_5"],
    "model=timm": ["model.name=test_resnet"],
    "model=theirs dataset=cifar10": RESNET[:1],
    "evaluation=full": SHORT,
    "evaluation=fast": [
        "evaluation.attacks.apgd_ce.restarts=2",
        "evaluation.attacks.apgd_margin.restarts=2",
    ],
    "evaluation=certify": ["evaluation.certification.n=200", "evaluation.certification.n0=10"],
    "evaluation=radii": [
        "evaluation.radii.resolution=1",
        "evaluation.radii.largest=1",
        "evaluation.radii.attacks.fmn.steps=10",
        "evaluation.attacks.apgd_ce.restarts=2",
        "evaluation.attacks.apgd_margin.restarts=2",
    ],
    "evaluation=verified": ["evaluation.verification.seconds=0.2"],
    "evaluation=eot": ["evaluation.eot=2", "evaluation.votes=3"],
    "noise=flicker": ["evaluation.eot=2", "evaluation.votes=3", "hydra.run.dir=MINE"],
    "seed=0,1,2": ["seed=0"],
    # The sweep before it has one seed here.
    "checkpoint=sweep/0": ["checkpoint=sweep/0,sweep/1", "eps=0.1"],
    "n_trials=8": ["hydra.sweeper.n_trials=2"],
}

# Commands that choose their data themselves, instead of by `DATA`.
OWN_DATA = ("dataset=folder", "dataset=arrays", "dataset=stripes", "checkpoint=")

# Commands that are run as printed.
AS_PRINTED = ("compare", "report", "export", "rerun", "resume=outputs")

# Commands that start other processes, which takes seconds. The tests named here run them; this file
# only composes their configuration.
ELSEWHERE = {
    "hydra/launcher=joblib": "tests/sweeps/test_launchers.py",
    "hydra/launcher=ray": "tests/sweeps/test_launchers.py",
    "hydra/launcher=submitit_local": "tests/sweeps/test_launchers.py",
    "dataset=huggingface": "tests/data/test_huggingface.py",
    "attacks.fb=foolbox": "tests/attacks/test_external.py",
    "torchrun": "tests/runs/test_distributed_runs.py",
}


def small(command: str) -> list[str]:
    """The arguments of a command, followed by others that make it short."""
    given = words(command)
    if given[0].startswith(AS_PRINTED):
        return given
    if any(name in command for name in ELSEWHERE):
        # Hydra does not print the configuration of a sweep, so lists of values are left out.
        return [*(word for word in given if word != "-m" and "," not in word), "--cfg", "hydra"]
    added = [*TRAINING, *ALWAYS]
    if not any(word in command for word in OWN_DATA):
        added = [*DATA, *added]
    if "evaluation=" not in command:
        added = [SUITE, *added]
    for name, more in MORE.items():
        added += more if name in command else []
    return [*given, *added]


@pytest.fixture(scope="module")
def run(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that pages call RUN."""
    folder = tmp_path_factory.mktemp("run") / "RUN"
    start = ["defense=standard", SUITE, *DATA, *TRAINING, *ALWAYS, f"hydra.run.dir={folder}"]
    answer = command_line.run(*start, cwd=folder.parent)
    assert answer.code == 0, answer.said
    return folder


@pytest.fixture(scope="module")
def assumed(run: Path) -> Path:
    """A directory with all files that pages assume."""
    folder = run.parent
    for name in ("outputs/a", "outputs/b", "outputs/c", "outputs/interrupted"):
        shutil.copytree(run, folder / name)
    (folder / "outputs/interrupted/manifest.json").unlink()
    for number in range(24):
        file = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * number, 0, 255 * (number % 2))).save(file)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for name in ("scans.npz", "generated.npz"):
        np.savez(folder / name, x=pixels, y=np.arange(40) % 4)
    network = PreActResNet(blocks=[1, 1, 1, 1], width=4).build(10, (3, 32, 32))
    torch.save({"state_dict": network.state_dict()}, folder / "theirs.pt")
    # In a process of its own: once something was exported, autograd starts threads, after which
    # other tests of this process could not fork.
    export = multiprocessing.get_context("fork").Process(target=_export, args=(folder,))
    export.start()
    export.join()
    assert export.exitcode == 0
    return folder


@pytest.fixture
def place(tmp_path: Path, assumed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that directory."""
    shutil.copytree(assumed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mypackage", None)


def _export(folder: Path) -> None:
    batch = ({0: torch.export.Dim("batch")},)
    linear = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(3072, 10)).eval()
    exported = torch.export.export(linear, (torch.rand(2, 3, 32, 32),), dynamic_shapes=batch)
    torch.export.save(exported, folder / "net.pt2")


# The reader's architecture, for pages that only name it.
BUILD_NET = """
from robusttrain.models.preact_resnet import PreActResNet
def build_net():
    return PreActResNet(blocks=[1, 1, 1, 1], width=4).build(10, (3, 32, 32))
"""


def write_files(page: list[Block], place: Path) -> None:
    """Write the files that a page shows; a file may be spread over several blocks."""
    for block in page:
        if block.file is not None:
            path = place / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(block.text + "\n\n")
    if not (place / "mypackage.py").exists():
        (place / "mypackage.py").write_text(BUILD_NET)
        (place / "mine" / "model").mkdir(parents=True)
        (place / "mine" / "model" / "theirs.yaml").write_text("_target_: mypackage.build_net\n")


@pytest.mark.parametrize("page", pages())
def test_the_commands_of_a_page_run(
    page: str, place: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands of a page run one after another in one directory."""
    found = blocks(pages()[page])
    write_files(found, place)
    monkeypatch.chdir(place)
    start = partial(command_line.run, cwd=place, PYTHONPATH=str(place))
    for block in found:
        _run(block, start)


def _run(block: Block, start: Callable[..., Answer]) -> None:
    for command in block.commands:
        answer = start(*small(command))
        assert answer.code == 0, f"{command}\n{answer.said}"
    if block.language == "python" and block.file is None:
        exec(compile(block.text, "<manual>", "exec"), {})


def test_no_table_of_this_file_names_a_removed_command() -> None:
    printed = "\n".join(c for path in pages().values() for b in blocks(path) for c in b.commands)
    for name in [*MORE, *ELSEWHERE, *AS_PRINTED, *OWN_DATA]:
        assert name in printed, name


def test_files_of_tests_named_here_exist() -> None:
    root = Path(__file__).parents[2]
    assert all((root / file).is_file() for file in ELSEWHERE.values())
