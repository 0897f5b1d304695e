"""The package as it is shipped: built, installed elsewhere and run; and the rules of its source."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import robusttrain
import robusttrain.errors
from robusttrain.attacks import apgd, square
from robusttrain.checkpoints.pretrained import names
from robusttrain.threat import Norm
from toys.command_line import PATIENCE

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "robusttrain").rglob("*.py"))
OPTIONS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "conf").rglob("*.yaml"))
MODEL_FILES = (".pt", ".json")
TEMPLATES = sorted(
    str(file.relative_to(ROOT))
    for file in (ROOT / "robusttrain").rglob("*")
    if file.suffix in (".html", ".css")
)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"]
SHIPPED = ["robusttrain", "conf", "docs", "tests", *DOCUMENTS, "pyproject.toml"]


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | variables, capture_output=True,
        text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    # From a copy, since a build must neither depend on nor leave other files beside the sources.
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / "source" / name)
    run("-m", "build", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder)
    return folder


def test_the_wheel_holds_the_package_and_its_configuration(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(file.relative_to(ROOT)) for file in SOURCES}
    expected |= {f"robusttrain/{option}" for option in OPTIONS}
    expected |= {"robusttrain/py.typed", *TEMPLATES}
    expected |= {f"robusttrain/pretrained/{name}{end}" for name in names() for end in MODEL_FILES}
    assert {name for name in shipped if ".dist-info/" not in name} == expected


def test_the_wheel_says_its_version_and_its_license(built: Path) -> None:
    """The version is stored only in the package."""
    (wheel,) = built.glob("*.whl")
    about = f"robusttrain-{robusttrain.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{about}/METADATA").decode()
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    head = message_from_string(metadata)
    assert head["Version"] == robusttrain.__version__
    assert head["License-Expression"] == "MIT"
    assert head["Author"] == "the robusttrain authors"
    assert "Typing :: Typed" in head.get_all("Classifier", [])


def test_the_sdist_holds_the_tests_too(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"pyproject.toml", "tests/test_package.py", *DOCUMENTS, *OPTIONS, *TEMPLATES}
    assert expected <= shipped


def test_the_wheel_runs_from_another_directory(built: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment, but without access to the checkout."""
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "site"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", place, wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = ["experiment=smoke", "model=linear", "epochs=1"]
    # The target comes first on the path, before an editable installation of the checkout.
    output = run("-m", "robusttrain", *arguments, cwd=elsewhere, PYTHONPATH=str(place))
    run_dir = Path(output.splitlines()[-1])
    assert run_dir.is_relative_to(elsewhere)
    assert (run_dir / "report.csv").is_file()
    # Hydra records in the run directory where its configuration came from.
    assert str(place / "robusttrain" / "conf") in (run_dir / ".hydra" / "hydra.yaml").read_text()
    assert json.loads((run_dir / "manifest.json").read_text())["git"] is None


def test_the_package_imports_without_torch_and_loads_models(tmp_path: Path) -> None:
    code = "import robusttrain, sys; print('torch' in sys.modules, 'hydra' in sys.modules)"
    assert run("-c", code, cwd=tmp_path).split() == ["False", "False"]
    assert callable(robusttrain.load_model)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        robusttrain.load_modle  # noqa: B018
    with pytest.raises(robusttrain.errors.InputError, match="is not there"):
        robusttrain.load_model(tmp_path / "missing")


# --- rules of the source -----------------------------------------------------------------------


def test_imports_run_downward(tmp_path: Path) -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.is_file():
        pytest.skip("import-linter is not installed")
    command = [lint, "--config", ROOT / "pyproject.toml", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_called_utils() -> None:
    assert not [file for file in SOURCES if file.stem in ("utils", "util", "helpers", "misc")]


def test_networks_never_call_view() -> None:
    """`view` fails on images in channels_last; `flatten(1)` does not."""
    models = [file for file in SOURCES if file.parent.name == "models"]
    assert models
    assert not [file.name for file in models if ".view(" in file.read_text()]


# Attacks whose papers have a different search for each norm, or a search for one norm only; and
# FAB, which stops early only in the norms in which that was measured to cost nothing.
DIFFER_BY_NORM = {
    "apgd.py",
    "carlini_wagner.py",
    "ddn.py",
    "decision_based.py",
    "fab.py",
    "minimum_norm.py",
    "square.py",
}


def test_only_the_threat_model_knows_norms() -> None:
    """An attack or a defense with a branch for a norm would have to be changed for a new norm."""
    asked = re.compile(r"\bnorm (==|is|!=)|\bmatch .*norm|\bNorm\.l")
    others = [file for file in SOURCES if file.parent.name in ("attacks", "defenses")]
    guilty = {
        file.name
        for file in others
        for line in file.read_text().splitlines()
        if asked.search(line) and not line.lstrip().startswith("norm: Norm = ")
    }
    assert guilty == DIFFER_BY_NORM


def test_an_attack_with_a_search_for_each_norm_has_one_for_every_norm() -> None:
    for table in (apgd.FIRST_STEP, apgd.RULES, square.MOVES):
        assert table.keys() == set(Norm)
