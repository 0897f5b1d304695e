"""A run whose files are written by hand, so that every point of its figures is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robusttrain.report.ledger import wilson

# Whatever names a run contains, a page shows them as text.
HOSTILE = '</script><img src=x onerror="alert(1)">'
ESCAPE = "\x1b[31mred"
CLASSES = ["cat", HOSTILE, ESCAPE]

#         image: 0     1     2     3     4     5     6     7     8     9
LABEL = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
CLEAN = [0, 0, 0, 1, 1, 1, 1, 1, 2, 0]
MARGIN = [4.0, 3.0, 2.0, -1.0, 5.0, 2.5, 1.5, 3.5, 4.5, -2.0]
WORST = [0, 1, 2, 1, 1, 1, 0, 0, 2, 0]
BY = ["", "fgsm", "fab", "clean", "", "", "fgsm", "fgsm", "", "clean"]
STATUS = [
    "proven", "broken", "broken", "wrong", "proven", "proven", "broken", "broken", "undecided",
    "wrong",
]  # fmt: skip
PROVEN_BY = ["intervals", "", "", "", "linear bounds", "branching", "", "", "", ""]
# Attacks are run on what is left, and fab finds smaller perturbations than its radius.
BROKEN = {
    "fgsm": [0, 1, 0, None, 0, 0, 1, 1, 0, None],
    "fab": [0, None, 1, None, 0, 0, None, None, 0, None],
}
MARGINS = {
    "fgsm": [2.0, -1.5, 0.5, None, 3.0, 1.0, -0.5, -2.5, 3.0, None],
    "fab": [1.0, None, -0.1, None, 2.0, 0.2, None, None, 2.2, None],
}
SIZES = {
    "fgsm": [0.1, 0.1, 0.1, None, 0.1, 0.1, 0.1, 0.1, 0.1, None],
    "fab": [0.1, None, 0.04, None, 0.1, 0.1, None, None, 0.1, None],
}
EPS = 0.1


def samples() -> pd.DataFrame:
    """`samples.csv`."""
    columns: dict[str, Any] = {
        "index": range(10), "label": LABEL, "clean_prediction": CLEAN, "clean_margin": MARGIN,
    }  # fmt: skip
    for attack in BROKEN:
        columns |= {
            f"{attack}_broken": BROKEN[attack],
            f"{attack}_margin": MARGINS[attack],
            f"{attack}_size": SIZES[attack],
        }
    verified = {
        "status": STATUS, "proven": [int(by != "") for by in PROVEN_BY], "proven_by": PROVEN_BY,
        "proof_seconds": [0.5 if by else None for by in PROVEN_BY],
        "undecided_because": ["time" if one == "undecided" else "" for one in STATUS],
    }  # fmt: skip
    return pd.DataFrame({**columns, **verified, "broken_by": BY, "worst_prediction": WORST})


def report() -> pd.DataFrame:
    """`report.csv`."""
    rows = [("clean", 0.0, 8, ""), ("fgsm", EPS, 5, ""), ("fab", EPS, 4, "")]
    rows += [("worst_case", EPS, 4, "warn")]
    names = {
        "dataset": "toy", "model": "mlp", "defense": "madry", "train_attack": "pgd-10",
        "noise": "none", "seed": 3,
    }  # fmt: skip
    return pd.DataFrame(
        {
            **names, "attack": attack, "norm": "linf", "eps": eps, "n": 10, "accuracy": right / 10,
            "ci_low": wilson(right, 10)[0], "ci_high": wilson(right, 10)[1], "forward": 3.0,
            "backward": 2.0, "seconds": 0.5, "invalid": 0, "audit": audit,
        }
        for attack, eps, right, audit in rows
    )  # fmt: skip


def points(curve: str, key: str, values: list[float], right: list[int]) -> pd.DataFrame:
    """A curve of `curve.csv` on ten images."""
    rows = [
        {"curve": curve, "steps": 20, "eot": 1, "norm": "linf", "eps": EPS, "n": 10}
        | {key: value, "accuracy": count / 10}
        | dict(zip(("ci_low", "ci_high"), wilson(count, 10), strict=True))
        for value, count in zip(values, right, strict=True)
    ]
    return pd.DataFrame(rows)


def curve() -> pd.DataFrame:
    """`curve.csv` with every kind of curve."""
    return pd.concat(
        [
            points("eps", "eps", [0.0, 0.05, 0.1, 0.2], [8, 6, 4, 1]),
            points("steps", "steps", [1, 5, 20], [6, 5, 4]),
            points("eot", "eot", [1, 5, 20], [7, 5, 4]),
            points("certified", "eps", [0.0, 0.05, 0.1], [6, 4, 2]),
            points("radii", "eps", [0.0, 0.05, 0.1, 0.2], [8, 6, 4, 0]),
            points("proven", "eps", [0.05, 0.1, 0.2], [5, 2, 0]),
        ]
    )


def audit() -> pd.DataFrame:
    """`audit.csv` with a check of each verdict."""
    rows = [
        ("accuracy rises with eps by", 0.0, "5 / -", "pass"),
        ("one step beats many by", 7.5, "5 / -", "warn"),
        ("invalid adversarial images", 2.0, "0", "fail"),
    ]
    return pd.DataFrame(rows, columns=["check", "figure", "threshold", "verdict"])


def certified() -> pd.DataFrame:
    """`certified.csv`: three images whose class is proven correctly."""
    return pd.DataFrame(
        {
            "index": range(5), "label": [0, 0, 1, 1, 2], "predicted": [0, 0, 1, 0, 2],
            "radius": [0.12, 0.05, 0.07, 0.2, 0.0], "abstained": [False] * 4 + [True],
            "seconds": [1.0] * 5,
        }
    )  # fmt: skip


def train() -> pd.DataFrame:
    """`train.csv`: the second of four epochs is the best."""
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4], "seconds": [1.0] * 4, "lr": [0.1] * 4,
            "loss": [2.0, 1.5, 1.25, 1.0], "train_clean_accuracy": [None] * 4,
            "train_robust_accuracy": [0.2, 0.4, 0.5, 0.6],
            "val_clean_accuracy": [0.5, 0.7, 0.8, 0.9], "val_robust_accuracy": [0.2, 0.5, 0.4, 0.3],
            "non_finite": [0] * 4, "train_pgd_accuracy": [0.3, 0.4, 0.1, 0.0], "rollbacks": [0] * 4,
            "overfit": [False, False, True, True],
        }
    )  # fmt: skip


def gallery() -> dict[str, Any]:
    """`gallery.npz` with an image of each group."""
    clean = np.zeros((3, 1, 2, 2), np.uint8)
    clean[:, 0, 0, 0] = 51
    perturbation = np.zeros((3, 1, 2, 2), np.float16)
    perturbation[:, 0, 0, 1] = 0.04
    return {
        "group": np.array(["broken", "confident", "resisted"]), "index": np.array([2, 7, 4]),
        "label": np.array([0, 1, 1]), "clean_prediction": np.array([0, 1, 1]),
        "clean_margin": np.array([2.0, 3.5, 5.0]), "prediction": np.array([2, 0, 1]),
        "margin": np.array([-0.1, -2.5, 2.0]), "size": np.array([0.04, 0.1, 0.1]),
        "norm": np.array("linf"), "eps": np.array(EPS), "clean": clean,
        "perturbation": perturbation,
    }  # fmt: skip


MESSAGE = f"the accuracy fell, {HOSTILE} {ESCAPE}"

RESULT = {
    "training": {
        "findings": [{"problem": "catastrophic overfitting", "epoch": 3, "message": MESSAGE}]
    },
    "requirements": [
        {
            "key": "evaluation.require.worst_case", "figure": "worst_case",
            "threat": "linf, eps 0.1",
            "value": 0.4, "required": 0.5, "met": False,
        },
    ],
    "names": {"dataset": "toy", "model": "mlp"}, "seed": 3,
}  # fmt: skip

MANIFEST = {
    "command": ["robusttrain", f"model.name={HOSTILE}", ESCAPE],
    "configuration": {"norm": "linf", "name": HOSTILE}, "versions": {"torch": "2.9"},
    "python": "3.12", "git": {"commit": "0123abc", "dirty": True, "diff": ""},
    "device": "cpu", "device_name": None, "threads": 1, "processes": 1,
    "data": {"train": "aaa", "test": "bbb"},
    "cost": {
        "training": {
            "seconds": 90.0, "images_per_second": 1234.5, "passes": 9000, "peak_memory_mib": 300,
        },
    },
    "dataset": {"classes": {name: {"train": 5, "test": 3} for name in CLASSES}},
}  # fmt: skip

TABLES = {
    "report": report, "samples": samples, "curve": curve, "audit": audit, "certified": certified,
    "train": train,
}  # fmt: skip


def write_run(folder: Path, **changed: pd.DataFrame | None) -> Path:
    """A run with every file, or with other tables; one that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in TABLES.items():
        table = changed.get(name, make())
        if table is not None:
            table.to_csv(folder / f"{name}.csv", index=False)
    np.savez(folder / "gallery.npz", **gallery())
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder
