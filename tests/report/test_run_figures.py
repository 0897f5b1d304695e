"""Every figure of a run shows its tables: what was drawn is read back from the artists."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch

from robusttrain.errors import InputError
from robusttrain.report.ledger import wilson
from robusttrain.report.page.figures import CYCLE, Picture
from robusttrain.report.run.figures import CLASSES, CLASSES_IN_MATRIX, FIGURES
from robusttrain.report.run.page import drawn, figure
from robusttrain.report.run.tables import Missing, Tables, best_epoch
from toys import pages

pytestmark = pytest.mark.filterwarnings("ignore::robusttrain.errors.IdentityWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    """Every figure of the run that is written by hand."""
    run = pages.write_run(tmp_path_factory.mktemp("run"))
    pictures, reasons = drawn(Tables.read(run))
    assert not reasons
    assert list(pictures) == list(FIGURES)
    return pictures


def again(folder: Path, name: str, **changed: pd.DataFrame | None) -> Picture:
    """A figure of the run with other tables."""
    return FIGURES[name](Tables.read(pages.write_run(folder, **changed)))


def only(figure: Figure) -> Axes:
    (ax,) = figure.axes
    return ax


def line(ax: Axes, label: str | None = None) -> tuple[list[float], list[float]]:
    """The points of the line of a label, or of the first line."""
    chosen = [each for each in ax.lines if label in (None, each.get_label())]
    x, y = chosen[0].get_data()
    return np.asarray(x, float).tolist(), np.asarray(y, float).tolist()


def band(ax: Axes) -> list[tuple[float, float]]:
    """The corners of the filled interval."""
    corners = ax.collections[0].get_paths()[0].vertices
    return sorted({(round(float(x), 9), round(float(y), 9)) for x, y in corners})


def ends(points: pd.DataFrame, key: str) -> list[tuple[float, float]]:
    both = [(row[key], row[end]) for _, row in points.iterrows() for end in ("ci_low", "ci_high")]
    return sorted({(round(float(x), 9), round(float(y), 9)) for x, y in both})


CURVES = [("eps", "eps", "eps"), ("steps", "steps", "steps"), ("draws", "eot", "eot")]


@pytest.mark.parametrize(("name", "kind", "key"), CURVES)
def test_a_curve_is_drawn_point_by_point_with_its_intervals(
    made: dict[str, Picture], name: str, kind: str, key: str
) -> None:
    points = pages.curve()[lambda table: table["curve"] == kind]
    ax = only(made[name].figure)
    assert line(ax) == (points[key].tolist(), points["accuracy"].tolist())
    assert band(ax) == ends(points, key)
    assert made[name].data["accuracy"].tolist() == points["accuracy"].tolist()


@pytest.mark.parametrize(("name", "kind", "key"), CURVES)
def test_a_point_that_moves_by_one_image_moves_in_its_curve(
    made: dict[str, Picture], tmp_path: Path, name: str, kind: str, key: str
) -> None:
    table = pages.curve().reset_index(drop=True)
    moved = table.index[table["curve"] == kind][1]
    table.loc[moved, "accuracy"] += 0.1
    changed = again(tmp_path, name, curve=table)
    before, after = (line(only(each.figure))[1] for each in (made[name], changed))
    assert np.flatnonzero(~np.isclose(before, after)).tolist() == [1]
    assert after[1] == pytest.approx(before[1] + 0.1)


def test_the_curve_over_eps_shows_guessing_and_the_worst_case(made: dict[str, Picture]) -> None:
    ax = only(made["eps"].figure)
    assert set(line(ax, "guessing")[1]) == {1 / 3}
    (container,) = ax.containers
    data, _, (bars,) = container
    assert np.asarray(data.get_data()).ravel().tolist() == [pages.EPS, 0.4]
    assert bars.get_segments()[0][:, 1] == pytest.approx(wilson(4, 10))


def test_the_radii_are_drawn_by_what_was_found_and_by_what_is_proven(
    made: dict[str, Picture], tmp_path: Path
) -> None:
    ax, table = only(made["radii"].figure), pages.curve()
    for kind, label in (("radii", "nothing broke it"), ("proven", "proven")):
        own = table[table["curve"] == kind]
        assert line(ax, label) == (own["eps"].tolist(), own["accuracy"].tolist())
    assert band(ax) == ends(table[table["curve"] == "radii"], "eps")
    assert made["radii"].data["accuracy"].tolist() == [
        *table[table["curve"] == "radii"]["accuracy"],
        *table[table["curve"] == "proven"]["accuracy"],
    ]


def test_radii_of_several_norms_are_drawn_as_multiples_of_their_eps(tmp_path: Path) -> None:
    worst = pages.report().iloc[-1:].assign(norm="l2", eps=2.0)
    own = pages.curve()[lambda table: table["curve"] == "radii"]
    curve = pd.concat([pages.curve(), own.assign(norm="l2", eps=own["eps"] * 20)])
    found = again(tmp_path, "radii", curve=curve, report=pd.concat([pages.report(), worst]))
    ax = only(found.figure)
    shares = (own["eps"] / pages.EPS).tolist()
    assert line(ax, "nothing broke it in linf, 1 is 0.1")[0] == pytest.approx(shares)
    assert line(ax, "nothing broke it in l2, 1 is 2")[0] == pytest.approx(shares)


def test_the_training_is_drawn_epoch_by_epoch(made: dict[str, Picture]) -> None:
    above, below = made["training"].figure.axes
    train = pages.train()
    drawn_lines = {
        "validation, clean": "val_clean_accuracy", "validation, attacked": "val_robust_accuracy",
        "training, attacked": "train_robust_accuracy", "training, PGD-10": "train_pgd_accuracy",
    }  # fmt: skip
    labelled = [each for each in above.lines if not str(each.get_label()).startswith("_")]
    assert {str(each.get_label()) for each in labelled} == set(drawn_lines)
    for label, column in drawn_lines.items():
        assert line(above, label) == (train["epoch"].tolist(), train[column].tolist())
        assert made["training"].data[column].tolist() == train[column].tolist()
    assert line(below) == (train["epoch"].tolist(), train["loss"].tolist())


def test_the_training_marks_the_best_epoch_and_what_went_wrong(made: dict[str, Picture]) -> None:
    above = made["training"].figure.axes[0]
    upright = [each for each in above.lines if str(each.get_label()).startswith("_")]
    assert [float(np.asarray(each.get_xdata())[0]) for each in upright] == [2, 3]
    assert "catastrophic overfitting in epoch 3" in made["training"].caption


def test_the_best_epoch_is_the_one_of_the_weights() -> None:
    """Robust before clean accuracy; of equal ones none that overfits; and then the last."""
    train = pages.train()
    assert best_epoch(train) == 2
    assert best_epoch(train.assign(val_robust_accuracy=0.5)) == 4
    assert best_epoch(train.assign(val_robust_accuracy=0.5, val_clean_accuracy=0.5)) == 2
    assert (
        best_epoch(train.assign(val_robust_accuracy=0.5, val_clean_accuracy=0.5, overfit=False))
        == 4
    )


def test_each_class_has_its_accuracies(made: dict[str, Picture]) -> None:
    ax = only(made["classes"].figure)
    assert line(ax, "clean") == ([0.75, 1.0, 0.5], [0, 1, 2])
    assert line(ax, "under attack, 95 % interval") == ([0.25, 0.5, 0.5], [0, 1, 2])
    intervals = ax.collections[1].get_segments()
    assert [each[:, 0].tolist() for each in intervals] == [
        pytest.approx(wilson(left, n)) for left, n in ((1, 4), (2, 4), (1, 2))
    ]
    assert made["classes"].data["n"].tolist() == [4, 4, 2]


def test_an_image_that_breaks_moves_the_dot_of_its_class(tmp_path: Path) -> None:
    samples = pages.samples()
    samples.loc[4, "broken_by"] = "fab"
    ax = only(again(tmp_path, "classes", samples=samples).figure)
    assert line(ax, "under attack, 95 % interval")[0] == [0.25, 0.25, 0.5]


def cells(ax: Axes) -> dict[tuple[int, int], int]:
    """(row, column) of each cell, with the number in it."""
    texts = {text.get_position(): int(text.get_text()) for text in ax.texts}
    boxes = [each for each in ax.patches if isinstance(each, Rectangle)]
    centres = [
        (round(b.get_x() + b.get_width() / 2), round(b.get_y() + b.get_height() / 2)) for b in boxes
    ]
    assert sorted(centres) == sorted(texts)
    return {(y, x): texts[x, y] for x, y in centres}


def test_the_confusion_counts_what_images_are_taken_for(
    made: dict[str, Picture], tmp_path: Path
) -> None:
    ax = only(made["confusion"].figure)
    expected = {(0, 0): 1, (0, 1): 2, (0, 2): 1, (1, 0): 2, (1, 1): 2, (2, 0): 1, (2, 2): 1}
    assert cells(ax) == expected
    table = made["confusion"].data.drop(columns="true class").to_numpy()
    assert {(r, c): int(n) for (r, c), n in np.ndenumerate(table) if n} == expected
    samples = pages.samples()
    samples.loc[1, "worst_prediction"] = 2
    moved = cells(only(again(tmp_path, "confusion", samples=samples).figure))
    assert moved == expected | {(0, 1): 1, (0, 2): 2}


def test_of_many_classes_the_most_frequent_confusions_are_drawn(tmp_path: Path) -> None:
    count = CLASSES_IN_MATRIX + 1
    label = np.repeat(np.arange(count), 3)
    samples = pd.DataFrame(
        {
            "index": range(len(label)), "label": label, "clean_prediction": label,
            "clean_margin": 1.0, "broken_by": np.where(label == 4, "fgsm", ""),
            "worst_prediction": np.where(label == 4, 9, label),
        }
    )  # fmt: skip
    picture = again(tmp_path, "confusion", samples=samples)
    (bars,) = only(picture.figure).containers
    assert isinstance(bars, BarContainer)
    assert [bar.get_width() for bar in bars] == [3]
    assert picture.data["confusion"].tolist() == ["4 → 9"]


def test_margins_are_counted_in_bins(made: dict[str, Picture], tmp_path: Path) -> None:
    clean = np.array(pages.MARGIN)
    worst = np.array([1.0, -1.5, -0.1, -1.0, 2.0, 0.2, -0.5, -2.5, 2.2, -2.0])

    def heights(picture: Picture) -> dict[str, np.ndarray]:
        steps = [each for each in only(picture.figure).patches if isinstance(each, StepPatch)]
        named = {str(each.get_label()): each.get_data() for each in steps if not each.get_fill()}
        counts, edges, _ = named["clean"]
        assert np.histogram(clean, edges)[0].tolist() == counts.tolist()
        return {"edges": edges, **{key: value[0] for key, value in named.items()}}

    drawn_values = heights(made["margins"])
    edges = drawn_values["edges"]
    assert drawn_values["under attack"].tolist() == np.histogram(worst, edges)[0].tolist()
    assert made["margins"].data["attacked"].tolist() == drawn_values["under attack"].tolist()
    assert drawn_values["under attack"].sum() == 10
    samples = pages.samples()
    samples.loc[4, "fab_margin"] = 1.0
    moved = heights(again(tmp_path, "margins", samples=samples))["under attack"]
    assert np.abs(moved - drawn_values["under attack"]).sum() == 2


def test_sizes_count_what_each_attack_broke_up_to_them(
    made: dict[str, Picture], tmp_path: Path
) -> None:
    ax = only(made["sizes"].figure)
    shares, fgsm = line(ax, "fgsm")
    _, fab = line(ax, "fab")
    assert fgsm == [3.0 * (share >= 1) for share in shares]
    assert fab == [float(share >= 0.4 - 1e-9) for share in shares]
    assert made["sizes"].data["fab"].tolist() == fab
    samples = pages.samples()
    samples.loc[2, "fab_size"] = 0.05
    moved = line(only(again(tmp_path, "sizes", samples=samples).figure), "fab")[1]
    assert moved == [float(share >= 0.5 - 1e-9) for share in shares]


def test_attacks_take_images_in_their_order(made: dict[str, Picture], tmp_path: Path) -> None:
    def taken(picture: Picture) -> list[tuple[float, float]]:
        _, bars, _ = only(picture.figure).containers
        assert isinstance(bars, BarContainer)
        return [(bar.get_x(), bar.get_width()) for bar in bars]

    # From the right: two misclassified, three broken by fgsm, one by fab.
    assert taken(made["attacks"]) == [(8, 2), (5, 3), (4, 1)]
    *_, (last,) = only(made["attacks"].figure).containers
    assert last.get_width() == 4
    assert made["attacks"].data["took"].tolist() == [2, 3, 1]
    samples = pages.samples()
    samples.loc[1, "broken_by"] = "fab"
    assert taken(again(tmp_path, "attacks", samples=samples)) == [(8, 2), (6, 2), (4, 2)]


def test_certificates_fall_where_images_lose_them(made: dict[str, Picture], tmp_path: Path) -> None:
    ax = only(made["certified"].figure)
    x, y = line(ax, "certified")
    # Three of five images are certified correctly, at 0.05, 0.07 and 0.12.
    assert x == [0, 0.05, 0.07, 0.12, 0.12]
    assert y == [0.6, 0.6, 0.4, 0.2, 0]
    assert line(ax, "gradient attack of the audit")[1] == [0.8, 0.6, 0.4, 0.1]
    measured = [np.asarray(each[0].get_data()).T.tolist() for each in ax.containers]
    assert measured == [[[0, 0.6], [0.05, 0.4], [0.1, 0.2]], [[0.1, 0.4]]]
    certified = pages.certified()
    certified.loc[0, "radius"] = 0.06
    moved = line(only(again(tmp_path, "certified", certified=certified).figure), "certified")
    assert moved[0] == [0, 0.05, 0.06, 0.07, 0.07]


def test_a_bar_shows_the_status_of_each_image(made: dict[str, Picture], tmp_path: Path) -> None:
    bars = [(bar.get_x(), bar.get_width()) for bar in only(made["status"].figure).patches]
    # Wrong, broken, proven by intervals, by linear bounds, by branching, undecided.
    assert bars == [(0, 2), (2, 4), (6, 1), (7, 1), (8, 1), (9, 1)]
    assert made["status"].data["images"].sum() == 10
    earlier = pages.samples().drop(columns="status")
    with pytest.raises(Missing, match="verified nothing"):
        again(tmp_path, "status", samples=earlier)


def test_figures_come_by_name(tmp_path: Path) -> None:
    run = pages.write_run(tmp_path, certified=None)
    assert isinstance(figure(run, "eps"), Figure)
    with pytest.raises(InputError, match=r"figure=radius is not allowed: it must be one of eps, "):
        figure(run, "radius")
    with pytest.raises(InputError, match=r"figure=certified cannot be drawn: There is no certif"):
        figure(run, "certified")


def test_figures_leave_the_settings_of_the_user_alone(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 21, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        picture = again(tmp_path, "eps")
        assert picture.svg
        assert dict(matplotlib.rcParams) == before
        assert only(picture.figure).get_facecolor() != (1, 0, 0, 1)


# Machado, Oliveira and Fernandes (2009): how deuteranopes and protanopes see linear RGB.
DEUTAN = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.01182, 0.04294, 0.968881],
]
PROTAN = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]


@pytest.mark.parametrize("seen", [DEUTAN, PROTAN], ids=["deuteranopia", "protanopia"])
def test_the_colours_of_lines_differ_for_colour_blind_readers(seen: list[list[float]]) -> None:
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in CYCLE]) / 255
    blind = (rgb**2.2 @ np.array(seen).T).clip(0, 1) ** (1 / 2.2)
    apart = [np.abs(a - b).max() for i, a in enumerate(blind) for b in blind[:i]]
    assert min(apart) > 0.08


def test_many_classes_are_cut_to_those_that_suffer_most(tmp_path: Path) -> None:
    count = CLASSES + 5
    label = np.repeat(np.arange(count), 2)
    samples = pd.DataFrame(
        {
            "index": range(len(label)), "label": label, "clean_prediction": label,
            "clean_margin": 1.0, "broken_by": np.where(label >= 5, "fgsm", ""),
            "worst_prediction": 0,
        }
    )  # fmt: skip
    picture = again(tmp_path, "classes", samples=samples)
    assert line(only(picture.figure), "under attack, 95 % interval")[0] == [0.0] * CLASSES
    assert len(picture.data) == count
