"""A mistake in code of the user's own is reported by the user's own lines, and by no others."""

import re
from pathlib import Path

import pytest

from toys.command_line import Answer, CommandLine

TINY = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "model=linear",
    "defense=standard", "epochs=1", "stages=[train]", "device=cpu", "+optimizer.x=1",
]  # fmt: skip
MINE = """\
import colorsys


def slip(parameters):
    return parameters.no_such_attribute


class Early:
    def __init__(self, **keys):
        slip([])


class Late:
    lr = 0.1

    def __init__(self, **keys):
        assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)

    def build(self, parameters):
        return slip(parameters)
"""
SAYS = "'list' object has no attribute 'no_such_attribute'"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a module, and with one that has a name of the standard library."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('hides a module')")
    return tmp_path


def failed(command_line: CommandLine, folder: Path, *words: str) -> Answer:
    """A command line as of the console script, which does not have its directory on the path."""
    answer = command_line.run(*TINY, *words, cwd=folder, PYTHONPATH=str(folder / "nothing"))
    assert answer.code == 1
    return answer


def test_an_error_while_a_component_is_built_has_its_places(
    folder: Path, command_line: CommandLine
) -> None:
    file = folder / "mine.py"
    assert failed(command_line, folder, "optimizer._target_=mine.Early").err == (
        f"robusttrain: optimizer cannot be built: {SAYS}\n"
        f"({file}:10 in __init__, {file}:5 in slip)\n"
    )


@pytest.mark.parametrize("many", [[], ["-m", "seed=0"]])
def test_an_error_in_a_run_has_the_lines_of_the_user_alone(
    many: list[str], folder: Path, command_line: CommandLine
) -> None:
    answer = failed(command_line, folder, *many, "optimizer._target_=mine.Late")
    first, *frames = answer.err[answer.err.index("robusttrain: your code") :].splitlines()
    assert "HYDRA_FULL_ERROR=1" in first
    assert re.findall(r'File "(.*)", line (\d+), in (\w+)', "\n".join(frames)) == [
        (str(folder / "mine.py"), "20", "build"),
        (str(folder / "mine.py"), "5", "slip"),
    ]
    assert frames[-1] == f"AttributeError: {SAYS}"


def test_the_whole_traceback_is_shown_on_request(folder: Path, command_line: CommandLine) -> None:
    words = [*TINY, "optimizer._target_=mine.Late"]
    answer = command_line.run(
        *words, cwd=folder, first="import robusttrain.cli.main as cli; cli.WANTS_TRACEBACK = True"
    )
    assert "your code has failed" not in answer.err
    assert "robusttrain/runs/experiment.py" in answer.err
