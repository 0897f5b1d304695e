"""Certification from the command line: files, warnings and errors."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import norm
from torch import nn

from robusttrain.api import task
from robusttrain.api.arguments import unstacked
from robusttrain.config.error_messages import explain
from robusttrain.data import as_input
from robusttrain.data.synthetic import Synthetic
from robusttrain.errors import InputError
from robusttrain.evaluation import certification
from robusttrain.models.linear import Linear
from robusttrain.report.terminal import Terminal
from robusttrain.runs import experiment
from robusttrain.runs.saved_model import load_model
from toys.command_line import CommandLine
from toys.external import SHAPE, TINY, prepared, scripted, synthetic, written

SIGMA = 0.25
GAUSSIAN = ["noise=gaussian", f"noise.sigma={SIGMA}"]
TRAINING = [*TINY, "model=linear", "defense=standard", "stages=[train]"]

# Settings for quick certificates.
CERTIFY = [
    "evaluation=certify", "evaluation.samples=10", "evaluation.certification.n0=20",
    "evaluation.certification.n=200", "evaluation.certification.attack_steps=3",
    "evaluation.attacks.pgd.steps=2", "evaluation.eot=2", "evaluation.votes=20", "device=cpu",
]  # fmt: skip
UNAUDITED = "evaluation.audit=false"


def run(folder: Path, *arguments: str, terminal: io.StringIO | None = None) -> str:
    """Run in `folder`, which may exist; return what was printed."""
    folder.mkdir(exist_ok=True)
    words = [override for argument in arguments for override in unstacked(argument)]
    said = io.StringIO() if terminal is None else terminal
    built, origin = prepared(*words)
    experiment.run(built, origin, folder, Terminal(Console(file=said, soft_wrap=True)))
    return said.getvalue()


def of(checkpoint: Path) -> list[str]:
    """The arguments that certify a saved model."""
    return ["stages=[evaluate]", f"checkpoint='{checkpoint}'", *CERTIFY]


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a linear model with the given noise, once for all tests."""
    known: dict[tuple[str, ...], Path] = {}

    def trained(*noise: str) -> Path:
        if noise not in known:
            known[noise] = tmp_path_factory.mktemp("trained")
            run(known[noise], *TRAINING, *noise)
        return known[noise]

    return trained


# --- what is written ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(train: Train) -> Path:
    """A model that was trained with noise, and predicts without it."""
    return train(*GAUSSIAN, "epochs=20")


@pytest.fixture(scope="module")
def finished(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run with all files, and its output."""
    folder = tmp_path_factory.mktemp("finished")
    more = ["evaluation.probe_samples=4", "evaluation.save_adversarial=true"]
    return folder, run(folder, *of(trained), *more)


@pytest.fixture(scope="module")
def certified(finished: tuple[Path, str]) -> pd.DataFrame:
    return pd.read_csv(finished[0] / "certified.csv")


def test_the_certificates_are_a_table(certified: pd.DataFrame, finished: tuple[Path, str]) -> None:
    columns = ["index", "index_in", "label", "predicted", "radius", "abstained", "seconds"]
    assert list(certified.columns) == columns
    samples = pd.read_csv(finished[0] / "samples.csv")
    assert certified[["index", "label"]].equals(samples[["index", "label"]])
    assert certified["abstained"].dtype == bool
    assert (certified["seconds"] > 0).all()
    assert (certified["radius"] > 0).equals(~certified["abstained"])
    assert certified["radius"].max() <= SIGMA * norm.ppf(0.001 ** (1 / 200)) + 1e-9


def test_no_radius_exceeds_the_distance_to_another_class(
    certified: pd.DataFrame, trained: Path
) -> None:
    """The share of draws of a class is at most Phi(distance to another class / sigma)."""
    _, test = synthetic().load()
    layer = next(m for m in load_model(trained).modules() if isinstance(m, nn.Linear))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    held = certified[~certified["abstained"]]
    assert len(held) > 2
    for image in held.to_dict("records"):
        x, own = as_input(test.images[image["index"]]).flatten().double(), image["predicted"]
        ahead = (weight[own] - weight) @ x + bias[own] - bias
        distances = ahead / (weight[own] - weight).norm(dim=1)
        assert image["radius"] < min(float(d) for k, d in enumerate(distances) if k != own)


def test_the_curve_counts_the_certificates(
    certified: pd.DataFrame, finished: tuple[Path, str]
) -> None:
    whole = pd.read_csv(finished[0] / "curve.csv")
    curve = whole[whole["curve"] == "certified"]
    assert curve["eps"].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    right = ~certified["abstained"] & (certified["predicted"] == certified["label"])
    counts = [int((right & (certified["radius"] >= radius)).sum()) for radius in curve["eps"]]
    assert (curve["accuracy"] * 10).round(9).tolist() == counts
    assert set(curve["norm"]) == {"l2"}
    assert curve[["steps", "eot"]].isna().to_numpy().all()
    assert set(whole["curve"]) == {"eps", "steps", "eot", "certified"}


def test_the_report_has_attacks_within_certificates_and_controls_of_the_noise(
    certified: pd.DataFrame, finished: tuple[Path, str]
) -> None:
    folder, said = finished
    rows = pd.read_csv(folder / "report.csv").set_index("attack")
    noise = {"noise_off", "noise_off_attacked", "noise_fixed", "eot_1", "eot_5", "eot_20", "eot_80"}
    assert {"clean", "pgd", "uint8", "control", "worst_case"} | noise <= set(rows.index)
    inside = rows.loc["in_certificate"]
    held = certified[~certified["abstained"]]
    assert (inside["norm"], inside["n"], inside["accuracy"]) == ("l2", len(held), 1)
    assert inside["eps"] == pytest.approx(held["radius"].min())
    audit = pd.read_csv(folder / "audit.csv").set_index("check")
    assert audit["verdict"]["certificates broken by an attack"] == "pass"
    assert audit["verdict"]["accuracy lost with fixed or no noise"] in ("pass", "warn")
    assert "certified in l2 on 10 images (Cohen et al. 2019, theorem 1)" in said
    assert not (folder / "evaluation.partial").exists()


def test_without_an_audit_attacks_within_certificates_are_still_checked(
    trained: Path, tmp_path: Path
) -> None:
    run(tmp_path, *of(trained), UNAUDITED, "~evaluation.attacks.pgd")
    checks = pd.read_csv(tmp_path / "audit.csv")["check"].tolist()
    assert checks == ["certificates broken by an attack"]
    assert set(pd.read_csv(tmp_path / "curve.csv")["curve"]) == {"certified"}


def test_radii_in_l1_are_reported_in_l1(trained: Path, tmp_path: Path) -> None:
    wrapped = ["noise=smoothing", "noise.distribution=uniform", f"noise.sigma={SIGMA}"]
    said = run(tmp_path, *of(trained), UNAUDITED, *wrapped)
    assert "certified in l1 on 10 images" in said
    rows = pd.read_csv(tmp_path / "report.csv").set_index("attack")
    assert (rows["norm"]["in_certificate"], rows["accuracy"]["in_certificate"]) == ("l1", 1)


def test_a_killed_certification_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    run(whole, *of(trained), UNAUDITED)
    bound, asked = certification.lower_bound, [0]

    def killed(*arguments: Any) -> float:
        asked[0] += 1
        if asked[0] == 4:
            raise KeyboardInterrupt
        return bound(*arguments)

    monkeypatch.setattr(certification, "lower_bound", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, *of(trained), UNAUDITED)
    assert not (folder / "certified.csv").exists()
    run(folder, *of(trained), UNAUDITED)
    # Three of ten images were finished.
    assert asked == [4 + 7]
    for name in ("certified.csv", "curve.csv", "audit.csv", "report.csv"):
        first, second = (
            pd.read_csv(place / name).drop(columns="seconds", errors="ignore")
            for place in (whole, folder)
        )
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert not (folder / "evaluation.partial").exists()


# --- what is warned of, before data is loaded ---------------------------------------------------


class LoadedError(Exception):
    """Raised when data is loaded, that is, when the work has begun."""


@pytest.fixture
def before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """The output of a run before it loads data."""

    def loaded(self: Synthetic) -> None:
        raise LoadedError

    def said(*arguments: str) -> str:
        monkeypatch.setattr(Synthetic, "load", loaded)
        terminal = io.StringIO()
        with pytest.raises(LoadedError):
            run(tmp_path, *arguments, terminal=terminal)
        monkeypatch.undo()
        return terminal.getvalue()

    return said


def smoothing(sigma: float) -> list[str]:
    return ["noise=smoothing", f"noise.sigma={sigma}"]


# Noise of the training, noise of the certification, and the former in words of the warning.
MISFITS = {
    "no noise": (["noise=none"], smoothing(SIGMA), "no noise"),
    "another sigma": (GAUSSIAN, smoothing(0.5), "sigma 0.25"),
    "another sigma of its noise": (GAUSSIAN, ["noise=gaussian", "noise.sigma=0.5"], "sigma 0.25"),
    "noise of prediction": (
        [*GAUSSIAN, "noise.train=false", "noise.predict=true"],
        smoothing(SIGMA),
        "no noise",
    ),
    "smoothing": (smoothing(SIGMA), [], "no noise"),
    "noise elsewhere": ([*GAUSSIAN, "noise.at=first"], smoothing(SIGMA), "no noise"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_certifying_with_other_noise_than_in_training_warns(
    case: str, train: Train, before_work: Callable[..., str]
) -> None:
    noise, wanted, called = MISFITS[case]
    said = before_work(*of(train(*noise)), *wanted)
    (line,) = said.splitlines()
    sigma = 0.5 if "0.5" in "".join(wanted) else 0.25
    start = f"warning: the model was trained with {called} and is certified with sigma {sigma}: "
    assert line.startswith(start)


FITS = {
    "its own noise": (GAUSSIAN, []),
    "a smoothed classifier": (GAUSSIAN, smoothing(SIGMA)),
    "a stack of one": (["noise=[gaussian]", f"noise.mechanisms.gaussian.sigma={SIGMA}"], []),
    "a fraction": (["noise=gaussian", "noise.sigma=1/8"], smoothing(0.125)),
    "a reference": (["noise=gaussian", "noise.sigma=${eps}", "eps=0.25"], smoothing(SIGMA)),
}


@pytest.mark.parametrize("case", FITS)
def test_certifying_with_the_noise_of_training_does_not_warn(
    case: str, train: Train, before_work: Callable[..., str]
) -> None:
    noise, wanted = FITS[case]
    assert before_work(*of(train(*noise)), *wanted) == ""


@pytest.mark.parametrize(
    ("noise", "warned"), [(GAUSSIAN, False), (smoothing(SIGMA), True)], ids=["seen", "not seen"]
)
def test_a_run_that_trains_knows_its_noise_beforehand(
    noise: list[str], warned: bool, before_work: Callable[..., str]
) -> None:
    said = before_work(*TRAINING, *CERTIFY, *noise, "stages=[train,evaluate]")
    assert ("trained with no noise" in said) is warned
    assert ("warning" in said) is warned


def test_without_an_evaluation_the_noise_is_not_checked(
    before_work: Callable[..., str],
) -> None:
    assert before_work(*TRAINING, *CERTIFY, "noise=none") == ""


def test_without_noise_in_training_it_still_runs(train: Train, tmp_path: Path) -> None:
    said = run(tmp_path, *of(train("noise=none")), UNAUDITED, *smoothing(0.5))
    assert said.count("warning") == 1
    assert len(pd.read_csv(tmp_path / "certified.csv")) == 10


@pytest.mark.parametrize("program", [False, True])
def test_the_noise_of_a_foreign_model_is_unknown(program: bool, tmp_path: Path) -> None:
    network = Linear().build(5, SHAPE).eval()
    file = tmp_path / "theirs"
    if program:
        written(scripted, network, file)
    else:
        torch.save(network.state_dict(), file)
    evaluate = [*of(file), *smoothing(SIGMA), UNAUDITED, *(["trust=[code]"] if program else [])]
    said = run(tmp_path / "run", *TINY, "model=linear", *evaluate)
    assert "the model was trained with unknown noise and is certified with sigma 0.25: " in said
    assert len(pd.read_csv(tmp_path / "run" / "certified.csv")) == 10


# --- what is refused ----------------------------------------------------------------------------

KEYS = "evaluation.certification"
NO_THEOREM = r"certification needs one noise at the input, .* noise=smoothing noise\.sigma=\.\.\."
REFUSED = {
    "noise=none": NO_THEOREM,
    "noise=gaussian noise.at=first": NO_THEOREM,
    "noise=exponential": NO_THEOREM,
    "noise=[gaussian,pni_w]": NO_THEOREM,
    "noise=gaussian noise.sigma=0": r"noise\.sigma=0 is not allowed: it must be above 0",
    "noise=smoothing noise.sigma=-1": r"noise\.sigma=-1 is not allowed: .* 0 or more",
    "noise=smoothing noise.at=first": r"noise\.at=first is not allowed: it must be input",
    f"noise=gaussian {KEYS}.n=99 {KEYS}.n0=100": (
        r"evaluation\.certification\.n=99 is not allowed: .* 100 or more"
    ),
    f"noise=gaussian {KEYS}.alpha=0": (
        r"evaluation\.certification\.alpha=0\.0 is not allowed: .* between 0 and 1"
    ),
    f"noise=gaussian {KEYS}.n0=5 {KEYS}.n=9": (
        r"evaluation\.certification\.n=9 is not allowed: .* 10 or more with alpha=0\.001: fewer "
        r"draws prove no radius"
    ),
    f"noise=gaussian {KEYS}.alpha=1": r"evaluation\.certification\.alpha=1\.0 is not allowed",
    f"noise=gaussian {KEYS}.radii=[0,-1]": r"evaluation\.certification\.radii=-1\.0 is not allowed",
    f"noise=gaussian {KEYS}.radii=[]": r"evaluation\.certification\.radii=\[\] is not allowed",
    "noise=smoothing evaluation.votes=10": (
        r"evaluation\.votes=10 is not allowed: it must be .* 11 or more"
    ),
    "noise=smoothing noise.alpha=1e-6 evaluation.votes=20": r"evaluation\.votes=20 .* 21 or more",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_gets_one_line_before_any_work(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[None] = []
    monkeypatch.setattr(Synthetic, "load", lambda self: loads.append(None))
    said = io.StringIO()
    with pytest.raises(task.EXPECTED_ERRORS) as refusal:
        run(tmp_path, *TRAINING, *CERTIFY, "stages=[train,evaluate]", *words.split(), terminal=said)
    message = explain(refusal.value)
    assert message.count("\n") == 0
    assert re.match(REFUSED[words], message), message
    assert not loads
    assert not said.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_few_votes_are_refused_without_certification_too(train: Train, tmp_path: Path) -> None:
    words = ["stages=[evaluate]", f"checkpoint='{train('noise=none')}'", "evaluation=quick"]
    with pytest.raises(InputError, match=r"^evaluation\.votes=10 is not allowed"):
        run(tmp_path, *words, "noise=smoothing", "evaluation.votes=10", "device=cpu")
    # Another level needs fewer votes: five agree by chance with probability 2 / 2^5.
    run(
        tmp_path, *words, "noise=smoothing", "noise.alpha=0.07", "evaluation.votes=5", UNAUDITED,
        "evaluation.eot=1", "evaluation.samples=4", "device=cpu",
    )  # fmt: skip


def test_a_refusal_ends_the_process_with_its_message(
    command_line: CommandLine, tmp_path: Path
) -> None:
    done = command_line.run(*TINY, "evaluation=certify", "noise=none", cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("robusttrain: certification needs one noise at the input")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert list(tmp_path.rglob("*")) == []
