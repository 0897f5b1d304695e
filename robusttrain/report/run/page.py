"""The page of a run, made of the files in its directory and of nothing else."""

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from robusttrain.errors import InputError
from robusttrain.report.checks import titled
from robusttrain.report.files import intact
from robusttrain.report.page import document
from robusttrain.report.page.figures import Picture
from robusttrain.report.page.formats import duration, interval, percent
from robusttrain.report.page.formats import figure as number
from robusttrain.report.run.advice import advice
from robusttrain.report.run.figures import FIGURES
from robusttrain.report.run.gallery import gallery
from robusttrain.report.run.tables import Missing, Tables
from robusttrain.run_directory import AUDIT, PAGE, PLOTS

# What stands together in the page.
ACCURACY = ("eps", "radii", "attacks", "status", "classes", "confusion", "margins", "sizes")

VERDICTS = {
    "pass": "No check found a sign that the attacks were too weak.",
    "warn": "Look closer before you quote the worst case.",
    "fail": "Do not quote the worst case: it is probably too high.",
    "none": "Nothing was audited: attacks that fail and a model that is robust look the same.",
}


def write_page(
    run_dir: Path, path: Path | None = None, formats: Collection[str] = ("png", "svg")
) -> Path:
    """Write the page of a run, and its figures to the folder `plots` beside the page.

    Parameters
    ----------
    run_dir
        The directory of the run.
    path
        Where the page is written; `report.html` in the directory if not given.
    formats
        The formats of the figures: png, svg and pdf.

    Raises
    ------
    InputError
        If the directory has no results, or those of several runs, or damaged ones.
    """
    path = run_dir / PAGE if path is None else path
    tables = Tables.read(run_dir)
    pictures, reasons = drawn(tables)
    if formats:
        plots = path.parent / PLOTS
        plots.mkdir(parents=True, exist_ok=True)
        for picture in pictures.values():
            picture.save(plots, formats)
    document.write(path, _page(tables, pictures, reasons))
    return path


def figure(run_dir: Path, name: str) -> Figure:
    """A figure of a run, by its name in `FIGURES`.

    Raises
    ------
    InputError
        If there is no figure of this name, or the run has nothing to draw in it.
    """
    if name not in FIGURES:
        raise InputError("figure", name, f"one of {', '.join(FIGURES)}")
    tables = Tables.read(run_dir)
    try:
        with intact(run_dir):
            return FIGURES[name](tables).figure
    except Missing as missing:
        problem = "cannot be drawn"
        raise InputError("figure", name, allowed=str(missing), problem=problem) from missing


def drawn(tables: Tables) -> tuple[dict[str, Picture], list[str]]:
    """The figures of a run by name, and why others are left out."""
    pictures, reasons = {}, []
    for name, make in FIGURES.items():
        try:
            with intact(tables.folder):
                pictures[name] = make(tables)
        except Missing as missing:
            reasons.append(str(missing))
    return pictures, reasons


def _page(tables: Tables, pictures: Mapping[str, Picture], reasons: list[str]) -> str:
    groups, left_out = [], list(reasons)
    with intact(tables.folder):
        try:
            groups = gallery(tables)
        except Missing as missing:
            left_out.append(str(missing))
        checks = _checks(tables)
        if not checks:
            left_out.append("There is no audit.csv: the run was not audited (evaluation.audit).")
        if not tables.manifest:
            left_out.append("There is no manifest.json: the run has not finished.")
        return document.render(
            "run/run.html",
            title=_title(tables),
            summary=_summary(tables, checks),
            pictures=pictures,
            accuracy=[pictures[name] for name in ACCURACY if name in pictures],
            report=_report(tables),
            groups=groups,
            checks=checks,
            training=tables.result.get("training") or {},
            unmet=[one for one in tables.result.get("requirements", []) if not one["met"]],
            provenance=_provenance(tables),
            configuration=_configuration(tables),
            command=shlex.join(map(str, tables.manifest.get("command", []))),
            left_out=list(dict.fromkeys(left_out)),
        )


def _title(tables: Tables) -> str:
    names = tables.names
    made = names.get("defense", "a model")
    model, data = names.get("model"), names.get("dataset")
    return made + (f", {model}" if model else "") + (f" on {data}" if data else "")


def _summary(tables: Tables, checks: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Five lines: a word, what is the case, and what that means."""
    return [
        _about_model(tables),
        _about_data(tables),
        *([_about_threat(tables), _about_accuracy(tables)] if tables.rows else []),
        *([_about_audit(tables, checks)] if tables.rows else []),
    ]


def _about_model(tables: Tables) -> tuple[str, str, str]:
    names = tables.names
    attack, noise = names.get("train_attack"), names.get("noise", "none")
    parts = [names.get("model", "unknown"), f"defense {names.get('defense', 'unknown')}"]
    parts += [f"training attack {attack}"] if attack else []
    parts += [f"noise {noise}"] if noise != "none" else []
    return "Model", ", ".join(parts), "The network, and the method that was to make it robust."


def _about_data(tables: Tables) -> tuple[str, str, str]:
    said = tables.names.get("dataset", "unknown")
    if tables.clean is not None:
        said += f", {tables.clean['n']} test images"
    classes = len(tables.class_names)
    meaning = f"A guess among {classes} classes is right in {percent(1 / classes)} of all cases."
    return "Data", said, meaning if classes else ""


def _about_threat(tables: Tables) -> tuple[str, str, str]:
    worst = tables.worst
    said = " and ".join(f"{row['norm']} up to {row['eps']:g}" for row in worst)
    limits = {
        "linf": "change every pixel by {eps:g}",
        "l2": "change an image by a Euclidean length of {eps:g}",
        "l1": "change all pixels together by {eps:g}",
    }
    ways = " or ".join(limits[row["norm"]].format(eps=row["eps"]) for row in worst)
    return "Threat", said, f"An attacker may {ways}, where pixels range from 0 to 1."


def _about_accuracy(tables: Tables) -> tuple[str, str, str]:
    clean, quoted = tables.clean, tables.quoted
    assert clean is not None, "a report begins with it"
    assert quoted is not None, "a report ends with it"
    said = (
        f"{percent(clean['accuracy'])} clean ({interval(clean)}), "
        f"{percent(quoted['accuracy'])} in the worst case ({interval(quoted)})"
    )
    n, right = quoted["n"], round(quoted["accuracy"] * quoted["n"])
    meaning = (
        f"Of {n} images, {round(clean['accuracy'] * clean['n'])} are classified correctly as they "
        f"are, and {right} whatever the attacks did. In brackets: 95 % intervals for other images "
        "of this kind. Stronger attacks can only lower the worst case."
    )
    return "Accuracy", said, meaning


def _about_audit(tables: Tables, checks: list[dict[str, Any]]) -> tuple[str, str, str]:
    assert tables.quoted is not None, "a report ends with it"
    verdict = str(tables.quoted.get("audit", "")) or "none"
    doubts = [one for one in checks if one["verdict"] != "pass"]
    said = f"{verdict}, {len(checks) - len(doubts)} of {len(checks)} checks pass" if checks else ""
    return "Audit", said or verdict, VERDICTS.get(verdict, "")


def _report(tables: Tables) -> pd.DataFrame | None:
    if not tables.rows:
        return None
    return pd.DataFrame(
        {
            "attack": row["attack"],
            "norm": row["norm"],
            "eps": row["eps"],
            "n": row["n"],
            "accuracy": percent(row["accuracy"], 2),
            "95 % interval": interval(row),
            "passes an image": _passes(row),
            "seconds": row.get("seconds"),
            "audit": row.get("audit", ""),
        }
        for row in tables.rows
    )


def _passes(row: Mapping[str, Any]) -> float:
    return float(row.get("forward", float("nan"))) + float(row.get("backward", float("nan")))


def _checks(tables: Tables) -> list[dict[str, Any]]:
    if AUDIT not in tables.tables:
        return []
    checks: list[Any] = tables.tables[AUDIT].to_dict("records")
    rows = titled(checks)
    # What needs attention first.
    order = {"fail": 0, "warn": 1, "pass": 2}
    rows.sort(key=lambda row: order.get(row["verdict"], 1))
    return [{**row, "advice": advice(row["check"])} for row in rows]


def _provenance(tables: Tables) -> list[tuple[str, str]]:
    """What the run was made of and with: names and values, those that are known."""
    manifest = tables.manifest
    git = manifest.get("git") or {}
    versions = manifest.get("versions", {})
    entries = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Python": manifest.get("python"),
        "platform": manifest.get("platform"),
        "device": _device(manifest),
        "commit": git.get("commit", "") + (", with changes" if git.get("dirty") else ""),
        "seed": tables.result.get("seed", (tables.clean or {}).get("seed")),
        **{f"{split} data": digest for split, digest in manifest.get("data", {}).items()},
        **{name: _cost(cost) for name, cost in manifest.get("cost", {}).items() if cost},
    }
    return [(name, number(value)) for name, value in entries.items() if value not in (None, "")]


def _device(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return ""
    name = manifest.get("device_name")
    device = f"{manifest.get('device')}" + (f" ({name})" if name else "")
    return f"{device}, {manifest.get('threads')} threads, {manifest.get('processes', 1)} processes"


def _cost(cost: Mapping[str, Any]) -> str:
    parts = [
        duration(cost.get("seconds")),
        f"{number(cost.get('images_per_second'))} images a second",
        f"{number(cost.get('passes'))} passes",
        f"{number(cost.get('peak_memory_mib'))} MiB at its peak",
    ]
    return ", ".join(parts)


def _configuration(tables: Tables) -> str:
    """The configuration as the manifest has it, or else as Hydra has saved it."""
    if "configuration" in tables.manifest:
        return json.dumps(tables.manifest["configuration"], indent=2)
    saved = tables.folder / ".hydra" / "config.yaml"
    return saved.read_text() if saved.is_file() else ""
