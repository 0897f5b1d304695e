"""The rows as Markdown, and what they come to."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

START, END = "<!-- maskings: start -->", "<!-- maskings: end -->"
# How many points a worst case may be above the truth, and be believed.
TOLERANCE = 5


def progress(row: Mapping[Any, object]) -> str:
    """A line about a row that is done."""
    figures = " ".join(f"{key} {_percent(row[key])}" for key in ("clean", "truth", "worst_case"))
    seconds = f"{row['seconds_truth']} + {row['seconds_evaluation']} CPU s"
    return f"{row['kind']} {row['model']} {row['norm']}: {figures} {row['audit']} ({seconds})"


def markdown(table: pd.DataFrame) -> str:
    """The table, and its summary above it."""
    lines = [summary(table), ""]
    for kind, part in table.groupby("kind", sort=False):
        head = ("model", "norm", "eps", "suite", "clean", "truth", "worst case", "audit", "checks")
        lines += [f"### {str(kind).capitalize()}", "", _line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(row)) for row in part.to_dict("records")]
        lines.append("")
    return "\n".join(lines)


def _cells(row: Mapping[Any, object]) -> list[str]:
    shares = [_percent(row[key]) for key in ("clean", "truth", "worst_case")]
    name = f"`{row['model']}`" + (" (!)" if row["kind"] == "planted" and missed(row) else "")
    checks = str(row["checks"]).replace("|", "\\|")
    return [name, str(row["norm"]), f"{row['eps']:g}", str(row["suite"]), *shares,
            str(row["audit"]), checks]  # fmt: skip


def missed(row: Mapping[Any, object]) -> bool:
    """Whether the worst case is far above the truth, and the audit does not fail."""
    gap = 100 * (float(str(row["worst_case"])) - float(str(row["truth"])))
    return gap > TOLERANCE + 1e-9 and row["audit"] in ("pass", "warn")


def summary(table: pd.DataFrame) -> str:
    """What the rows come to, in words, a line each."""
    lines = []
    for kind, part in table.groupby("kind", sort=False):
        verdicts = part.audit.value_counts()
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        lines.append(f"{len(part)} {kind} rows: {counts}.")
    records = table.to_dict("records")
    for verdict in ("pass", "warn"):
        found = [
            r for r in records if r["kind"] == "planted" and missed(r) and r["audit"] == verdict
        ]
        lines.append(
            f"Planted, {verdict}, with a worst case more than {TOLERANCE} points above the truth: "
            f"{_named(found)}."
        )
    for verdict in ("warn", "fail", "refused", "error"):
        found = [r for r in records if r["kind"] == "honest" and r["audit"] == verdict]
        lines.append(f"Honest, {verdict}: {_named(found)}.")
    return "  \n".join(lines)


def _named(rows: Sequence[Mapping[Any, object]]) -> str:
    return ", ".join(f"`{row['model']}` ({row['norm']})" for row in rows) or "none"


def replaced(page: str, table: str) -> str:
    """The page with what is between its marks replaced by the table."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{table}\n{END}{after}"


def _percent(share: object) -> str:
    number = 100 * float(str(share))
    return "" if number != number else f"{number:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
