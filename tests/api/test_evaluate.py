"""`rt.evaluate`: the figures of the command line, for whatever has images and logits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import robusttrain as rt
from robusttrain.attacks.pgd import PGD
from robusttrain.data import as_input
from robusttrain.data.digits import Digits
from robusttrain.report.compare import compare, read_runs, shared_measures
from toys.command_line import CommandLine

EPS = 0.1
AUDITED = ["evaluation.audit=true", "evaluation.probe_samples=5"]
QUICK = ["evaluation.audit=false", "evaluation.samples=20"]
X, Y = (part[:40] for part in Digits().load()[1])


def linear(seed: int = 0, classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()


MODEL = linear()


def evaluated(*words: str, model: Any = MODEL, x: Any = X, y: Any = Y, **more: Any) -> rt.Result:
    given = {"eps": EPS, "evaluation": "quick", "progress": False} | more
    return rt.evaluate(model, x, y, overrides=[*QUICK, *words], **given)


def same(one: rt.Result, other: rt.Result, *but: str) -> None:
    """Whether all figures are the same to the last bit, except those of the clock."""
    table = [r.table.drop(columns=["seconds", *but]) for r in (one, other)]
    pd.testing.assert_frame_equal(*table, check_exact=True)
    # A program counts the images that it gives, and a run those of its data set.
    samples = [r.samples.drop(columns=["index", "index_in"]) for r in (one, other)]
    pd.testing.assert_frame_equal(*samples, check_exact=True)


# --- the command line ---------------------------------------------------------------------------


RUNS = {
    "audited": ["model=mlp"],
    "l2": ["model=small_cnn", "model.width=2", "norm=l2", "eps=0.5"],
    "random": ["model=mlp", "noise=gaussian", "noise.predict=true", "seed=3"],
}


@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_the_command_line(
    name: str, command_line: CommandLine, tmp_path: Path
) -> None:
    training = ["stages=[train]", "defense=fgsm", "epochs=1", f"eps={EPS}", *RUNS[name]]
    trained = command_line.run(*training, cwd=tmp_path)
    assert trained.code == 0, trained.said
    words = [*QUICK, "evaluation.eot=2", "evaluation.votes=5", *AUDITED * (name == "audited")]
    there = [f"checkpoint={trained.run_dir}", "stages=[evaluate]", "evaluation=quick", *words]
    answer = command_line.run(*there, cwd=tmp_path)
    assert answer.code == 0, answer.said
    run = rt.load_run(answer.run_dir)
    _, test = Digits().load()
    ours = rt.evaluate(
        rt.load_model(trained.run_dir), *test, eps=run.config.eps, norm=run.config.norm,
        evaluation="quick", overrides=words, seed=run.config.seed, progress=False,
    )  # fmt: skip
    # Files have six digits.
    read = rt.load_run(ours.save(tmp_path / "ours"))
    same(run, read, "dataset", "model", "defense", "train_attack", "noise")
    pd.testing.assert_frame_equal(run.audit, read.audit, check_exact=True)
    pd.testing.assert_frame_equal(run.curve, read.curve, check_exact=True)


# --- what is given ------------------------------------------------------------------------------


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return MODEL(x / 2)


FORMS: dict[str, tuple[Any, Any, Any]] = {
    "floats": (MODEL, as_input(X), Y),
    "a function": (lambda x: MODEL(x), X, Y),
    "float64": (MODEL, X.double() / 255, Y),
    "other integers": (MODEL, X, Y.to(torch.int32)),
    "a data set": (MODEL, TensorDataset(as_input(X), Y), None),
    "a loader": (MODEL, DataLoader(TensorDataset(as_input(X), Y), batch_size=7), None),
    "a model that writes to its images": (Doubling(), X, Y),
    "a model in train mode": (linear().train(), X, Y),
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_the_same_model_and_images_are_as_good(name: str) -> None:
    model, x, y = FORMS[name]
    same(evaluated(), evaluated(model=model, x=x, y=y), "model", "dataset")


def test_images_get_the_format_of_the_weights() -> None:
    """Rounding may differ, and no image of these is so close to a boundary."""
    result = evaluated(model=linear().double())
    assert result.table["accuracy"].tolist() == evaluated().table["accuracy"].tolist()


def test_images_are_not_changed() -> None:
    x = as_input(X)
    before = x.clone()
    evaluated(model=Doubling(), x=x)
    assert torch.equal(x, before)


def test_own_attacks_have_rows_after_those_of_the_suite() -> None:
    result = evaluated("~evaluation.attacks.pgd", attacks={"mine": PGD(eps=EPS, steps=3)})
    names = ["clean", "uniform", "fgsm", "apgd_ce", "mine", "worst_case"]
    assert result.table["attack"].tolist() == names
    assert set(result.samples.filter(regex="^mine_")) == {"mine_broken", "mine_margin", "mine_size"}


def test_the_threat_is_that_of_the_arguments() -> None:
    rows = evaluated(norm="l2", eps=0.7).table
    attacked = rows[rows["attack"] != "clean"]
    assert set(attacked["norm"]) == {"l2"}
    assert set(attacked["eps"]) == {0.7}


# --- refusals -----------------------------------------------------------------------------------


def flat(x: Tensor) -> Tensor:
    return MODEL(x).sum(1)


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no such layer")


@torch.no_grad()
def blind(x: Tensor) -> Tensor:
    return MODEL(x)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "radius": ({"eps": 2}, ["eps=2", "at most 1 in linf"]),
    "norm": ({"norm": "linfinity"}, ["norm=linfinity", "linf, l2, l1"]),
    "suite": ({"evaluation": "fst"}, ["evaluation=fst", "evaluation=fast"]),
    "key": ({"overrides": ["evaluation.smples=3"]}, ["evaluation.smples=3", "evaluation.samples"]),
    "key without effect": ({"overrides": ["optimizer.lr=1"]}, ["optimizer.lr=1", "no effect"]),
    "exit code": ({"overrides": ["evaluation.strict=true"]}, ["evaluation.strict=True"]),
    "name of an attack": ({"attacks": {"clean": PGD()}}, ["attacks=clean"]),
    "bright images": ({"x": as_input(X) * 2}, ["x has values from 0 to 2", "in [0, 1]"]),
    "NaN": ({"x": as_input(X) * torch.nan}, ["x has values from nan"]),
    "no images": ({"x": X[:0], "y": Y[:0]}, ["x=a tensor of shape (0, 1, 8, 8)"]),
    "one image": ({"x": X[0], "y": Y[0]}, ["x=a tensor of shape (1, 8, 8)", "(N, C, H, W)"]),
    "integers": ({"x": X.long()}, ["x=a tensor of int64", "uint8"]),
    "fewer labels": ({"y": Y[1:]}, ["y=a tensor of shape (39,)", "(40,)"]),
    "floating labels": ({"y": Y.float()}, ["y=a tensor of float32", "integers"]),
    "no labels": ({"y": None}, ["y=None"]),
    "labels twice": ({"x": TensorDataset(X, Y)}, ["y=a tensor", "data set has the labels"]),
    "images without labels": ({"x": TensorDataset(X), "y": None}, ["x=TensorDataset", "pairs"]),
    "a class too many": ({"model": linear(classes=9)}, ["y=labels from 0 to 9", "0 to 8"]),
    "no logits": ({"model": flat}, ["model returns a tensor of shape (2,)", "(N, K)"]),
    "a model that fails": ({"model": failing}, ["model fails for images", "no such layer"]),
    "no gradient": ({"model": blind}, ["model=blind", "gradient"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused_in_one_message(name: str) -> None:
    arguments, words = REFUSED[name]
    given: dict[str, Any] = {"model": MODEL, "x": X, "y": Y, "eps": EPS} | arguments
    with pytest.raises(rt.InputError) as refused:
        rt.evaluate(given.pop("model"), given.pop("x"), given.pop("y"), **given)
    for word in words:
        assert word in str(refused.value)


# --- what comes back ----------------------------------------------------------------------------


def test_a_saved_result_is_read_back(tmp_path: Path) -> None:
    result = evaluated(*AUDITED)
    read = rt.load_run(result.save(tmp_path))
    for name in ("table", "samples", "audit", "curve"):
        before, after = getattr(result, name), getattr(read, name)
        assert list(before) == list(after)
        for column in before:
            if before[column].dtype.kind == "f":
                np.testing.assert_allclose(after[column], before[column], rtol=1e-5)
            else:
                assert after[column].isna().equals(before[column].isna())
                assert after[column].dropna().tolist() == before[column].dropna().tolist()
    assert read.config.evaluation.samples == 20


def test_a_result_replaces_all_of_an_earlier_one(tmp_path: Path) -> None:
    evaluated(*AUDITED).save(tmp_path)
    evaluated().save(tmp_path)
    assert rt.load_run(tmp_path).audit.empty


def test_saved_results_can_be_compared(tmp_path: Path) -> None:
    for seed in range(2):
        evaluated(model=linear(seed)).save(tmp_path / str(seed))
    runs = read_runs([tmp_path / "0", tmp_path / "1"])
    assert compare(runs, shared_measures(runs))["n"].tolist() == [20, 20]


def test_text_and_page_show_the_same_figures() -> None:
    result = evaluated()
    worst = f"{result.table['accuracy'].iloc[-1]:.2%}"
    for shown in (str(result), repr(result), result._repr_html_()):
        assert "worst_case" in shown
        assert worst in shown


def test_markup_in_names_is_shown_as_text() -> None:
    class Named(nn.Sequential):
        pass

    Named.__name__ = "<script>[bold]"
    result = evaluated(model=Named(nn.Flatten(), nn.Linear(64, 10)))
    assert "<script>[bold] on images" in str(result)
    assert "<script>" not in result._repr_html_()


def test_progress_goes_to_the_standard_error_or_nowhere(
    capfd: pytest.CaptureFixture[str],
) -> None:
    evaluated()
    assert capfd.readouterr() == ("", "")
    evaluated(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "the model is assumed to take images in [0, 1]" in err


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(108, 10),
    )  # fmt: skip
    model[0].eval()
    model[5].bias.requires_grad_(False)
    model(as_input(X)).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    evaluated(model=model)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    for before, weight in zip(gradients, model.parameters(), strict=True):
        assert (before is None) == (weight.grad is None)
        assert before is None or torch.equal(before, weight.grad)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_result_has_a_page_and_figures(tmp_path: Path) -> None:
    result = evaluated(*AUDITED)
    page = result.html(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert "Sequential on images" in page.read_text()
    radii = sorted(result.curve.loc[result.curve["curve"] == "eps", "eps"])
    lines = [list(line.get_xdata()) for line in result.figure("eps").axes[0].get_lines()]
    assert pytest.approx(radii, rel=1e-5) in lines
    with pytest.raises(rt.InputError, match="figure=losses is not allowed"):
        result.figure("losses")


def test_the_package_is_imported_without_what_takes_seconds() -> None:
    slow = "{'torch', 'torchvision', 'pandas', 'hydra', 'omegaconf', 'scipy', 'matplotlib'}"
    code = f"import sys, robusttrain; assert not {slow} & {{*sys.modules}}; dir(robusttrain)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    assert all(getattr(rt, name) is not None for name in rt.__all__)
    for package in (rt.attacks, rt.defenses):
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match="nothing"):
            package.nothing  # noqa: B018
