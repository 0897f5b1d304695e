"""The figures of a run, each from its tables."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from robusttrain.errors import printable
from robusttrain.report.ledger import CLEAN, wilson
from robusttrain.report.page.figures import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    HEIGHT,
    INK,
    MUTED,
    ORANGE,
    RULE,
    SKY,
    VERMILION,
    WIDTH,
    Picture,
    Room,
    axes,
    blank,
    in_percent,
    legend_above,
    styled,
)
from robusttrain.report.page.formats import percent
from robusttrain.report.proofs import stages
from robusttrain.report.run.tables import (
    Missing,
    Tables,
    best_epoch,
    certificates,
    certified_norm,
    curve_of,
    epochs,
)
from robusttrain.run_directory import CURVE

# A confusion matrix of more classes is a list of the most frequent confusions instead.
CLASSES_IN_MATRIX, PAIRS = 15, 15

# Of more classes, those that lose most are drawn.
CLASSES = 20

# Bins of margins, and points of a distribution of sizes.
BINS, SIZES = 24, 41

# A perturbation may exceed its radius by rounding.
ROUNDING = 1 + 1e-4

BAND = 0.18
NO_AUDIT = "the run was not audited (evaluation.audit)"


def over_eps(tables: Tables) -> Picture:
    """Accuracy against the radius of the attack, with chance level and the worst case."""
    points = curve_of(tables, "eps", NO_AUDIT).sort_values("eps")
    norms, chance = _norms(points), 1 / len(tables.class_names)
    if len(norms) > 1:
        return _over_shares(tables, points, norms, chance)
    worst = [row for row in tables.worst if row["norm"] == norms[0]]
    with styled():
        figure, ax = axes(room=_room(3))
        _band(ax, points, "eps", BLUE, "gradient attack of the audit")
        _measured(ax, pd.DataFrame(worst), "worst case of all attacks")
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1.2, label="guessing")
        ax.set_xlabel(f"radius eps ({norms[0]}; pixels range from 0 to 1)")
        _shares(ax)
        legend_above(ax, 1)
    last = points.iloc[-1]
    return Picture(
        "eps", "Accuracy against the radius of the attack",
        f"Share of images that are still classified correctly, out of {points['n'].iloc[0]}, with "
        "95 % intervals. A curve that does not fall towards guessing is a sign of masked "
        "gradients. The worst case counts all evaluated images.",
        f"Line that runs from {percent(points['accuracy'].iloc[0])} at eps "
        f"{points['eps'].iloc[0]:g} to {percent(last['accuracy'])} at eps {last['eps']:g}. "
        f"Guessing is {percent(chance)}.",
        figure, points[["eps", "n", "accuracy", "ci_low", "ci_high"]],
    )  # fmt: skip


def _over_shares(
    tables: Tables, points: pd.DataFrame, norms: Sequence[str], chance: float
) -> Picture:
    """Accuracy against the radius of each norm, as a multiple of the one that was evaluated."""
    radii = {row["norm"]: row["eps"] for row in tables.worst}
    points = points.assign(share=points["eps"] / points["norm"].map(radii))
    with styled():
        figure, ax = axes(room=_room(len(norms) + 1))
        _bands(ax, points, "share", [f"{norm}, 1 is {radii[norm]:g}" for norm in norms])
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1.2, label="guessing")
        ax.set_xlabel("radius eps, as a multiple of the evaluated one")
        _shares(ax)
        legend_above(ax, 1)
    at_radius = points[points["share"] == 1]
    said = ", ".join(
        f"{percent(accuracy)} in {norm}"
        for norm, accuracy in zip(at_radius["norm"], at_radius["accuracy"], strict=True)
    )
    return Picture(
        "eps", "Accuracy against the radius of the attack",
        f"Share of images that are still classified correctly under the gradient attack of the "
        f"audit in each norm, out of {points['n'].iloc[0]}, with 95 % intervals. A curve that does "
        f"not fall towards guessing is a sign of masked gradients.",
        f"A line for each norm. At the evaluated radii they are at {said}. Guessing is "
        f"{percent(chance)}.",
        figure, points[["norm", "eps", "n", "accuracy", "ci_low", "ci_high"]],
    )  # fmt: skip


def radii(tables: Tables) -> Picture:
    """The share of images whose radius is larger: by what was found, and by what is proven."""
    found = curve_of(tables, "radii", "no radii were searched (evaluation=radii)")
    curve = tables.tables[CURVE]
    proven = curve[curve["curve"] == "proven"].sort_values("eps", kind="stable")
    norms, radius = _norms(found), {row["norm"]: row["eps"] for row in tables.worst}
    several = len(norms) > 1
    with styled():
        figure, ax = axes(room=_room(2 * len(norms)))
        for norm, colour in zip(norms, CYCLE, strict=False):
            unit = radius[norm] if several else 1.0
            of_norm = f" in {norm}, 1 is {unit:g}" if several else ""
            own, bounds = (points[points["norm"] == norm] for points in (found, proven))
            own = own.assign(share=own["eps"] / unit)
            _band(ax, own.sort_values("share"), "share", colour, f"nothing broke it{of_norm}")
            if len(bounds):
                ax.plot(
                    bounds["eps"] / unit, bounds["accuracy"], color=colour, linestyle="--",
                    label=f"proven{of_norm}",
                )  # fmt: skip
        unit_of = "as a multiple of eps" if several else f"{norms[0]}; pixels range from 0 to 1"
        ax.set_xlabel(f"radius ({unit_of})")
        _shares(ax)
        legend_above(ax, 1)
    return Picture(
        "radii", "The radius of each image",
        f"Share of {found['n'].iloc[0]} images that are right at their own place and that nothing "
        "within the radius broke, with 95 % intervals; and the share for which bounds prove that "
        "nothing can. The truth lies between.",
        " ".join(
            f"Line{norm} that falls from {percent(own['accuracy'].iloc[0])} at radius 0 to "
            f"{percent(own['accuracy'].iloc[-1])} at {own['eps'].iloc[-1]:g}."
            for norm, own in _each(found.sort_values("eps", kind="stable"))
        ),
        figure,
        pd.concat([found, proven])[["curve", "norm", "eps", "n", "accuracy", "ci_low", "ci_high"]],
    )  # fmt: skip


def over_steps(tables: Tables) -> Picture:
    """Accuracy against the steps of the attack of the audit."""
    points = curve_of(tables, "steps", NO_AUDIT).sort_values("steps", kind="stable")
    norms = _norms(points)
    with styled():
        figure, ax = axes(room=_room(_lines(norms)))
        _bands(ax, points, "steps", norms)
        _logarithmic(ax, points["steps"])
        ax.set_xlabel("steps of the attack")
        _shares(ax)
        _legend(ax, norms)
    return Picture(
        "steps", "Accuracy against the steps of the attack",
        f"Out of {points['n'].iloc[0]} images, with 95 % intervals. A curve that is flat at its "
        "end shows that the search has converged.",
        " ".join(
            f"Line{norm} that runs from {percent(own['accuracy'].iloc[0])} after "
            f"{own['steps'].iloc[0]:g} steps to {percent(own['accuracy'].iloc[-1])} after "
            f"{own['steps'].iloc[-1]:g}."
            for norm, own in _each(points)
        ),
        figure, points[[*_of_norm(norms), "steps", "n", "accuracy", "ci_low", "ci_high"]],
    )  # fmt: skip


def over_draws(tables: Tables) -> Picture:
    """Accuracy of a random model against the draws that gradients are averaged over."""
    points = curve_of(tables, "eot", "the model is not random, or was not audited")
    points = points.sort_values("eot", kind="stable")
    norms = _norms(points)
    with styled():
        figure, ax = axes(room=_room(_lines(norms)))
        _bands(ax, points, "eot", norms)
        _logarithmic(ax, points["eot"])
        ax.set_xlabel("noise draws that gradients are averaged over")
        _shares(ax)
        _legend(ax, norms)
    return Picture(
        "draws", "Accuracy against the draws of the attack",
        "The model draws noise. An attack that averages gradients over more draws sees through "
        "more of it. A curve that still falls at its end means that more draws would break more.",
        " ".join(
            f"Line{norm} that runs from {percent(own['accuracy'].iloc[0])} with "
            f"{own['eot'].iloc[0]:g} draws to {percent(own['accuracy'].iloc[-1])} with "
            f"{own['eot'].iloc[-1]:g}."
            for norm, own in _each(points)
        ),
        figure, points[[*_of_norm(norms), "eot", "n", "accuracy", "ci_low", "ci_high"]],
    )  # fmt: skip


# What is drawn of a training: the column, its label, its colour and the style of its line.
COURSES = (
    ("val_clean_accuracy", "validation, clean", BLUE, "-"),
    ("val_robust_accuracy", "validation, attacked", VERMILION, "-"),
    ("train_clean_accuracy", "training, clean", BLUE, ":"),
    ("train_robust_accuracy", "training, attacked", VERMILION, ":"),
    ("train_pgd_accuracy", "training, PGD-10", ORANGE, ":"),
)


def training(tables: Tables) -> Picture:
    """Accuracies and loss over the epochs, with the best epoch and what went wrong."""
    train = epochs(tables)
    best = best_epoch(train)
    problems = (tables.result.get("training") or {}).get("findings", [])
    drawn = [course for course in COURSES if course[0] in train and train[course[0]].notna().any()]
    marker = "o" if len(train) <= 30 else ""
    with styled():
        rows = math.ceil(len(drawn) / 2)
        figure = blank(WIDTH, 1.35 * HEIGHT, _room(rows + 1))
        spaces = {"height_ratios": (2.2, 1), "hspace": 0.12}
        ax, below = figure.subplots(2, sharex=True, gridspec_kw=spaces)
        for column, label, colour, style in drawn:
            ax.plot(
                train["epoch"], train[column], color=colour, linestyle=style, marker=marker,
                markersize=3, label=label,
            )  # fmt: skip
        below.plot(train["epoch"], train["loss"], color=MUTED, marker=marker, markersize=3)
        for each in (ax, below):
            each.grid(axis="y")
            each.axvline(best, color=INK, linewidth=0.8)
            for problem in problems:
                each.axvline(problem["epoch"], color=VERMILION, linewidth=0.8, linestyle="--")
        ax.annotate(
            f"best: {best}", (best, 1), (0, 2), textcoords="offset points", ha="center",
            xycoords=("data", "axes fraction"),
        )  # fmt: skip
        _shares(ax)
        below.set_ylim(bottom=min(0, float(train["loss"].min())))
        below.set_ylabel("loss")
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1.11), ncols=2)
    found = "; ".join(f"{one['problem']} in epoch {one['epoch']}" for one in problems)
    return Picture(
        "training", "Training",
        f"Accuracy and loss after each epoch. The weights of epoch {best} were evaluated: they "
        "have the highest attacked accuracy on the validation split, or are the last without one. "
        + (f"Dashed lines: {found}." if found else "Nothing went wrong."),
        f"Lines over {len(train)} epochs; the best one is {best}. "
        + (f"Problems: {found}." if found else "No problems."),
        figure, train[["epoch", "loss", *(course[0] for course in drawn)]],
    )  # fmt: skip


def by_class(tables: Tables) -> Picture:
    """Accuracy of each class, clean and in the worst case."""
    counted = class_accuracies(tables)
    shown = counted.sort_values("attacked", kind="stable").head(CLASSES)
    shown = shown if len(counted) > CLASSES else counted
    names = [_short(name) for name in shown["class"]]
    height = 0.8 + 0.21 * len(shown)
    with styled():
        figure, ax = axes(WIDTH, max(1.6, height), _room(1, names, below=0.3))
        ax.grid(visible=False, axis="y")
        ax.grid(axis="x")
        rows = np.arange(len(shown))
        ax.hlines(rows, shown["attacked"], shown["clean"], color=RULE, linewidth=2.5)
        ax.hlines(rows, shown["ci_low"], shown["ci_high"], color=VERMILION, linewidth=0.8)
        ax.plot(
            shown["clean"], rows, "o", color=BLUE, markersize=7, markerfacecolor="none",
            label="clean",
        )  # fmt: skip
        ax.plot(
            shown["attacked"], rows, "s", color=VERMILION, markersize=3.5,
            label="under attack, 95 % interval",
        )  # fmt: skip
        ax.set_yticks(rows, names)
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.set_xlim(-0.02, 1.02)
        in_percent(ax, "x")
        legend_above(ax)
    lowest = counted.iloc[int(counted["attacked"].argmin())]
    first = f" The {CLASSES} classes that suffer most are drawn." * (len(counted) > CLASSES)
    return Picture(
        "classes", "Accuracy of each class",
        "An image counts as correct under attack only if no attack of the run broke it." + first,
        f"Two dots for each class. Under attack {lowest['class']} is the weakest, with "
        f"{percent(lowest['attacked'])} of {lowest['n']} images.",
        figure, counted,
    )  # fmt: skip


def class_accuracies(tables: Tables) -> pd.DataFrame:
    """A row for each class with images: its accuracies, and the interval of the attacked one."""
    samples = tables.samples
    right = samples["clean_prediction"] == samples["label"]
    groups = pd.DataFrame(
        {"label": samples["label"], "clean": right, "left": samples["broken_by"] == ""}
    ).groupby("label")
    rows = []
    for label, group in groups:
        n, left = len(group), int(group["left"].sum())
        low, high = wilson(left, n)
        rows.append(
            {
                "class": tables.class_name(int(str(label))), "n": n,
                "clean": group["clean"].mean(), "attacked": left / n,
                "ci_low": low, "ci_high": high,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def confusion(tables: Tables) -> Picture:
    """What each class is taken for under attack."""
    samples = tables.samples
    if "worst_prediction" not in samples:
        raise Missing(
            "The confusion under attack is missing: an earlier version wrote samples.csv, without "
            "the predicted class."
        )
    labels = sorted({*samples["label"], *samples["worst_prediction"]})
    counts = pd.crosstab(samples["label"], samples["worst_prediction"])
    counts = counts.reindex(index=[x for x in labels if x >= 0], columns=labels, fill_value=0)
    draw = _matrix if len(labels) <= CLASSES_IN_MATRIX else _pairs
    return draw(tables, counts)


def _matrix(tables: Tables, counts: pd.DataFrame) -> Picture:
    cells, names = counts.to_numpy(), [tables.class_name(int(c)) for c in counts.columns]
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    shown = [_short(name) for name in names]
    size, rotated = len(names), max(map(len, names)) > 3
    with styled():
        room = _room(0, shown, below=_width(shown) + 0.35 if rotated else 0.55)
        room = room._replace(left=room.left + 0.2)
        figure = blank(WIDTH, 0.28 * len(counts) + room.bottom + room.top, room)
        ax = figure.add_subplot()
        for row, label in enumerate(counts.index):
            for column, predicted in enumerate(counts.columns):
                if cells[row, column]:
                    colour = BLUE if label == predicted else VERMILION
                    ax.add_patch(_cell(column, row, colour, shares[row, column]))
                    ax.text(
                        column, row, str(cells[row, column]), ha="center", va="center", fontsize=8
                    )
        ax.set_xticks(range(size), shown, rotation=90 if rotated else 0)
        ax.set_yticks(range(len(counts)), [_short(tables.class_name(int(c))) for c in counts.index])
        ax.set_xlim(-0.5, size - 0.5)
        ax.set_ylim(len(counts) - 0.5, -0.5)
        ax.set_xlabel("predicted under attack")
        ax.set_ylabel("true class")
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_color(RULE)
    errors = _errors(counts)
    top = errors.iloc[0]
    data = counts.rename(index=tables.class_name, columns=tables.class_name)
    data.columns = [f"predicted {name}" for name in data.columns]
    return Picture(
        "confusion", "What images are taken for under attack",
        "Number of images of a true class (rows) and of the class that the model predicts for what "
        "broke them (columns). Blue: no attack succeeded. The shade is the share of the row.",
        f"Matrix of {len(counts)} classes. The most frequent error takes "
        f"{tables.class_name(top['label'])} for {tables.class_name(top['predicted'])}, "
        f"{top['images']} times.",
        figure, data.reset_index(names="true class"),
    )  # fmt: skip


def _cell(column: int, row: int, colour: str, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.47, row - 0.47), 0.94, 0.94, facecolor=colour, alpha=0.12 + 0.55 * share
    )


def _pairs(tables: Tables, counts: pd.DataFrame) -> Picture:
    errors = _errors(counts)
    top = errors[errors["images"] > 0].head(PAIRS)
    names = [
        f"{_short(tables.class_name(label))} → {_short(tables.class_name(predicted))}"
        for label, predicted in zip(top["label"], top["predicted"], strict=True)
    ]
    with styled():
        figure, ax = axes(WIDTH, 0.8 + 0.21 * max(len(top), 3), _room(0, names))
        ax.grid(visible=False, axis="y")
        ax.grid(axis="x")
        ax.barh(range(len(top)), top["images"], height=0.65, color=VERMILION)
        ax.set_yticks(range(len(top)), names)
        ax.set_ylim(len(top) - 0.4, -0.6)
        ax.set_xlabel("images")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return Picture(
        "confusion", "What images are taken for under attack",
        f"The {len(top)} most frequent confusions: true class → class that the model predicts for "
        "what broke the image.",
        f"Bars. The longest is {names[0]}, {top['images'].iloc[0]} images." if names else "None.",
        figure, pd.DataFrame({"confusion": names, "images": top["images"].to_numpy()}),
    )  # fmt: skip


def _errors(counts: pd.DataFrame) -> pd.DataFrame:
    """A row for each true and wrongly predicted class, the most frequent pair first."""
    pairs = [
        {"label": int(label), "predicted": int(predicted), "images": int(images)}
        for label, row in zip(counts.index, counts.to_numpy(), strict=True)
        for predicted, images in zip(counts.columns, row, strict=True)
        if label != predicted
    ]
    return pd.DataFrame(pairs).sort_values("images", ascending=False, kind="stable")


def margins(tables: Tables) -> Picture:
    """The distribution of margins, clean and at the worst attacked point."""
    samples = tables.samples
    clean = samples["clean_margin"].to_numpy(float)
    names = [f"{attack}_margin" for attack in tables.attacks]
    worst = samples[["clean_margin", *names]].min(axis=1).to_numpy(float)
    finite = np.concatenate([clean, worst])
    edges = np.histogram_bin_edges(finite[np.isfinite(finite)], BINS)
    heights = [np.histogram(values, edges)[0] for values in (clean, worst)]
    with styled():
        figure, ax = axes(room=_room(1))
        for values, colour, label in zip(
            heights, (BLUE, VERMILION), ("clean", "under attack"), strict=True
        ):
            ax.stairs(values, edges, color=colour, fill=True, alpha=BAND)
            ax.stairs(values, edges, color=colour, linewidth=1.4, label=label)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set_xlabel("margin: score of the true class minus the best other one")
        ax.set_ylabel("images")
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend_above(ax)
    data = {"from": edges[:-1], "to": edges[1:], "clean": heights[0], "attacked": heights[1]}
    return Picture(
        "margins", "Margins",
        "How far images are from another class. Left of the line the model is wrong. Under attack "
        "an image counts with the smallest margin that an attack found.",
        f"Two histograms. The median margin is {np.median(clean):.3g} clean and "
        f"{np.median(worst):.3g} under attack.",
        figure, pd.DataFrame(data),
    )  # fmt: skip


def sizes(tables: Tables) -> Picture:
    """How many images each attack broke with perturbations up to a size."""
    samples, shares = tables.samples, np.linspace(0, 1, SIZES)
    right = samples["clean_prediction"] == samples["label"]
    lines = {}
    for attack in tables.attacks:
        eps = float(tables.attack_row(attack)["eps"])
        took = right & (samples[f"{attack}_broken"] == 1)
        used = samples.loc[took, f"{attack}_size"].to_numpy(float)
        if len(used) and eps > 0 and math.isfinite(eps):
            within = used[:, None] <= shares * eps * ROUNDING
            lines[attack] = within.sum(0)
    if not lines:
        raise Missing("Sizes of perturbations are missing: no attack broke an image.")
    with styled():
        figure, ax = axes(room=_room(math.ceil(len(lines) / 3)))
        for (attack, count), colour in zip(lines.items(), CYCLE * len(lines), strict=False):
            ax.plot(
                shares, count, color=colour, drawstyle="steps-post", marker="o",
                markevery=[SIZES - 1], label=_short(attack),
            )  # fmt: skip
        in_percent(ax, "x")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("size of the perturbation, in % of the radius of the attack")
        ax.set_ylabel("images broken")
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend_above(ax)
    most = max(lines, key=lambda attack: lines[attack][-1])
    return Picture(
        "sizes", "Sizes of perturbations",
        "Images that each attack broke with perturbations up to a size. Attacks that maximise the "
        "loss use their whole radius. Attacks that look for the smallest perturbation do not.",
        f"A rising line for each of {len(lines)} attacks. {most} broke {lines[most][-1]} images, "
        f"{lines[most][SIZES // 2]} of them within half of its radius.",
        figure, pd.DataFrame({"share of eps": shares, **lines}),
    )  # fmt: skip


def in_order(tables: Tables) -> Picture:
    """What each attack took, in the order in which they ran."""
    samples = tables.samples
    n, first = len(samples), samples["broken_by"]
    names = [CLEAN, *tables.attacks]
    taken = [int((first == name).sum()) for name in names]
    left = n - np.cumsum(taken)
    labels = ["misclassified", *map(_short, tables.attacks), "left"]
    with styled():
        figure, ax = axes(WIDTH, max(1.7, 0.85 + 0.26 * len(labels)), _room(0, labels))
        ax.grid(visible=False, axis="y")
        ax.grid(axis="x")
        rows = np.arange(len(names))
        ax.barh(rows, left, height=0.62, color=GREY, alpha=0.35)
        ax.barh(rows, taken, height=0.62, left=left, color=VERMILION)
        ax.barh(len(names), left[-1], height=0.62, color=BLUE)
        for row, (count, rest) in enumerate(zip(taken, left, strict=True)):
            if count:
                ax.text(rest + count + 0.012 * n, row, f"−{count}", va="center", fontsize=8)
        ax.text(left[-1] + 0.012 * n, len(names), str(left[-1]), va="center", fontsize=8)
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(names) + 0.6, -0.6)
        ax.set_xlim(0, 1.08 * n)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlabel("images")
    data = {"attack": names, "took": taken, "left": left}
    return Picture(
        "attacks", "What each attack took",
        f"Of {n} images, from top to bottom in the order in which the attacks ran: those that an "
        "attack broke first (red) and those that were then left (grey).",
        f"Bars that shrink from {n} to {left[-1]} images. {taken[0]} are misclassified without an "
        "attack. " + ", ".join(f"{a} took {t}" for a, t in zip(names[1:], taken[1:], strict=True)),
        figure, pd.DataFrame(data),
    )  # fmt: skip


def certified(tables: Tables) -> Picture:
    """Certified accuracy against the radius, with attacks beside it."""
    images = certificates(tables)
    points = curve_of(tables, "certified", "nothing was certified").sort_values("eps")
    norm = certified_norm(points)
    right = (images["predicted"] == images["label"]) & ~images["abstained"].astype(bool)
    radii = np.sort(images.loc[right, "radius"].to_numpy(float))
    x = np.concatenate([[0.0], radii])
    # At a radius every image counts that is certified at it or beyond.
    y = np.concatenate([[len(radii)], np.arange(len(radii), 0, -1)]) / len(images)
    found = [row for row in tables.worst if row["norm"] == norm]
    with styled():
        figure, ax = axes(room=_room(3))
        ax.plot([*x, x[-1]], [*y, 0.0], color=BLUE, drawstyle="steps-pre", label="certified")
        _bars(ax, points, BLUE, "o", None)
        _measured(ax, pd.DataFrame(found), "worst case of all attacks")
        _attacked_curve(ax, tables, norm)
        ax.set_xlabel(f"radius ({norm}; pixels range from 0 to 1)")
        _shares(ax)
        legend_above(ax, 1)
    return Picture(
        "certified", "Certified accuracy, and attacks beside it",
        f"Share of {len(images)} images that no perturbation up to the radius can change, which is "
        "a lower bound of the robust accuracy. Attacks are an upper bound: the truth lies between.",
        f"Falling steps from {percent(y[0])} at radius 0; no image is certified beyond "
        f"{x[-1]:.3g}.",
        figure, pd.DataFrame({"radius": x, "certified": y}),
    )  # fmt: skip


# The colours of the parts of a bar of statuses, in the order of `stages`.
STATUSES = (GREY, VERMILION, BLUE, SKY, GREEN, ORANGE)


def status(tables: Tables) -> Picture:
    """How many images are wrong, broken, proven, and undecided, as one bar."""
    samples = tables.samples
    if "status" not in samples:
        raise Missing("Proofs are missing: the run verified nothing (evaluation=verified).")
    counts = stages(samples)
    with styled():
        figure, ax = axes(WIDTH, 2.3, _room(6))
        ax.grid(visible=False, axis="y")
        left = 0
        for (name, count), colour in zip(counts.items(), STATUSES, strict=True):
            ax.barh(0, count, height=0.7, left=left, color=colour, label=f"{name}: {count}")
            left += count
        ax.set_yticks([])
        ax.set_xlim(0, left)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlabel("images")
        legend_above(ax, 1)
    return Picture(
        "status", "What is known of each image",
        f"Each of {left} images has one status. Attacks broke some. Of the others, bounds or "
        "branching proved that no perturbation within the threat model changes the prediction. "
        "The true robust accuracy is between the proven images and these with the undecided ones.",
        "A bar in parts: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".",
        figure, pd.DataFrame({"status": [*counts], "images": [*counts.values()]}),
    )  # fmt: skip


def _room(legend: int, labels: Sequence[str] = (), *, below: float = 0.5) -> Room:
    """Space for a legend of so many lines, and for the labels of rows, if there are any."""
    left = 0.2 + _width(labels) if labels else 0.62
    return Room(left=left, right=0.2, bottom=below, top=0.12 + 0.19 * legend)


def _width(labels: Sequence[str]) -> float:
    """Inches that the longest of some labels needs."""
    return 0.075 * max(map(len, labels), default=0)


def _attacked_curve(ax: Axes, tables: Tables, norm: str) -> None:
    try:
        points = curve_of(tables, "eps", NO_AUDIT)
    except Missing:
        return
    points = points[points["norm"] == norm].sort_values("eps")
    ax.plot(
        points["eps"], points["accuracy"], color=ORANGE, marker="o", markersize=3,
        label="gradient attack of the audit",
    )  # fmt: skip


def _norms(points: pd.DataFrame) -> list[str]:
    """The norms of a curve, in order of appearance in its file."""
    return list(dict.fromkeys(points.sort_index()["norm"].astype(str)))


def _each(points: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The points of each norm, with ` in NORM` where there are several."""
    norms = _norms(points)
    for norm in norms:
        yield f" in {norm}" if len(norms) > 1 else "", points[points["norm"] == norm]


def _lines(norms: Sequence[str]) -> int:
    """Lines of a legend that is only needed to tell several norms apart."""
    return 1 if len(norms) > 1 else 0


def _legend(ax: Axes, norms: Sequence[str]) -> None:
    if len(norms) > 1:
        legend_above(ax, len(norms))


def _of_norm(norms: Sequence[str]) -> list[str]:
    """The column that tells several norms apart."""
    return ["norm"] if len(norms) > 1 else []


def _bands(ax: Axes, points: pd.DataFrame, x: str, labels: Sequence[str]) -> None:
    """A line for each norm, by these labels; without one for a single norm."""
    for norm, label, colour in zip(_norms(points), labels, CYCLE, strict=False):
        own = points[points["norm"] == norm]
        _band(ax, own, x, colour, label if len(labels) > 1 else None)


def _band(ax: Axes, points: pd.DataFrame, x: str, colour: str, label: str | None) -> None:
    """A line with markers, and its interval around it."""
    ax.fill_between(
        points[x], points["ci_low"], points["ci_high"], color=colour, alpha=BAND, linewidth=0
    )
    ax.plot(points[x], points["accuracy"], color=colour, marker="o", label=label)


def _measured(ax: Axes, rows: pd.DataFrame, label: str) -> None:
    """Accuracies of `report.csv` with their intervals."""
    if len(rows):
        _bars(ax, rows, VERMILION, "s", label)


def _bars(ax: Axes, rows: pd.DataFrame, colour: str, marker: str, label: str | None) -> None:
    ends = rows["accuracy"] - rows["ci_low"], rows["ci_high"] - rows["accuracy"]
    ax.errorbar(
        rows["eps"], rows["accuracy"], yerr=[end.clip(lower=0) for end in ends], color=colour,
        fmt=marker, capsize=2.5, elinewidth=1, label=label, zorder=3,
    )  # fmt: skip


def _shares(ax: Axes) -> None:
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    in_percent(ax)
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(6))


def _logarithmic(ax: Axes, ticks: pd.Series) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())


def _short(name: str) -> str:
    """A name that leaves room for the figure, without control characters."""
    shown = printable(name)
    return shown if len(shown) <= 16 else f"{shown[:15]}…"


FIGURES: Mapping[str, Callable[[Tables], Picture]] = {
    "eps": over_eps,
    "steps": over_steps,
    "draws": over_draws,
    "radii": radii,
    "training": training,
    "classes": by_class,
    "confusion": confusion,
    "margins": margins,
    "sizes": sizes,
    "attacks": in_order,
    "certified": certified,
    "status": status,
}
"""Every figure by its name; each raises `Missing` where the run has nothing to draw."""
