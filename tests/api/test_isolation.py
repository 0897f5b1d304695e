"""What belongs to the program that calls the Python API stays as it was."""

import contextlib
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

import robusttrain as rt

X, Y = torch.linspace(0, 1, 8 * 16).reshape(8, 1, 4, 4), torch.arange(8) % 4


MODEL = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))


def evaluate(folder: Path) -> None:
    words = ["evaluation.audit=false"]
    rt.evaluate(MODEL, X, Y, eps=0.1, evaluation="quick", overrides=words, progress=False)


def train(folder: Path) -> None:
    for _ in rt.train(MODEL, X, Y, eps=0.1, epochs=2, progress=False):
        unchanged()


def run(folder: Path) -> None:
    words = ["dataset=synthetic", "model=linear", "epochs=1", "evaluation=quick", "eps=0.1"]
    words += ["evaluation.audit=false", "evaluation.samples=8", f"hydra.run.dir={folder / 'run'}"]
    rt.run(*words, progress=False)


def refused(folder: Path) -> None:
    with pytest.raises(rt.InputError):
        rt.run("defense=mdry", progress=False)


CALLS: dict[str, Callable[[Path], None]] = {
    call.__name__: call for call in (evaluate, train, run, refused)
}
before: list[dict[str, Any]] = []


def state() -> dict[str, Any]:
    """What the functions of the API could change."""
    log = logging.getLogger("robusttrain")
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        "random": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "logging": (logging.root.level, [*logging.root.handlers], log.level, [*log.handlers]),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "hydra": (GlobalHydra.instance(), GlobalHydra.instance().hydra),
        "version of hydra": hydra.version.getbase(),
        # torch sets some of its own when parts of it are imported.
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("TORCH")},
        "directory": Path.cwd(),
    }


def unchanged() -> None:
    now = state()
    assert [key for key, value in before[0].items() if now[key] != value] == []


@contextlib.contextmanager
def other_application(folder: Path) -> Iterator[None]:
    """A Hydra application of the caller's own, which the program is in the middle of."""
    (folder / "own.yaml").write_text("x: 1")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(folder), version_base="1.1"):
        yield
        assert hydra.compose("own").x == 1
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_global_changes(name: str, mode: Any, tmp_path: Path) -> None:
    # Imports may set what they like once.
    if name != "refused":
        evaluate(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with mode(), other_application(tmp_path):
            before[:] = [state()]
            CALLS[name](tmp_path)
            unchanged()
    finally:
        torch.set_default_dtype(torch.float32)


def test_ctrl_c_saves_a_checkpoint_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    words = ["dataset=synthetic", "model=linear", "epochs=3", "stages=[train]", "eps=0.1"]

    class Stopping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "epoch 1/3" in record.getMessage():
                signal.raise_signal(signal.SIGINT)

    log, handler = logging.getLogger("robusttrain"), Stopping()
    log.addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rt.run(*words, f"hydra.run.dir={tmp_path / 'run'}", progress=False)
    finally:
        log.removeHandler(handler)
    resumed = rt.run(f"resume={tmp_path / 'run'}", progress=False)
    whole = rt.run(*words, f"hydra.run.dir={tmp_path / 'whole'}", progress=False)
    assert resumed.training["epoch"].tolist() == [1, 2, 3]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])
