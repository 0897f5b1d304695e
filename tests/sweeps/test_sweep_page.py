"""The page of a sweep: what each figure shows is read back, and compared with known numbers."""

import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from robusttrain.cli.report import report
from robusttrain.errors import InputError
from robusttrain.report.page.figures import CYCLE, Picture
from robusttrain.sweeps import drawing, page, records, sweep_page
from robusttrain.sweeps.pairs import Comparison
from robusttrain.sweeps.settings import Figure, over_seeds
from toys import browser
from toys.command_line import CommandLine
from toys.pages import HOSTILE
from toys.sweeps import Sweep, flags, studied_sweep

# Of the text and of what is behind it.
COLOURS = ("text", "background")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def written(sweep: Sweep) -> str:
    sweep_page.rewrite(sweep.folder)
    return (sweep.folder / "sweep.html").read_text(encoding="utf-8")


def only(picture: Picture) -> Axes:
    (ax,) = picture.figure.axes
    return ax


def points(ax: Axes, gid: str) -> list[tuple[float, float]]:
    """The points of all lines of a kind."""
    lines = [line for line in ax.lines if line.get_gid() == gid]
    xy = [np.asarray(line.get_xydata(), float) for line in lines]
    return sorted((round(x, 9), round(y, 9)) for part in xy for x, y in part.tolist())


def rounded(x: pd.Series, y: pd.Series) -> list[tuple[float, float]]:
    return sorted(zip(x.round(9).tolist(), y.round(9).tolist(), strict=True))


# --- figures ------------------------------------------------------------------------------------


@pytest.fixture
def trade_offs() -> pd.DataFrame:
    """Three settings, two of them on the front, one with a single seed."""
    nan = float("nan")
    rows = [
        (1, "d=a", 0.9, 0.6, True, "a", 0.88, 0.92, 0.55, 0.65),
        (2, "d=b", 0.95, 0.5, True, "b", 0.94, 0.96, 0.45, 0.55),
        (3, "d=a w=2", 0.85, 0.4, False, "a", nan, nan, nan, nan),
    ]
    names = ["rank", "setting", "clean", "accuracy", "front", "colour", "clean_seeds_low"]
    names += ["clean_seeds_high", "seeds_low", "seeds_high"]
    table = pd.DataFrame(rows, columns=names).assign(robust="worst case")
    for name, about in (("clean_images", "clean"), ("images", "accuracy")):
        table[f"{name}_low"], table[f"{name}_high"] = table[about] - 0.1, table[about] + 0.05
    return table


def shown_in_trade_off(table: pd.DataFrame) -> dict[str, object]:
    """What a trade-off shows: its points, the front, the ends of its bars and its numbers."""
    ax = only(drawing.trade_off(table, "t", "linf", "d", ["a", "b"]))
    bars = [segment for each in ax.collections for segment in each.get_segments()]
    ends = {tuple(np.round(np.concatenate(bar), 9).tolist()) for bar in bars if len(bar)}
    return {
        "points": points(ax, "points"),
        "front": points(ax, "front"),
        "ends": sorted(end for end in ends if not np.isnan(end).any()),
        "numbers": {text.get_text(): text.xy for text in ax.texts},  # type: ignore[attr-defined]
    }


def bars_of(table: pd.DataFrame) -> list[tuple[float, ...]]:
    """The ends of the bars that a table asks for: x, y of one end, then of the other."""
    found = set()
    for row in table.to_dict("records"):
        x, y = row["clean"], row["accuracy"]
        for over in ("seeds", "images"):
            if not np.isnan(row[f"{over}_low"]):
                found.add((row[f"clean_{over}_low"], y, row[f"clean_{over}_high"], y))
                found.add((x, row[f"{over}_low"], x, row[f"{over}_high"]))
    return sorted(tuple(round(float(value), 9) for value in bar) for bar in found)


def test_a_trade_off_shows_its_points_intervals_and_front(trade_offs: pd.DataFrame) -> None:
    shown = shown_in_trade_off(trade_offs)
    assert shown["points"] == rounded(trade_offs["clean"], trade_offs["accuracy"])
    assert shown["front"] == [(0.9, 0.6), (0.95, 0.5)]
    assert shown["ends"] == bars_of(trade_offs)
    assert shown["numbers"] == {"1": (0.9, 0.6), "2": (0.95, 0.5)}


@pytest.mark.parametrize(
    "column", ["clean", "accuracy", "seeds_low", "clean_seeds_high", "images_high"]
)
def test_a_trade_off_shows_each_value_that_is_moved_by_a_point(
    trade_offs: pd.DataFrame, column: str
) -> None:
    moved = trade_offs.copy()
    moved.loc[0, column] += 0.01
    assert shown_in_trade_off(moved) != shown_in_trade_off(trade_offs)


def test_a_colour_is_a_value_and_a_hollow_point_is_not_on_the_front(
    trade_offs: pd.DataFrame,
) -> None:
    ax = only(drawing.trade_off(trade_offs, "t", "linf", "d", ["b", "a"]))
    lines = {tuple(each.get_xydata()[0]): each for each in ax.lines if each.get_gid() == "points"}
    assert [to_hex(lines[xy].get_color()) for xy in ((0.9, 0.6), (0.95, 0.5))] == [
        CYCLE[1], CYCLE[0],
    ]  # fmt: skip
    filled = {xy: each.get_markerfacecolor() == each.get_color() for xy, each in lines.items()}
    assert filled == {(0.9, 0.6): True, (0.95, 0.5): True, (0.85, 0.4): False}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "a"]


@pytest.fixture
def curve() -> pd.DataFrame:
    """Two curves of three points."""
    return pd.DataFrame(
        {
            "panel": "", "curve": ["a"] * 3 + ["b"] * 3, "x": [0.1, 0.2, 0.4] * 2,
            "measure": "worst case", "seeds": 3, "accuracy": [0.9, 0.8, 0.5, 0.7, 0.6, 0.2],
            "low": [0.85, 0.7, 0.4, 0.6, 0.5, 0.1], "high": [0.95, 0.9, 0.6, 0.8, 0.7, 0.3],
            "interval": "over seeds",
        }
    )  # fmt: skip


def shown_in_curves(table: pd.DataFrame) -> dict[str, object]:
    ax = only(drawing.curves(table, "c", "eps"))
    bands = [each.get_paths()[0].vertices for each in ax.collections]
    return {
        "points": {
            str(line.get_label()): np.round(line.get_xydata(), 9).tolist() for line in ax.lines
        },
        "bands": [{tuple(np.round(corner, 9).tolist()) for corner in band} for band in bands],
    }


def test_curves_show_their_points_and_bands(curve: pd.DataFrame) -> None:
    shown = shown_in_curves(curve)
    parts = dict([*curve.groupby("curve")])
    assert shown["points"] == {
        name: part[["x", "accuracy"]].to_numpy().tolist() for name, part in parts.items()
    }
    assert shown["bands"] == [
        {(x, y) for end in ("low", "high") for x, y in zip(part["x"], part[end], strict=True)}
        for part in parts.values()
    ]
    for column in ("accuracy", "low", "high"):
        moved = curve.copy()
        moved.loc[4, column] += 0.01
        assert shown_in_curves(moved) != shown


def test_a_grid_shows_each_accuracy_in_its_cell() -> None:
    table = pd.DataFrame(
        {
            "panel": "", "x": [1.0, 2.0, 1.0], "y": [5.0, 5.0, 10.0], "measure": "worst case",
            "seeds": 1, "accuracy": [0.5, 0.25, 0.125], "low": 0.0, "high": 1.0, "interval": "",
        }
    )  # fmt: skip
    ax = only(drawing.grid(table, "g", ("width", "steps")))
    (mesh,) = ax.collections
    values = np.ma.filled(mesh.get_array(), np.nan)
    np.testing.assert_array_equal(values, [[0.5, 0.25], [0.125, np.nan]])
    assert {text.get_text(): text.get_position() for text in ax.texts} == {
        "50.0": (0.5, 0.5), "25.0": (1.5, 0.5), "12.5": (0.5, 1.5),
    }  # fmt: skip
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["5", "10"]


def test_a_bar_has_the_mean_and_both_intervals_in_their_places() -> None:
    figure = over_seeds([0.7, 0.8, 0.9], 100)
    low, high = page.scale([figure])
    assert figure.over_seeds is not None
    assert low <= figure.over_seeds.low < 0.6
    assert high == 1
    drawn = page.bar(figure, low, high)

    def share(place: float) -> float:
        return low + place / page.BAR * (high - low)

    assert share(drawn["mean"]) == pytest.approx(0.8, abs=1e-3)
    assert [*map(share, drawn["seeds"])] == pytest.approx([*figure.over_seeds], abs=1e-3)
    assert [*map(share, drawn["images"])] == pytest.approx([*figure.over_images], abs=1e-3)
    moved = Figure(0.81, figure.deviation, figure.over_seeds, figure.over_images)
    assert page.bar(moved, low, high) != drawn


# --- the page -----------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "a":
            self.links.append(str(dict(attrs)["href"]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Parsed]:
    """A sweep of which the page has every section."""
    sweep = studied_sweep(tmp_path_factory.mktemp("sweep"))
    return sweep, Parsed(written(sweep))


def test_all_sections_are_there(studied: tuple[Sweep, Parsed]) -> None:
    _, parsed = studied
    for words in (
        "Sweep over defense, eps, attack.steps", "17 of 18 jobs have finished, 1 failed.",
        "Ranking", "Clean against robust accuracy", "Accuracy over a numeric key",
        "Accuracy over two numeric keys", "tests for the letters", "Flagged",
        "audit: fail (worst case linf 0.3)", "Failed",
    ):  # fmt: skip
        assert words in parsed.text
    # Trade-offs at two radii; two curves for each of two keys; a grid.
    assert parsed.tags.count("figure") >= 2 + 4 + 1


def test_whatever_stands_in_a_job_is_shown_as_text(studied: tuple[Sweep, Parsed]) -> None:
    sweep, parsed = studied
    assert {"script", "img"}.isdisjoint(parsed.tags)
    assert rf"defense={HOSTILE}\x1b[31mred" in parsed.text
    assert "\x1b" not in (sweep.folder / "sweep.html").read_text(encoding="utf-8")


def test_links_to_the_runs_are_relative(studied: tuple[Sweep, Parsed]) -> None:
    sweep, parsed = studied
    assert sorted(parsed.links) == sorted(f"{number}/" for number in range(17))
    assert all((sweep.folder / link).is_dir() for link in parsed.links)


def test_a_run_with_a_page_is_linked_to_it(sweep: Sweep) -> None:
    run = sweep.folder / "a #1"
    run.mkdir()
    assert page.link(run, sweep.folder) == "a%20%231/"
    (run / "report.html").touch()
    assert page.link(run, sweep.folder / "elsewhere") == "../a%20%231/report.html"


def test_what_is_missing_is_left_out_with_a_line(sweep: Sweep) -> None:
    sweep.fail("defense=rt", error="no")
    text = Parsed(written(sweep)).text
    assert "No job has finished an evaluation yet." in text
    assert "Clean against robust accuracy: left out, since" in text
    assert "Accuracy over a numeric key: left out, since" in text
    sweep.add("defense=rt", clean=flags(3))
    text = Parsed(written(sweep)).text
    assert "Evaluated on 200 test images of digits." in text
    assert "left out" in text


def test_sentences_name_the_best_and_what_cannot_be_told_apart(sweep: Sweep) -> None:
    for defense, wrong, start in (("a", 80, 0), ("b", 24, 10), ("c", 20, 0)):
        sweep.add(f"defense={defense}", clean=flags(0), worst=flags(wrong, start))
    assert (
        "Under linf, eps 0.1: the highest worst-case accuracy is 90.00 %, of defense=c. "
        "1 of 2 others cannot be told apart from it."
    ) in Parsed(written(sweep)).text


def test_training_problems_and_unmet_requirements_are_flagged(sweep: Sweep) -> None:
    job = sweep.add("defense=rt", clean=flags(0))
    (sweep.folder / job.folder / "result.json").write_text(
        '{"training": {"findings": [{"problem": "stuck", "epoch": 3, "message": ""}]},'
        ' "requirements": [{"key": "evaluation.require.clean", "figure": "clean", "threat": "",'
        ' "value": 0.5, "required": 0.75, "met": false}]}'
    )
    text = Parsed(written(sweep)).text
    assert "stuck in epoch 3" in text
    assert "clean is 50.0%, but evaluation.require.clean requires 75.0%" in text


@browser.needed
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_a_desktop_and_asks_for_nothing(
    studied: tuple[Sweep, Parsed], dark: bool
) -> None:
    seen = browser.look(studied[0].folder / "sweep.html", dark=dark)
    assert seen.console == []
    for frame, width in zip(seen.frames, browser.WIDTHS, strict=True):
        assert (frame["width"], frame["needed"]) == (width, width)
        assert (frame["requests"], frame["cut"], frame["broken"]) == ([], [], 0)
        text, ground = (sum(map(int, re.findall(r"\d+", frame[key])[:3])) for key in COLOURS)
        assert (text > ground) is dark


@browser.needed
def test_the_page_prints(studied: tuple[Sweep, Parsed], tmp_path: Path) -> None:
    pdf = browser.printed(studied[0].folder / "sweep.html", tmp_path / "page.pdf")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8


# --- when it is written ---------------------------------------------------------------------------


def test_the_page_of_a_sweep_that_runs_is_not_written_again_too_soon(sweep: Sweep) -> None:
    path = sweep.folder / "sweep.html"

    def grown(age: float) -> bool:
        before = time.time() - age
        os.utime(path, (before, before))
        sweep_page.grow(sweep.folder, Comparison(), 5)
        return path.stat().st_mtime > before + 1

    sweep.add("defense=rt", clean=flags(0))
    sweep_page.grow(sweep.folder, Comparison(), 5)
    assert "1 of 5 jobs has finished, 4 not started." in Parsed(path.read_text()).text
    assert [grown(age) for age in (55, 70)] == [False, True]
    for seed in range(2, 21):
        records.Job(seed, str(seed), (f"seed={seed}",), "failed").save(sweep.folder)
    assert [grown(age) for age in (70, 90)] == [False, True]


def test_a_job_does_not_fail_for_the_page(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("a", problem="is damaged")

    monkeypatch.setattr(sweep_page, "settings", refuse)
    sweep_page.grow(sweep.folder, Comparison(), 5)
    assert "was not written: a is damaged" in caplog.text
    assert not (sweep.folder / "sweep.html").exists()


def test_robusttrain_report_makes_the_page_of_a_sweep(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.add("defense=rt", clean=flags(0))
    report([str(sweep.folder)])
    assert capsys.readouterr().out == f"{sweep.folder / 'sweep.html'}\n"
    text = Parsed((sweep.folder / "sweep.html").read_text(encoding="utf-8")).text
    assert "Under linf, eps 0.1: the worst-case accuracy is 100.00 %." in text


@pytest.mark.parametrize(
    ("option", "is_sweep", "message"),
    [("--pdf", True, "is a sweep"), ("--latex", False, "is a run"),
     ("--latex", True, "has no job that has finished an evaluation")],
)  # fmt: skip
def test_an_option_without_effect_is_refused(
    tmp_path: Path, option: str, is_sweep: bool, message: str
) -> None:
    if is_sweep:
        Sweep(tmp_path).fail("defense=rt", error="no")
    with pytest.raises(SystemExit, match=re.escape(message)):
        report([str(tmp_path), option])


def test_a_sweep_ends_with_its_page_and_its_jobs_have_none(
    command_line: CommandLine, tmp_path: Path
) -> None:
    words = [
        "-m", "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "model=linear",
        "defense=standard", "epochs=1", "evaluation=quick", "evaluation.attacks.pgd.steps=2",
        "evaluation.audit=false", "device=cpu", "eps=0.05,0.1", "hydra.sweep.dir=s",
    ]  # fmt: skip
    done = command_line.run(*words, "report=html", cwd=tmp_path)
    assert done.code == 0, done.said
    assert str(tmp_path / "s" / "sweep.html") in done.out.splitlines()
    parsed = Parsed((tmp_path / "s" / "sweep.html").read_text(encoding="utf-8"))
    assert "2 of 2 jobs have finished." in parsed.text
    assert "robusttrain -m dataset=synthetic" in parsed.text
    assert parsed.links == ["0/", "1/"]
    assert not [*tmp_path.glob("s/*/report.html")]


# --- comparisons ----------------------------------------------------------------------------------


def test_compare_has_the_same_page(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from robusttrain.cli.compare import compare

    for seed, wrong in ((0, 20), (1, 90)):
        sweep.add("defense=rt", f"seed={seed}", clean=flags(0), worst=flags(wrong))
    monkeypatch.chdir(sweep.folder)
    compare(["1", "0", "--html", "compared.html"])
    parsed = Parsed(Path("compared.html").read_text(encoding="utf-8"))
    assert "Comparison of 2 runs" in parsed.text
    assert "is 90.00 %, of run=0/. It is significantly better than all others." in parsed.text
    assert parsed.links == ["0/", "1/"]
    compare(["1", "0", "--clean", "--html", "clean.html"])
    assert "The highest clean accuracy is 100.00 %" in Parsed(Path("clean.html").read_text()).text
    with pytest.raises(SystemExit, match="cannot be written"):
        compare(["1", "0", "--html", "nowhere/compared.html"])
    capsys.readouterr()
