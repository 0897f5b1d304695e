"""The summary of a sweep, for run directories written by hand, against SciPy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from robusttrain.report.compare import Measure
from robusttrain.sweeps import records
from robusttrain.sweeps.records import Job
from robusttrain.sweeps.settings import over_seeds, settings
from toys.sweeps import N, Sweep, flags

COSTS = [
    f"{stage}_{figure}"
    for stage in ("training", "evaluation")
    for figure in ("images_per_second", "passes", "peak_memory_mib")
]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


# --- the table of all jobs -----------------------------------------------------------------------


def test_only_keys_that_vary_are_columns(sweep: Sweep) -> None:
    sweep.add("epochs=3", "defense=rt", "eps=8/255", clean=flags(10), worst=flags(40))
    sweep.fail("epochs=3", "defense=rt", "eps=-1", error="eps=-1, of all things")
    records.write_table(sweep.folder)
    table = pd.read_csv(sweep.folder / "sweep.csv", dtype=str, keep_default_na=False)
    assert list(table) == [
        "job", "eps", "attack", "attack_norm", "attack_eps", "n", "accuracy", "ci_low", "ci_high",
        "audit", "validation", *COSTS, "status", "seconds", "error",
    ]  # fmt: skip
    assert table["job"].tolist() == ["0", "0", "1"]
    assert table["eps"].tolist() == ["8/255", "8/255", "-1"]
    assert table["attack"].tolist() == ["clean", "worst_case", ""]
    assert table["accuracy"].tolist() == ["0.95", "0.8", ""]
    assert table["status"].tolist() == ["finished", "finished", "failed"]
    assert table["error"].tolist() == ["", "", "eps=-1, of all things"]


def test_a_job_has_the_cost_in_its_manifest(sweep: Sweep) -> None:
    """Whatever stages it had; a manifest of an earlier version has none."""
    training = {"seconds": 2.0, "images_per_second": 640, "passes": 12800, "peak_memory_mib": 310.5}
    evaluation = training | {"images_per_second": None, "passes": 7}
    costs = {
        "seed=0": {"cost": {"training": training, "evaluation": evaluation}},
        "seed=1": {"cost": {"evaluation": evaluation}},
        "seed=2": {"files": []},
    }
    for word, manifest in costs.items():
        sweep.add(word, clean=flags(1), manifest=manifest)
    sweep.fail("seed=3", error="no")
    records.write_table(sweep.folder)
    table = pd.read_csv(sweep.folder / "sweep.csv").drop_duplicates("job").set_index("job")
    nan = float("nan")
    known = [nan, 7, 310.5]
    expected = [[640, 12800, 310.5, *known], [nan, nan, nan, *known], [nan] * 6, [nan] * 6]
    np.testing.assert_array_equal(table[COSTS].to_numpy(), np.array(expected))


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"cost": 5}', '{"cost": {"training": 5}}', '{"trained": [1]}']
)
def test_a_damaged_manifest_costs_its_own_figures_only(sweep: Sweep, content: str) -> None:
    """Of a job that has only trained; a report beside a damaged manifest is refused."""
    for name in "ab":
        sweep.add(f"checkpoint={name}", clean=flags(1), manifest={})
    (sweep.folder / "0" / "manifest.json").write_text(content)
    (sweep.folder / "0" / "report.csv").unlink()
    records.write_table(sweep.folder)
    table = pd.read_csv(sweep.folder / "sweep.csv")
    assert table["checkpoint"].tolist() == ["a", "b", "b"]
    assert table[COSTS].isna().all(axis=None)


def test_a_key_named_like_a_column_gets_another_name(sweep: Sweep) -> None:
    sweep.add("attack=pgd", clean=flags(1))
    sweep.add("attack=fgsm", clean=flags(1))
    table = records.table(sweep.folder, records.read_jobs(sweep.folder))
    assert table["config.attack"].tolist() == ["pgd", "pgd", "fgsm", "fgsm"]
    assert table["attack"].tolist() == ["clean", "worst_case"] * 2


def test_a_key_that_some_jobs_lack_varies(sweep: Sweep) -> None:
    sweep.add("seed=1", "+extra=2", clean=flags(1))
    sweep.add("seed=1", clean=flags(1))
    assert records.varying(records.read_jobs(sweep.folder)) == ["extra"]


def test_jobs_are_sorted_by_number_and_may_be_in_folders_of_any_depth(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        Job(number, f"a/{number}", (f"seed={number}",)).save(tmp_path)
    assert [job.number for job in records.read_jobs(tmp_path)] == [2, 9, 10]
    assert records.read_job(tmp_path, "a/9") == Job(9, "a/9", ("seed=9",))
    assert records.read_job(tmp_path, "9") is None


def test_a_job_that_ends_while_the_table_is_written_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has written its table earlier, and does not write it again."""
    Job(0, "0", ("seed=0",), "finished").save(tmp_path)
    late = [Job(1, "1", ("seed=1",), "finished")]
    write = records.write_csv

    def slow(path: Path, rows: pd.DataFrame) -> None:
        if late:
            late.pop().save(tmp_path)
        write(path, rows)

    monkeypatch.setattr(records, "write_csv", slow)
    records.write_table(tmp_path)
    assert pd.read_csv(tmp_path / "sweep.csv")["job"].tolist() == [0, 1]


def test_the_view_has_a_line_for_each_job(sweep: Sweep) -> None:
    sweep.add("epochs=3", "eps=0.1", clean=flags(10), worst=flags(40))
    sweep.fail("epochs=3", "eps=-1", error="no")
    waiting = Job(2, "", ("epochs=3", "eps=0.2"), records.WAITING)
    view = records.overview(sweep.folder, [*records.read_jobs(sweep.folder), waiting])
    assert list(view) == ["job", "eps", "status", "clean", "worst case", "seconds"]
    assert view.to_numpy().tolist() == [
        ["0", "0.1", "finished", "95.00%", "80.00%", "2"],
        ["1", "-1", "failed", "", "", "0"],
        ["2", "0.2", "waiting", "", "", ""],
    ]


# --- means over seeds ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 500), min_size=2, max_size=6))
def test_the_interval_over_seeds_is_students(right: list[int]) -> None:
    accuracies = [count / 500 for count in right]
    figure = over_seeds(accuracies, 500)
    assert figure.mean == pytest.approx(np.mean(accuracies))
    assert figure.deviation == pytest.approx(np.std(accuracies, ddof=1))
    assert figure.over_seeds is not None
    if len(set(accuracies)) > 1:
        expected = stats.ttest_1samp(accuracies, 0).confidence_interval(0.95)
        low, high = max(0, expected.low), min(1, expected.high)
        assert figure.over_seeds == pytest.approx((low, high))


@given(st.integers(0, 300))
def test_a_single_seed_has_no_deviation_and_wilsons_interval(right: int) -> None:
    figure = over_seeds([right / 300], 300)
    assert figure.deviation is figure.over_seeds is None
    expected = stats.binomtest(right, 300).proportion_ci(0.95, method="wilson")
    assert figure.over_images == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_more_seeds_do_not_count_as_more_images() -> None:
    one, many = over_seeds([0.5], 100), over_seeds([0.5] * 20, 100)
    assert many.over_images == pytest.approx(one.over_images)


def test_settings_differ_in_more_than_the_seed(sweep: Sweep) -> None:
    for defense in ("rt", "lsa"):
        for seed in (0, 1, 2):
            wrong = 10 * seed + 5 * (defense == "lsa")
            sweep.add(f"defense={defense}", f"seed={seed}", clean=flags(wrong))
    sweep.fail("defense=fgsm", "seed=0", error="no")
    # A search may try a setting again.
    sweep.add("defense=rt", "seed=2", clean=flags(20))
    rt, lsa = settings(sweep.folder, records.read_jobs(sweep.folder))
    assert (rt.keys, lsa.keys) == ({"defense": "rt"}, {"defense": "lsa"})
    assert list(rt.runs) == list(lsa.runs) == ["0", "1", "2"]
    assert rt.figure(Measure("clean")).mean == pytest.approx(0.95)
    assert rt.figure(Measure("clean")).deviation == pytest.approx(0.05)
    assert lsa.figure(Measure("clean")).mean == pytest.approx(0.925)
    # t with two degrees of freedom, from a printed table: 4.303.
    half = 4.303 * 5 / 3**0.5
    (line,) = (line for line in sweep.text.splitlines() if line.startswith("| rt |"))
    assert line.startswith("| rt | 3 | 95.00 ± 5.00 |")
    assert f"| {95 - half:.2f} to 100.00 |" in line


# --- tests --------------------------------------------------------------------------------------


def test_the_p_of_a_pair_is_the_largest_of_its_seeds(sweep: Sweep) -> None:
    for defense, wrong in (("rt", (0, 0)), ("lsa", (30, 12))):
        for seed in (0, 1):
            sweep.add(f"defense={defense}", f"seed={seed}", clean=flags(wrong[seed]))
    table = sweep.tests
    assert table["measure"].tolist() == ["clean", "worst_case"]
    row = table.iloc[0]
    assert (row["b"], row["c"]) == ("30 12", "0 0")
    assert row["p"] == pytest.approx(stats.binomtest(0, 12).pvalue)
    # Both lines of the table have the same p: Holm doubles the smaller one, and the other follows.
    assert row["p_holm"] == pytest.approx(2 * row["p"])
    assert row["difference"] == pytest.approx(0.105)
    expected = stats.ttest_1samp([30 / N, 12 / N], 0).confidence_interval(0.95)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((expected.low, expected.high))
    assert [row["first"], row["second"]] == ["defense=rt", "defense=lsa"]
    assert row["winner"] == "defense=rt"


def test_seeds_that_disagree_name_no_winner(sweep: Sweep) -> None:
    """Both are significant, in opposite directions."""
    for defense, wrong in (("rt", (0, 40)), ("lsa", (50, 0))):
        for seed in (0, 1):
            sweep.add(f"defense={defense}", f"seed={seed}", clean=flags(wrong[seed]))
    assert sweep.tests["p"].tolist() == [1, 1]
    assert set(sweep.tests["winner"]) == {""}


def test_seeds_of_the_same_images_are_not_counted_as_more_images(sweep: Sweep) -> None:
    """Four discordant images of one seed prove nothing, however often they are seen."""
    for seed in range(8):
        sweep.add("defense=rt", f"seed={seed}", clean=flags(0))
        sweep.add("defense=lsa", f"seed={seed}", clean=flags(4))
    row = sweep.tests.iloc[0]
    assert row["seeds"] == 8
    assert row["p"] == pytest.approx(stats.binomtest(0, 4).pvalue) == pytest.approx(0.125)
    assert row["winner"] == ""


def test_the_second_wins_where_it_is_better(sweep: Sweep) -> None:
    sweep.add("defense=rt", clean=flags(1), worst=flags(60))
    sweep.add("defense=lsa", clean=flags(1, 100), worst=flags(20, 100))
    clean, worst = sweep.tests.to_dict("records")
    assert (clean["p"], clean["winner"]) == (1, "")
    assert worst["p"] == pytest.approx(stats.binomtest(20, 80).pvalue)
    assert (worst["winner"], worst["b"], worst["c"]) == ("defense=lsa", "20", "60")


def test_pairs_differ_in_one_key(sweep: Sweep) -> None:
    for defense in ("rt", "lsa"):
        for width in (8, 16):
            wrong = flags(width + 5 * (defense == "lsa"))
            sweep.add(f"defense={defense}", f"model.width={width}", clean=wrong)
    pairs = sweep.tests[sweep.tests["measure"] == "clean"]
    assert len(pairs) == 4
    for row in pairs.to_dict("records"):
        words = zip(row["first"].split(), row["second"].split(), strict=True)
        assert sum(a != b for a, b in words) == 1


def test_worst_cases_of_different_radii_are_not_compared(sweep: Sweep) -> None:
    sweep.add("eps=0.1", clean=flags(0))
    sweep.add("eps=0.2", clean=flags(50), eps=0.2)
    assert sweep.tests["measure"].tolist() == ["clean"]
    assert "linf, eps 0.1 or linf, eps 0.2" in sweep.text


def test_other_data_is_not_compared(sweep: Sweep) -> None:
    sweep.add("dataset=digits", clean=flags(0))
    sweep.add("dataset=mnist", clean=flags(50), dataset="mnist")
    assert sweep.tests.empty
    assert "No two settings" in sweep.text


def test_a_summary_lists_failures_and_missing_evaluations(sweep: Sweep) -> None:
    sweep.fail("defense=a|b", error="defense=a|b is not allowed")
    assert "1 job: 1 failed" in sweep.text
    assert "No job has finished an evaluation." in sweep.text
    assert "| 0 | defense=a\\|b is not allowed |" in sweep.text
