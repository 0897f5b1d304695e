"""Comparing runs: p values, corrections and intervals against other ways to get them."""

import gc
import json
import re
import warnings
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from robusttrain.errors import IdentityWarning, InputError
from robusttrain.report.compare import (
    Measure,
    Run,
    compare,
    paired_interval,
    ranked,
    read_run,
    read_runs,
    shared,
    shared_measures,
    suites,
    titles,
)
from robusttrain.report.identity import digests
from robusttrain.threat import Norm, Threat

CLEAN = (Measure("clean"),)
WORST = Measure("worst_case", Threat(Norm.linf, 0.1))
BOTH = (*CLEAN, WORST)


def run(name: str, clean: list[int], worst: list[int] | None = None, **changes: object) -> Run:
    """A run that is right where a flag is 1."""
    count = len(clean)
    worst = clean if worst is None else worst
    settings = {"index": range(count), "label": 0, "threat": WORST.threat} | changes
    index = pd.Index(list(settings["index"]))
    measures = (*CLEAN, Measure("worst_case", settings["threat"]))
    right = {
        measure: pd.Series(flags, index, dtype=bool)
        for measure, flags in zip(measures, (clean, worst), strict=True)
    }
    rows = {measure: {"accuracy": flags.mean()} for measure, flags in right.items()}
    return Run(Path(name), rows, ("pgd",), pd.Series(settings["label"], index), right)


def discordant(b: int, c: int, n: int) -> list[Run]:
    """Two runs, the first alone right on b samples and the second alone on c of n."""
    rest = n - b - c
    first, second = [1] * b + [0] * c + [1] * rest, [0] * b + [1] * c + [1] * rest
    return [run("first", first), run("second", second)]


def a_pair(largest: int = 60) -> st.SearchStrategy[tuple[int, int, int]]:
    counts = st.integers(0, largest)
    return st.tuples(counts, counts, counts).map(lambda t: (t[0], t[1], sum(t) + 1))


# --- the test ----------------------------------------------------------------------------------


@given(a_pair())
def test_p_is_that_of_a_fair_coin_on_the_discordant_samples(case: tuple[int, int, int]) -> None:
    b, c, n = case
    row = compare(discordant(b, c, n), CLEAN).iloc[0]
    assert (row["b"], row["c"], row["n"]) == (b, c, n)
    assert row["difference"] == pytest.approx((b - c) / n)
    assert row["difference"] == pytest.approx(row["accuracy_a"] - row["accuracy_b"])
    assert row["p"] == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0)


def test_p_by_hand() -> None:
    """One coin in eight or fewer, on either side: 2 (1 + 8) / 2^8."""
    assert compare(discordant(1, 7, 21), CLEAN)["p"][0] == pytest.approx(18 / 256)


def test_p_is_corrected_for_all_tests_by_holm() -> None:
    generator = np.random.default_rng(0)
    skills = (0.95, 0.93, 0.85, 0.6)
    runs = [
        run(f"{skill}", *(generator.random((2, 80)) < [[skill], [skill - 0.1]]).tolist())
        for skill in skills
    ]
    table = compare(runs, BOTH)
    assert len(table) == 12
    smallest_first = table.sort_values("p")
    expected: list[float] = []
    for rank, p in enumerate(smallest_first["p"]):
        expected.append(min(1.0, max([(12 - rank) * p, *expected])))
    assert smallest_first["p_holm"].tolist() == pytest.approx(expected)
    assert 0 < (table["winner"] != "").sum() < 12
    assert ((table["winner"] != "") == (table["p_holm"] < 0.05)).all()


@pytest.mark.parametrize(
    ("b", "c", "measures", "winner"),
    [
        (5, 0, CLEAN, ""),  # p = 2 / 32
        (6, 0, CLEAN, "first"),  # p = 2 / 64
        (0, 6, CLEAN, "second"),
        (6, 0, BOTH, ""),  # p = 2 * 2 / 64
        (7, 0, BOTH, "first"),
        (40, 30, CLEAN, ""),
    ],
)
def test_a_winner_is_named_only_where_the_difference_is_significant(
    b: int, c: int, measures: tuple[Measure, ...], winner: str
) -> None:
    assert set(compare(discordant(b, c, 100), measures)["winner"]) == {winner}


def test_runs_that_are_equally_good_have_no_winner_in_19_of_20_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the correction 7 of these 80 have one."""
    # Each correction of statsmodels collects garbage, which takes longer than all the rest.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(80):
        flags = generator.random((4, 60)) < 0.7
        runs = [run(str(number), row) for number, row in enumerate(flags.tolist())]
        wrong += bool((compare(runs, CLEAN)["winner"] != "").any())
    assert wrong <= 4


# --- the interval ------------------------------------------------------------------------------


def test_the_interval_is_the_published_one() -> None:
    """The example of ci.prop.ps in the R package statpsych, by D. G. Bonett."""
    assert paired_interval(26, 4, 48) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)


@given(a_pair(), st.sampled_from([1, 20]))
def test_the_interval_holds_the_difference_and_has_no_side(
    case: tuple[int, int, int], times: int
) -> None:
    b, c, n = (times * count for count in case)
    low, high = paired_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert paired_interval(c, b, n) == pytest.approx((-high, -low))


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize(
    ("first", "second"), [(0.1, 0.1), (0.2, 0.05), (0.02, 0.02), (0.4, 0.1), (0.3, 0.3)]
)
def test_the_interval_covers_as_often_as_it_says(n: int, first: float, second: float) -> None:
    """By the sum over all tables that can be drawn, which is what a simulation approaches."""
    covered = 0.0
    for b in range(n + 1):
        for c in range(n - b + 1):
            ways = comb(n, b) * comb(n - b, c)
            chance = ways * first**b * second**c * (1 - first - second) ** (n - b - c)
            low, high = paired_interval(b, c, n)
            covered += chance * (low <= first - second <= high)
    assert 0.94 <= covered <= 1
    if n == 60 and min(first, second) >= 0.05:
        assert covered <= 0.965


def test_the_interval_covers_where_errors_go_together() -> None:
    """A simulation of two models that fail on the same hard samples."""
    generator = np.random.default_rng(2)
    # The mean of x^p under Beta(4, 1) is 4 / (4 + p).
    difference, covered = 4 / 5 - 4 / 6, 0
    for _ in range(2000):
        ease = generator.beta(4, 1, 200)
        first, second = (generator.random(200) < ease**power for power in (1, 2))
        b, c = int((first & ~second).sum()), int((second & ~first).sum())
        low, high = paired_interval(b, c, 200)
        covered += low <= difference <= high
    assert 0.94 <= covered / 2000 <= 0.965


# --- pairs -------------------------------------------------------------------------------------


def test_swapped_runs_swap_every_sign() -> None:
    first, second = discordant(14, 2, 50)
    there, back = (compare(pair, BOTH).iloc[0] for pair in ([first, second], [second, first]))
    assert (there["run_a"], there["run_b"]) == (back["run_b"], back["run_a"])
    assert there["difference"] == -back["difference"] == 12 / 50
    assert (there["ci_low"], there["ci_high"]) == pytest.approx((-back["ci_high"], -back["ci_low"]))
    assert (there["b"], there["c"]) == (back["c"], back["b"])
    assert there["accuracy_a"] == back["accuracy_b"] == 48 / 50
    assert there["p"] == back["p"]
    assert there["winner"] == back["winner"] == "first"


def test_every_pair_has_a_row_a_measure() -> None:
    runs = [run(name, [1, 0], [0, 0]) for name in "abc"]
    table = compare(runs, BOTH)
    found = list(table[["measure", "run_a", "run_b"]].itertuples(index=False, name=None))
    pairs = list(combinations("abc", 2))
    assert found == [(measure, *pair) for measure in ("clean", "worst_case") for pair in pairs]


def test_only_samples_of_both_runs_count() -> None:
    first = run("first", [1, 1, 0, 1], index=[7, 2, 9, 4], label=[1, 2, 3, 4])
    second = run("second", [0, 1, 1, 0], index=[4, 9, 0, 7], label=[4, 3, 5, 1])
    row = compare([first, second], CLEAN).iloc[0]
    # They share 4, 7 and 9: right are 4 and 7 in the first run, 9 in the second one.
    assert (row["n"], row["b"], row["c"]) == (3, 2, 1)
    assert (row["accuracy_a"], row["accuracy_b"]) == pytest.approx((2 / 3, 1 / 3))


def test_the_rank_is_by_the_chosen_measure() -> None:
    runs = [run("a", [1, 1, 1], [0, 0, 1]), run("b", [1, 0, 1], [1, 0, 1])]
    assert [r.folder.name for r in ranked(runs, *CLEAN)] == ["a", "b"]
    assert [r.folder.name for r in ranked(runs, WORST)] == ["b", "a"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index": [5, 6, 7]}, "a and b have no test sample in common"),
        ({"label": [0, 0, 1]}, "a and b .*same data: sample 2 is of class 0 and 1"),
        (
            {"threat": Threat(Norm.linf, 0.2)},
            r"a \(linf, eps 0.1\) and b \(linf, eps 0.2\).*--clean",
        ),
        ({"threat": Threat(Norm.l2, 0.1)}, r"a \(linf, eps 0.1\) and b \(l2, eps 0.1\).*--clean"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_name(
    changes: dict[str, object], words: str
) -> None:
    runs = [run("a", [1, 1, 0]), run("b", [1, 1, 0], **changes)]
    with pytest.raises(InputError, match=words):
        compare(runs, shared_measures(runs))


@pytest.mark.parametrize(("first", "second"), [("x", "x"), ("x", ""), ("", "")])
def test_equal_or_unknown_test_sets_are_paired_silently(first: str, second: str) -> None:
    digests = {"a": first, "b": second}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare([replace(run(name, [1, 0]), digest=d) for name, d in digests.items()], CLEAN)


def test_different_test_sets_are_paired_with_a_warning() -> None:
    """Labels and positions may agree, and the images not."""
    runs = [replace(run(name, [1, 0]), digest=name) for name in "ab"]
    with pytest.warns(IdentityWarning, match="a and b have different test sets"):
        compare(runs, CLEAN)


def test_clean_accuracies_can_be_compared_across_threat_models() -> None:
    compare([run("a", [1, 0]), run("b", [1, 0], threat=Threat(Norm.l2, 1.0))], CLEAN)


# --- files -------------------------------------------------------------------------------------

SAMPLES = """index,label,clean_prediction,clean_margin,fgsm_broken,fgsm_margin,pgd_broken
0,3,3,1.5,0,0.5,0
2,1,1,1.5,0,0.5,1
4,1,1,1.5,1,-0.5,1
6,5,2,-1.5,1,-0.5,1
8,5,-1,-1.5,0,-0.5,0
"""
# The same, where not every attack was run on every sample and the ledger says what broke it.
STANDING = """index,label,clean_prediction,clean_margin,fgsm_broken,fgsm_margin,pgd_broken,broken_by
8,5,-1,-1.5,,,,clean
6,5,2,-1.5,,,,clean
4,1,1,1.5,1,-0.5,,fgsm
2,1,1,1.5,0,0.5,1,pgd
0,3,3,1.5,,,0,
"""
REPORT = """dataset,model,defense,noise,seed,attack,norm,eps,n,accuracy,ci_low,ci_high,seconds
digits,mlp,madry,None,0,clean,linf,0,5,0.6,0.23,0.88,0.1
digits,mlp,madry,None,0,fgsm,linf,0.1,5,0.4,0.12,0.77,0.1
digits,mlp,madry,None,0,pgd,linf,0.1,5,0.2,0.03,0.62,0.1
digits,mlp,madry,None,0,worst_case,linf,0.1,5,0.2,0.03,0.62,0.2
"""


def test_the_test_set_is_that_of_the_manifest(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    content = {"data": {"test": "0a1b"}, "files": digests(first)}
    (first / "manifest.json").write_text(json.dumps(content))
    assert [read.digest for read in read_runs([first, second])] == ["0a1b", ""]


def write(folder: Path, samples: str = SAMPLES, report: str = REPORT) -> Path:
    folder.mkdir()
    (folder / "samples.csv").write_text(samples)
    (folder / "report.csv").write_text(report)
    return folder


@pytest.mark.parametrize("samples", [SAMPLES, STANDING], ids=["all attacked", "standing only"])
def test_the_worst_case_is_counted_from_the_ledger(tmp_path: Path, samples: str) -> None:
    read, _ = read_runs([write(tmp_path / "a", samples), write(tmp_path / "b")])
    label, clean, worst = (
        column.sort_index() for column in (read.label, *(read.right[m] for m in BOTH))
    )
    assert label.index.tolist() == [0, 2, 4, 6, 8]
    assert label.tolist() == [3, 1, 1, 5, 5]
    assert clean.tolist() == [True, True, True, False, False]
    assert worst.tolist() == [True, False, False, False, False]
    assert read.attacks == ("fgsm", "pgd")
    assert read.threats == (Threat(Norm.linf, 0.1),)
    assert [row["noise"] for row in read.rows.values()] == ["None", "None"]
    assert [row["accuracy"] for row in read.rows.values()] == [0.6, 0.2]
    assert read.quoted["accuracy"] == 0.2


SEVERAL = REPORT.replace("pgd,linf,0.1", "pgd,l2,1.0").replace(
    "worst_case,linf,0.1,5,0.2,0.03,0.62,0.2\n",
    """worst_case,linf,0.1,5,0.4,0.12,0.77,0.2
digits,mlp,madry,None,0,worst_case,l2,1.0,5,0.4,0.12,0.77,0.2
digits,mlp,madry,None,0,union,,,5,0.2,0.03,0.62,0.2
""",
)


def test_each_threat_model_has_a_worst_case_of_its_own(tmp_path: Path) -> None:
    """fgsm in linf breaks sample 4 of the three that are right, pgd in l2 breaks 2 and 4."""
    samples = SAMPLES.replace("4,1,1,1.5,1,-0.5,1", "4,1,1,1.5,1,-0.5,0")
    names = [str(write(tmp_path / name, samples, SEVERAL)) for name in "ab"]
    runs = read_runs([Path(name) for name in names])
    l2 = Measure("worst_case", Threat(Norm.l2, 1.0))
    measures = shared_measures(runs)
    union = Measure("union", union=frozenset({WORST.threat, l2.threat}))
    assert measures == (*CLEAN, WORST, l2, union)
    assert [runs[0].right[m].sum() for m in measures] == [3, 2, 2, 1]
    assert list(titles(measures).values()) == [
        "clean", "worst case (linf, eps 0.1)", "worst case (l2, eps 1)", "union",
    ]  # fmt: skip
    table = compare(runs, measures)
    assert table["norm"].tolist() == ["", "linf", "l2", ""]
    assert table["accuracy_a"].tolist() == [0.6, 0.4, 0.4, 0.2]


def test_unions_of_other_threat_models_are_other_figures(tmp_path: Path) -> None:
    """Whether the worst cases beside them are empty or not."""
    samples = SAMPLES.replace("4,1,1,1.5,1,-0.5,1", "4,1,1,1.5,1,-0.5,0")
    alone = re.sub(r"(worst_case,\w+,[\d.]+,5),.*", r"\1,,,,", SEVERAL)
    wider = alone.replace(",linf,0.1,", ",linf,0.2,")
    assert wider != alone != SEVERAL
    reports = {"full": SEVERAL, "alone": alone, "wider": wider}
    for name, report in reports.items():
        write(tmp_path / name, samples, report)
    full, union_only, other = (read_run(tmp_path / name) for name in reports)
    assert set(full.threats) == set(union_only.threats) != set(other.threats)
    assert shared([full, union_only]) == shared_measures([full, union_only])
    assert [m.attack for m in shared([full, union_only])] == ["clean", "union"]
    for run in (full, union_only):
        assert shared([run, other]) == CLEAN
        with pytest.raises(InputError, match=r"linf, eps 0\.1.*linf, eps 0\.2.* different threat"):
            shared_measures([run, other])


def test_one_label_over_several_threat_models_is_refused(tmp_path: Path) -> None:
    """As reports of version 0.1.0 have it: l2 alone breaks fewer than the row says."""
    mixed = REPORT.replace("pgd,linf,0.1", "pgd,l2,1.0")
    with pytest.raises(InputError, match=r"another accuracy, worst case \(linf, eps 0.1\)"):
        read_runs([write(tmp_path / "a", report=mixed), write(tmp_path / "b")])


def test_files_of_different_runs_do_not_belong_together(tmp_path: Path) -> None:
    other = SAMPLES.replace("0,3,3,1.5", "0,3,1,-1.5")
    with pytest.raises(InputError, match=r"a/report.csv has another accuracy, clean, than samples"):
        read_runs([write(tmp_path / "a", other), write(tmp_path / "b")])


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    other = SAMPLES.replace("0,3,3,1.5", "0,3,1,-1.5")
    report = REPORT.replace("5,0.6,", "5,0.4,").replace("5,0.2,", "5,0,")
    header, *lines = other.splitlines()
    shuffled = "\n".join([header, *reversed(lines)])
    first = write(tmp_path / "first")
    tables = []
    for name, samples in (("in order", other), ("shuffled", shuffled)):
        (tmp_path / name).mkdir()
        second = write(tmp_path / name / "second", samples, report)
        table = compare(read_runs([first, second]), BOTH)
        tables.append(table.drop(columns="run_b"))
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["b"].tolist() == [1, 1]
    assert tables[0]["c"].tolist() == [0, 0]


def test_runs_that_faced_other_attacks_are_told_apart(tmp_path: Path) -> None:
    fewer = "\n".join(line.rpartition(",")[0] for line in SAMPLES.splitlines())
    report = "".join(line for line in REPORT.splitlines(keepends=True) if ",pgd," not in line)
    report = report.replace("worst_case,linf,0.1,5,0.2", "worst_case,linf,0.1,5,0.4")
    third = write(tmp_path / "c", fewer, report)
    runs = read_runs([write(tmp_path / "a"), write(tmp_path / "b"), third])
    assert suites(runs) == ["fgsm", "fgsm, pgd"]
    assert suites(runs[:2]) == ["fgsm, pgd"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("samples.csv", "", "samples.csv cannot be read: No columns"),
        ("samples.csv", "index,label\n0,1\n", "samples.csv lacks the columns clean_prediction"),
        ("samples.csv", SAMPLES.replace("0,3,3", "0,,3"), "samples.csv cannot be read"),
        ("samples.csv", SAMPLES.replace("0.5,1\n", "0.5,yes\n"), "samples.csv cannot be read"),
        ("samples.csv", SAMPLES.replace("2,1,1", "0,1,1"), "two rows of the same sample"),
        ("report.csv", REPORT.replace("worst_case", "worst"), "one row clean and one row worst"),
        ("report.csv", REPORT.replace("pgd", "clean"), "one row clean and one row worst_case"),
        ("report.csv", REPORT.replace("norm", "mron"), "report.csv lacks the columns norm"),
        ("report.csv", REPORT.replace("5,0.6,", "5,,"), "another accuracy, clean"),
        ("report.csv", REPORT.replace("5,0.6,", "5,x,"), "report.csv cannot be read"),
    ],
)
def test_files_that_are_no_ledgers_are_refused(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    (second / name).write_text(content)
    with pytest.raises(InputError, match=f"^{second}/.*{words}"):
        read_runs([first, second])
