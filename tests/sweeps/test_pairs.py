"""Which settings of a sweep are compared: the baseline and the accuracies that a user chooses."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats import multitest

from robusttrain.errors import InputError
from robusttrain.report.compare import Run, read_run
from robusttrain.sweeps import pairs as sweep_pairs
from robusttrain.sweeps.pairs import Comparison, pairwise
from robusttrain.sweeps.settings import Setting
from toys.command_line import CommandLine
from toys.sweeps import N, Sweep, flags

GRID = {"defense": ["rt", "lsa", "fgsm"], "model.width": ["8", "16"]}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


@pytest.fixture
def grid(sweep: Sweep) -> Sweep:
    """Three defenses at two widths, each with another number of errors."""
    for number, defense in enumerate(GRID["defense"]):
        for width in GRID["model.width"]:
            wrong = 10 * number + int(width)
            sweep.add(f"defense={defense}", f"model.width={width}", clean=flags(wrong))
    return sweep


def pairs(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(table["first"], table["second"], strict=True)))


def test_each_setting_is_compared_with_the_baseline_that_is_otherwise_the_same(
    grid: Sweep,
) -> None:
    table = grid.compared(Comparison.of("defense=rt", None))
    assert pairs(table) == [
        (f"defense={defense} model.width={width}", f"defense=rt model.width={width}")
        for width in ("8", "16")
        for defense in ("lsa", "fgsm")
    ]


def test_a_baseline_of_two_keys_is_one_setting(grid: Sweep) -> None:
    table = grid.compared(Comparison.of("defense=rt model.width=16", None))
    assert {second for _, second in pairs(table)} == {"defense=rt model.width=16"}
    assert len(pairs(table)) == 5


def test_unwanted_comparisons_cost_no_significance(grid: Sweep) -> None:
    """Holm's correction is for the lines of the table: the smallest p times their number."""
    everything = grid.tests
    chosen = grid.compared(Comparison.of("defense=rt", "[worst_case]"))
    assert (len(everything), len(chosen)) == (18, 4)
    assert set(chosen["measure"]) == {"worst_case"}
    for table in (everything, chosen):
        assert table["p_holm"].min() == pytest.approx(len(table) * table["p"].min())


def test_the_difference_is_that_of_the_setting_minus_the_baseline(sweep: Sweep) -> None:
    sweep.add("defense=rt", clean=flags(0))
    sweep.add("defense=lsa", clean=flags(20))
    (row,) = sweep.compared(Comparison.of("defense=rt", ["clean"])).to_dict("records")
    assert (row["accuracy_first"], row["accuracy_second"]) == (1 - 20 / N, 1)
    assert row["difference"] == pytest.approx(-20 / N)
    assert row["p"] == row["p_holm"] == pytest.approx(stats.binomtest(0, 20).pvalue)
    assert (row["b"], row["c"], row["winner"]) == ("0", "20", "defense=rt")


def test_what_nothing_can_be_tested_on_costs_no_significance(sweep: Sweep) -> None:
    """A network has the same clean accuracy at every radius that it is evaluated at."""
    for worst, eps in ((20, 0.1), (60, 0.2)):
        sweep.add("defense=rt", f"eps={eps}", clean=flags(10), worst=flags(worst), eps=eps)
        sweep.add("defense=lsa", f"eps={eps}", clean=flags(10), worst=flags(90), eps=eps)
    table = sweep.tests
    assert table["measure"].tolist() == ["worst_case"] * 2
    for row, wrong in zip(table.to_dict("records"), (20, 60), strict=True):
        assert row["p"] == pytest.approx(stats.binomtest(0, 90 - wrong).pvalue)


def test_the_summary_says_what_was_compared(grid: Sweep) -> None:
    assert "two settings that differ in one key." in grid.text
    chosen = grid.summary(Comparison.of("defense=rt", ["worst_case"]))
    assert "with the baseline, which has defense=rt and is otherwise the same." in chosen
    assert chosen.count("| worst case | 1 |") == 4
    assert "| clean | 1 |" not in chosen
    nothing = grid.summary(Comparison.of("defense=rt", ["union"]))
    assert "nothing but the baseline defense=rt were evaluated on the same images" in nothing
    assert ", by union." in nothing
    assert "No setting has defense=free." in grid.summary(Comparison.of("defense=free", None))


def test_the_file_of_pairs_has_the_lines_of_the_summary(grid: Sweep) -> None:
    text = grid.text
    table = pd.read_csv(grid.folder / "sweep_pairs.csv", dtype=str, keep_default_na=False)
    tests = [line.split(" | ") for line in text.splitlines() if line.startswith("| defense=")]
    assert [line[0].lstrip("| ") for line in tests] == table["first"].tolist()
    assert [line[1] for line in tests] == table["second"].tolist()
    assert [line[9].rstrip(" |") for line in tests] == table["winner"].tolist()
    differences = [float(line[4]) for line in tests]
    assert differences == pytest.approx(100 * table["difference"].astype(float), abs=0.005)


def test_a_sweep_without_pairs_leaves_a_file_with_columns(sweep: Sweep) -> None:
    sweep.add("defense=rt", clean=flags(0))
    assert "No two settings that differ in one key" in sweep.text
    table = pd.read_csv(sweep.folder / "sweep_pairs.csv")
    assert table.empty
    assert {"first", "second", "p_holm"} <= {*table}


@pytest.mark.parametrize("given", ["[clean,union]", "clean, union", ["clean", "union"]])
def test_accuracies_are_a_list_or_a_text(given: str | Sequence[str]) -> None:
    assert Comparison.of(None, given) == Comparison({}, ("clean", "union"))


@pytest.mark.parametrize(
    ("baseline", "allowed"),
    [
        ("defens=rt", "the keys that vary, except seed: defense, model.width"),
        ("seed=0", "the keys that vary, except seed: defense, model.width"),
        ("defense=madry", "one of the values of defense: rt, lsa, fgsm"),
    ],
)
def test_a_baseline_that_no_job_has_is_refused(baseline: str, allowed: str) -> None:
    with pytest.raises(InputError) as refusal:
        Comparison.of(baseline, None).check({**GRID, "seed": ["0", "1"]})
    assert str(refusal.value).startswith(f"sweep.baseline={baseline} is not allowed")
    assert allowed in str(refusal.value)
    Comparison.of("defense=rt model.width=8", None).check(GRID)


def test_values_that_a_search_will_choose_are_not_checked() -> None:
    Comparison.of("optimizer.lr=0.1", None).check({"optimizer.lr": []})


# --- sweeps of many settings ---------------------------------------------------------------------


@pytest.fixture
def many(sweep: Sweep) -> list[Setting]:
    """A hundred settings of one key, each with other errors."""
    job = sweep.add("defense=rt", clean=flags(1))
    run = read_run(sweep.folder / job.folder)

    def other(number: int) -> Run:
        moved = {key: pd.Series(np.roll(right, number)) for key, right in run.right.items()}
        return replace(run, right=moved)

    return [Setting({"epochs": str(number)}, {"0": other(number)}) for number in range(100)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a pair is tested, and how often the p of a table are corrected."""
    counts = Counter[str]()
    for module, name in ((sweep_pairs, "tested"), (multitest, "multipletests")):
        called = getattr(module, name)

        def counted(*given: Any, name: str = name, called: Any = called, **more: Any) -> Any:
            counts[name] += 1
            return called(*given, **more)

        monkeypatch.setattr(module, name, counted)
    return counts


def test_all_pairs_are_tested_only_in_small_sweeps(
    many: list[Setting], calls: Counter[str]
) -> None:
    assert len(pairwise(many[:20], Comparison())) == 2 * 190
    assert calls == {"tested": 190, "multipletests": 1}
    calls.clear()
    assert pairwise(many[:21], Comparison()).empty
    assert pairwise(many, Comparison()).empty
    assert not calls


def test_a_baseline_is_tested_with_every_other_setting(
    many: list[Setting], calls: Counter[str]
) -> None:
    assert len(pairwise(many, Comparison.of("epochs=7", ["clean"]))) == 99
    assert calls == {"tested": 99, "multipletests": 1}


def test_a_summary_without_tests_says_how_to_ask_for_them(sweep: Sweep) -> None:
    for number in range(21):
        sweep.add(f"epochs={number}", clean=flags(number))
    assert "This sweep has 21 settings; up to 20 settings, all pairs" in sweep.text
    assert "sweep.baseline=KEY=VALUE" in sweep.text
    assert "winner" not in sweep.text
    asked = sweep.summary(Comparison.of("epochs=3", None))
    assert asked.count("| epochs=3 | clean |") == 20
    assert "This sweep has" not in asked


# --- on the command line -------------------------------------------------------------------------

SWEEP = ["dataset=synthetic", "dataset.test_size=200", "model=linear", "epochs=1,3,9", "device=cpu",
         "evaluation=quick", "evaluation.audit=false", "hydra.sweep.dir=s", "-m"]  # fmt: skip


def test_finished_jobs_are_compared_in_another_way(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """The keys are no part of a job, so that it is not repeated; its own resumption keeps them."""

    def lines() -> list[tuple[str, str]]:
        table = pd.read_csv(tmp_path / "s" / "sweep_pairs.csv")
        return sorted(zip(table["measure"], table["second"], strict=True))

    assert command_line.run(*SWEEP, cwd=tmp_path).code == 0
    assert {second for _, second in lines()} == {"epochs=3", "epochs=9"}
    chosen = ["sweep.baseline=epochs=1", "sweep.accuracies=[clean]"]
    answer = command_line.run(*SWEEP, *chosen, cwd=tmp_path)
    assert answer.code == 0, answer.said
    assert answer.out.count("has already finished") == 3
    with_baseline = [("clean", "epochs=1")] * 2
    assert lines() == with_baseline
    # As if this job had been killed, and the rest of its sweep, too.
    for name in ("1/manifest.json", "sweep_pairs.csv", "sweep.md"):
        (tmp_path / "s" / name).unlink()
    answer = command_line.run("resume=s/1", cwd=tmp_path)
    assert answer.code == 0, answer.said
    assert lines() == with_baseline
