"""Every example runs, within seconds, and is short."""

import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from robusttrain.config.folders import CONF
from toys.command_line import CommandLine

EXAMPLES = CONF.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LONGEST = 60


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert "%" in (out := capsys.readouterr().out) or "loss" in out
    assert len(script.read_text().splitlines()) <= LONGEST


def test_a_defense_of_a_package_works_in_the_shell(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second command that the example prints."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    words = ["defense._target_=your_defense.Pull", "+defense.weight=2", "dataset=synthetic"]
    short = ["epochs=1", "model=mlp", "stages=[train]", "eps=0.05", "attack.steps=2"]
    first = f"import sys; sys.path.append({str(EXAMPLES)!r})"
    answer = command_line.run(*words, *short, cwd=tmp_path, first=first)
    assert answer.code == 0, answer.said


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output.get("data", {}) for outputs in results for output in outputs]
    assert any("worst_case" in data.get("text/html", "") for data in shown)
