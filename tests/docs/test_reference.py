"""The manual's tables of files, columns, checks and options, against real runs and the code."""

import json
import math
import re
import shutil
import signal
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.exit_codes import ExitCode, of_signal
from toys.command_line import CommandLine
from toys.manual import MANUAL, ROOT, rows, section

FILES = MANUAL / "reference" / "files.md"
TINY = [
    "dataset=synthetic", "dataset.train_size=80", "dataset.validation=16", "dataset.test_size=24",
    "epochs=2", "batch_size=64", "evaluation.samples=12", "evaluation.probe_samples=4",
    "device=cpu",
]  # fmt: skip
RUNS = {
    "plain": [
        *TINY, "defense=madry", "model=mlp", "evaluation=quick", "evaluation.verify=true",
        "evaluation.save_adversarial=true", "training.keep=last",
        # Of another radius, so that there is a union.
        "+attack@evaluation.attacks.near=fgsm", "evaluation.attacks.near.eps=0.05",
    ],
    "noisy": [
        *TINY, "defense=alpha_mix", "attack=fgsm", "model=mlp", "noise=gaussian",
        "noise.predict=true", "norm=l2", "evaluation=certify", "evaluation.eot=2",
        "evaluation.votes=5", "evaluation.certification.n=200", "evaluation.audit=true",
    ],
    "radii": [
        *TINY, "defense=madry", "model=mlp", "evaluation=radii", "evaluation.survivors_only=false",
        "~evaluation.attacks.apgd_t", "~evaluation.attacks.square",
        "~evaluation.attacks.apgd_margin", "evaluation.attacks.apgd_ce.steps=5",
        "evaluation.attacks.apgd_ce.restarts=1", "evaluation.radii.attacks.fmn.steps=10",
        "evaluation.radii.resolution=1", "evaluation.radii.largest=1", "eps=0.05",
    ],
}  # fmt: skip
SWEEP = ["-m", *TINY, "evaluation=quick", "evaluation.audit=false", "model=linear"]


@pytest.fixture(scope="module")
def left(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the runs, a sweep with failed jobs, and two comparisons."""
    folder = tmp_path_factory.mktemp("left")
    for name, words in RUNS.items():
        answer = command_line.run(*words, f"hydra.run.dir={name}", cwd=folder)
        assert answer.code == 0, answer.said
    jobs = ["defense=standard,fgsm", "optimizer.lr=0.01,-1", "hydra.sweep.dir=sweep"]
    assert command_line.run(*SWEEP, *jobs, cwd=folder).code == 1
    compared = command_line.run("compare", "sweep/0", "sweep/2", "--csv", "pairs.csv", cwd=folder)
    assert compared.code == 0, compared.said
    shutil.copytree(folder / "radii", folder / "copy")
    words = ["radii", "copy", "--radii-csv", "radii_pairs.csv"]
    compared = command_line.run("compare", *words, cwd=folder)
    assert compared.code == 0, compared.said
    return folder


def documented(name: str) -> dict[str, dict[str, str]]:
    """The rows of the table under the heading `name`, by column."""
    found = rows(section(FILES, name))
    first = next(iter(found[0]))
    return {row[first].strip("`"): row for row in found}


def expanded(columns: dict[str, dict[str, str]], written: list[str]) -> dict[str, dict[str, str]]:
    """The rows, with one for each column that ATTACK or KEY stands for."""
    found = {}
    for name, row in columns.items():
        if "ATTACK" in name:
            end = name.removeprefix("ATTACK")
            found |= {each: row for each in written if each.endswith(end) and each != f"clean{end}"}
        elif name == "KEY":
            found |= dict.fromkeys(("defense", "optimizer.lr"), row)
        else:
            found[name] = row
    return found


# What numbers of a unit may be, unless the row says something else.
UNITS = {
    "share": (0, 1), "pixels, 0 to 1": (0, math.inf),
    "pixels, in the norm of the noise": (0, math.inf),
    "s": (0, math.inf), "images": (0, math.inf), "passes": (0, math.inf), "steps": (0, math.inf),
    "draws": (1, math.inf), "MiB": (1, math.inf), "images/s": (0, math.inf),
}  # fmt: skip

# Differences and their intervals.
SIGNED = ("first minus second", "end of its 95 % interval", "upper end")


def kinds(row: dict[str, str], values: "pd.Series[str]") -> bool:
    """Whether values have the type and the range that a row states."""
    if row["type"] == "integer" and not values.str.fullmatch(r"-?\d+(\.0)?").all():
        return False
    if row["type"] in ("integer", "number"):
        low, high = UNITS.get(row["unit"], (-math.inf, math.inf))
        low = -1 if any(words in row["meaning"] for words in SIGNED) else low
        return bool(values.astype(float).between(low, high).all())
    if row["type"] == "0 or 1":
        return bool(values.isin(["0", "1"]).all())
    if row["type"] == "True or False":
        return bool(values.isin(["True", "False"]).all())
    return row["type"] == "text"


TABLES = {
    "train.csv": ["plain", "noisy"],
    "report.csv": ["plain", "noisy", "sweep/0"],
    "samples.csv": ["plain", "noisy", "sweep/0"],
    "curve.csv": ["plain", "noisy", "radii"],
    "audit.csv": ["plain", "noisy"],
    "certified.csv": ["noisy"],
    "radii.csv": ["radii"],
    "sweep.csv": ["sweep"],
    "sweep_pairs.csv": ["sweep"],
    "pairs.csv": ["."],
    "radii_pairs.csv": ["."],
}


@pytest.mark.parametrize(
    ("name", "folder"), [(name, folder) for name, folders in TABLES.items() for folder in folders]
)
def test_columns_are_those_that_the_manual_explains(left: Path, name: str, folder: str) -> None:
    table = pd.read_csv(left / folder / name, dtype=str, keep_default_na=False)
    columns = expanded(documented(name), list(table))
    # Only images of the plain run are verified.
    if name == "samples.csv" and folder != "plain":
        for of_proofs in ("status", "proven", "proven_by", "proof_seconds", "undecided_because"):
            columns.pop(of_proofs, None)
    # Runs on image folders have it; tests/runs/test_folder_runs.py compares it with the files.
    columns.pop("file", None)
    assert sorted(columns) == sorted(table)
    for column, row in columns.items():
        values = table[column]
        if not row["empty when"]:
            assert (values != "").all(), column
        assert kinds(row, values[values != ""]), (column, row["type"], values.tolist())


def is_of_the_attacks(row: Mapping[str, str], run: Path) -> bool:
    """Whether a row of a report is `clean`, of an attack, or over several attacks."""
    suite = {name.removesuffix("_broken") for name in pd.read_csv(run / "samples.csv")}
    return row["attack"] in {"clean", "worst_case", "union", *suite}


def is_broken(row: Mapping[str, str]) -> bool:
    """Whether an image is misclassified, by itself or attacked, or by the draws of the audit."""
    flags = (value == "1" for name, value in row.items() if name.endswith("_broken"))
    wrong = row["label"] != row["clean_prediction"]
    return wrong or any(flags) or (row["broken_by"] == "probe" and row["probe_broken"] == "")


# When a cell is empty, in the words of the manual, as a condition on its row. Conditions on the
# whole run are true of none of the runs here.
# Checks of certificates, proofs and radii.
OF_NO_AUDIT = (
    "certificates broken by an attack", "proven images broken by an attack",
    "bounds above the margin of an attacked image", "images on which verification failed",
    "counterexamples that were not repeated", "radii broken below a proven one",
)  # fmt: skip

EMPTY: dict[str, Callable[[Mapping[str, str], Path], bool]] = {
    "": lambda row, run: False,
    "there is no validation split": lambda row, run: False,
    "the defense computes no clean logits": lambda row, run: run.name == "plain",
    "the defense computes no adversarial logits": lambda row, run: False,
    "the training has no attack": lambda row, run: False,
    "the model is from elsewhere, or your own defense has no attack": lambda row, run: False,
    "the row is `average`, `geometric_mean` or `union`": lambda row, run: row["attack"] == "union",
    "the row is no attack, and none of `clean`, `worst_case`, `average`, `geometric_mean`, "
    "`union`; or the attacks of a `worst_case` passed over images (`union_only`)":
        lambda row, run: not is_of_the_attacks(row, run),
    "the row is none of `worst_case`, `average`, `geometric_mean`, `union`":
        lambda row, run: row["attack"] not in ("worst_case", "union"),
    "the check is no part of an audit": lambda row, run: row["check"] in OF_NO_AUDIT,
    "there is no proof": lambda row, run: row["proven"] == "0",
    "it is not undecided": lambda row, run: row["status"] != "undecided",
    "nothing broke it": lambda row, run: not is_broken(row),
    "the curve is `certified`, `radii` or `proven`":
        lambda row, run: row["curve"] in ("certified", "radii", "proven"),
    "nothing up to `largest` broke it": lambda row, run: row["by"] == "",
    "the job has no figures": lambda row, run: row["status"] == "failed",
    "the job has no figures, or the row is `union`": lambda row, run: row["status"] == "failed",
    "the job has no figures, or the row is neither `worst_case` nor `union`":
        lambda row, run: row["attack"] not in ("worst_case", "union"),
    "nothing was trained or validated": lambda row, run: row["status"] == "failed",
    "the job has not finished, or did not train": lambda row, run: row["status"] == "failed",
    "the job has not finished, or did not evaluate": lambda row, run: row["status"] == "failed",
    "as above": lambda row, run: row["status"] == "failed",
    "the job has no such argument, or the training no such key": lambda row, run: False,
    "the job has not ended": lambda row, run: False,
    "the job did not fail": lambda row, run: row["status"] != "failed",
    "the measure is not `worst_case`": lambda row, run: row["measure"] != "worst_case",
    "`p_holm` is 0.05 or more": lambda row, run: float(row["p_holm"]) >= 0.05,
}  # fmt: skip

# The probe of an audit looks at some images only, which the table does not show.
ATTACKED = "the attack was not run on it"


@pytest.mark.parametrize(
    ("name", "folder"), [(name, folder) for name, folders in TABLES.items() for folder in folders]
)
def test_cells_are_empty_exactly_when_the_manual_says_so(
    left: Path, name: str, folder: str
) -> None:
    table = pd.read_csv(left / folder / name, dtype=str, keep_default_na=False)
    for column, row in expanded(documented(name), list(table)).items():
        if row["empty when"] == ATTACKED or column not in table:
            continue
        is_empty = EMPTY[row["empty when"]]
        expected = [is_empty(cells, left / folder) for cells in table.to_dict("records")]
        assert (table[column] == "").tolist() == expected, column


@pytest.mark.parametrize("run", RUNS)
def test_cells_of_an_attack_are_empty_where_it_was_not_run(left: Path, run: str) -> None:
    """No image is attacked that is misclassified; these suites attack all others."""
    table = pd.read_csv(left / run / "samples.csv", dtype=str, keep_default_na=False)
    wrong = table["label"] != table["clean_prediction"]
    for name in (c.removesuffix("_broken") for c in table if c.endswith("_broken")):
        empty = [table[f"{name}_{figure}"] == "" for figure in ("broken", "margin", "size")]
        assert empty[0].equals(empty[1])
        assert empty[0].equals(empty[2])
        assert empty[0][wrong].all()
        assert name == "probe" or empty[0].equals(wrong)


@pytest.mark.parametrize("run", RUNS)
def test_figures_are_what_the_manual_says_that_they_mean(left: Path, run: str) -> None:
    """Each figure of a report, and `broken_by`, counted again from the images."""
    samples = pd.read_csv(left / run / "samples.csv", keep_default_na=False)
    report = pd.read_csv(left / run / "report.csv").set_index("attack")
    # Labels of the synthetic problem cycle through its classes, so that an index shows a label.
    assert samples["label"].equals(samples["index"] % 10)
    assert set(samples["index_in"]) == {"test set"}
    broken = {"clean": samples["clean_prediction"] != samples["label"]}
    for name in (c.removesuffix("_broken") for c in samples if c.endswith("_broken")):
        hit = samples[f"{name}_broken"].astype(str) == "1"
        # A tie counts as broken only if the other class comes first.
        margins = pd.to_numeric(samples[f"{name}_margin"], errors="coerce")
        assert (margins[hit] <= 0).all()
        assert (pd.to_numeric(samples[f"{name}_size"])[hit] <= report["eps"][name] + 1e-5).all()
        broken[name] = hit | broken["clean"]
    # The draws of an audit may misclassify an image itself.
    unattacked = (samples["broken_by"] == "probe") & (samples["probe_broken"] == "")
    assert not unattacked.any() or run == "noisy"
    broken["probe"] |= unattacked
    first = pd.Series("", samples.index)
    for name, flags in broken.items():
        first[(first == "") & flags] = name
    assert samples["broken_by"].tolist() == first.tolist()
    for name, flags in broken.items():
        if name != "probe":
            assert report["accuracy"][name] == pytest.approx(1 - flags.mean(), abs=1e-6), name


def test_the_index_of_certificates_and_arrays_is_that_of_the_samples(left: Path) -> None:
    samples = pd.read_csv(left / "noisy" / "samples.csv")
    certified = pd.read_csv(left / "noisy" / "certified.csv")
    shared = ["index", "index_in", "label"]
    assert certified[shared].equals(samples[shared])
    arrays = np.load(left / "plain" / "adversarial.npz")
    samples = pd.read_csv(left / "plain" / "samples.csv")
    threats = len(set(zip(arrays["norm"], arrays["eps"], strict=True)))
    assert threats == 2
    for name in shared:
        assert arrays[name].tolist() == samples[name].tolist() * threats


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("result.json", "plain/result.json"),
        ("manifest.json", "plain/manifest.json"),
        ("command.json", "plain/command.json"),
        ("job.json", "sweep/.jobs/0.json"),
    ],
)
def test_keys_are_those_that_the_manual_explains(left: Path, name: str, path: str) -> None:
    content = json.loads((left / path).read_text())
    assert set(content) == set(documented(name))
    for key, row in documented(name).items():
        if content[key] is None:
            assert "null" in row["empty when"], key


@pytest.mark.parametrize("name", ["best.pt", "checkpoint.pt"])
def test_checkpoints_hold_what_the_manual_explains(left: Path, name: str) -> None:
    content = torch.load(left / "plain" / name, weights_only=True)
    assert set(content) == set(documented("best.pt"))


def test_arrays_are_those_that_the_manual_explains(left: Path) -> None:
    arrays = np.load(left / "plain" / "adversarial.npz")
    # Runs on image folders have `file`, too.
    assert {*arrays, "file"} == set(documented("adversarial.npz"))
    assert arrays["images"].dtype == np.float32
    assert 0 <= arrays["images"].min() <= arrays["images"].max() <= 1


def test_the_examples_are_those_that_the_manual_explains(left: Path) -> None:
    arrays = np.load(left / "plain" / "gallery.npz")
    # Runs on image folders have `file`, too.
    columns = documented("gallery.npz")
    del columns["file"]
    assert set(arrays) == set(columns)
    types = {name: row["type"].partition(" ")[0] for name, row in columns.items()}
    assert {name: arrays[name].dtype.name.rstrip("0123456789") for name in ("group", "norm")} == {
        "group": "str", "norm": "str",
    }  # fmt: skip
    numeric = {name: kind for name, kind in types.items() if kind != "text"}
    assert {name: arrays[name].dtype.name for name in numeric} == numeric


def test_every_file_of_a_run_is_in_the_table(left: Path) -> None:
    named = set(re.findall(r"`([\w.]+)/?`", FILES.read_text().partition("\n## ")[0]))
    for run in RUNS:
        assert {path.name for path in (left / run).iterdir()} <= named


def test_every_file_of_a_sweep_is_in_the_table(left: Path) -> None:
    named = set(re.findall(r"`([\w.]+)/?`", section(FILES, "Files of a sweep")))
    assert {p.name for p in (left / "sweep").iterdir() if not p.name.isdigit()} <= named


def test_checks_are_those_that_the_manual_explains(left: Path) -> None:
    seen = {check for run in RUNS for check in pd.read_csv(left / run / "audit.csv")["check"]}
    table = rows(section(MANUAL / "guides" / "figures.md", "The audit"))
    assert {row["row of `audit.csv`"].strip("`") for row in table} == seen


def test_the_questions_name_checks_that_exist() -> None:
    """Every name after "Where you see it" that reads like a check is one."""
    table = rows(section(MANUAL / "guides" / "figures.md", "The audit"))
    checks = {row["row of `audit.csv`"].strip("`") for row in table}
    named = set(
        re.findall(r"`([^`]+ (?:by|gain|gains|of|%|noise))`", (MANUAL / "faq.md").read_text())
    )
    assert named <= checks
    assert len(named) > 8


def test_the_questions_quote_warnings_that_exist() -> None:
    quoted = re.findall(r"[Tt]he warning `([^`]+)`", (MANUAL / "faq.md").read_text())
    sources = [path.read_text() for path in (ROOT / "robusttrain").rglob("*.py")]
    assert len(quoted) == 3
    for text in quoted:
        assert any(text.removesuffix(" N") in source for source in sources), text


def test_the_rows_of_a_report_are_those_that_the_manual_names(left: Path) -> None:
    short = section(FILES, "report.csv")
    long = section(MANUAL / "guides" / "figures.md", "The rows of a report")
    for run in RUNS:
        rows_ = set(pd.read_csv(left / run / "report.csv")["attack"])
        chosen = yaml.safe_load((left / run / ".hydra" / "config.yaml").read_text())
        own = rows_ - set(chosen["evaluation"]["attacks"]) - {"eot_5", "eot_20"}
        for name in own:
            assert f"`{name}`" in short, name
            assert f"`{name}`" in long, name


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "page", "heading"),
    [
        ("defense", ROOT / "README.md", "Defenses"),
        ("defense", MANUAL / "guides" / "defenses.md", "What each minimises"),
        ("evaluation", MANUAL / "guides" / "evaluate.md", "Which suite"),
        ("noise", MANUAL / "guides" / "noise.md", "Noise"),
    ],
)
def test_tables_of_options_have_all_of_them(group: str, page: Path, heading: str) -> None:
    table = rows(section(page, heading))
    first = next(iter(table[0]))
    named = [name for row in table for name in re.findall(r"`(\w+)`", row[first])]
    there = {path.stem for path in (CONF / group).glob("*.yaml")}
    assert sorted(named) == sorted(there - {"none", "stack"})


def test_the_exit_codes_are_those_of_the_code() -> None:
    table = rows(section(MANUAL / "reference" / "commands.md", "Exit codes"))
    assert [int(row["exit code"]) for row in table] == [*ExitCode]
    text = (CONF / "hydra" / "help" / "robusttrain.yaml").read_text()
    (listed,) = re.findall(r"Exit codes: (.*)", text)
    assert [int(number) for number in re.findall(r"\d+", listed)] == [*ExitCode]
    assert of_signal(signal.SIGINT) == ExitCode.interrupted
    assert of_signal(signal.SIGTERM) == ExitCode.terminated


def test_the_table_of_extras_has_all_of_them() -> None:
    table = rows(section(MANUAL / "reference" / "commands.md", "Extras"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {row["extra"].strip("`") for row in table}
    assert named == set(project["optional-dependencies"])


@pytest.mark.parametrize("group", [*schema.GROUPS, "experiment"])
def test_every_group_has_a_page(group: str) -> None:
    directive = "config-experiments::" if group == "experiment" else f"config-group:: {group}"
    page = MANUAL / "reference" / "config" / f"{group}.md"
    assert f".. {directive}\n" in page.read_text()


def test_the_readme_stays_short_and_starts_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    commands = re.findall(r"^    (pip .*)$", text, re.MULTILINE)
    assert commands == [
        "pip install . && robusttrain defense=madry eps=0.03",
        "pip install -e '.[dev]' && pytest",
    ]


def test_the_readme_links_to_pages_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert all((ROOT / link).is_file() for link in links)
