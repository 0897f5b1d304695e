"""Files of configuration of the user's own are used as Hydra's documentation shows, or refused."""

from pathlib import Path

import pytest

from toys.command_line import CommandLine

TINY = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=40", "model=linear",
    "defense=standard", "epochs=1", "stages=[train]", "device=cpu",
]  # fmt: skip
PLACES = """# @package _global_
hydra:
  run:
    dir: chosen/run
  sweep:
    dir: chosen/sweep
    subdir: job-${hydra.job.num}
"""
MLP = "defaults:\n  - /schema/model/MLP@_here_\n  - _self_\nwidths: [3]\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of options."""
    for name, text in {
        "experiment/places": PLACES,
        "experiment/moves": "# @package _global_\nhydra:\n  job:\n    chdir: true\n",
        "model/mlp": MLP,
        "model/own": MLP,
        "attack/mim": "defaults:\n  - /schema/attack/MIM@_here_\n  - _self_\nsteps: 3\n",
    }.items():
        file = tmp_path / "mine" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "mine"


# Options, and the files of the run below the working directory.
DIRECTORIES = {
    "experiment=places": "chosen/run/manifest.json",
    "experiment=places hydra.run.dir=given": "given/manifest.json",
    "-m experiment=places seed=0": "chosen/sweep/job-0/manifest.json",
    "-m experiment=places seed=0 hydra.sweep.dir=given": "given/job-0/manifest.json",
}


@pytest.mark.parametrize("words", DIRECTORIES)
def test_an_experiment_may_set_the_directories(
    words: str, mine: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    answer = command_line.run("--config-dir", mine, *words.split(), *TINY, cwd=tmp_path)
    assert answer.code == 0, answer.said
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("manifest.json")}
    assert found == {DIRECTORIES[words]}


HIDDEN = {
    "--config-dir={mine} model=mlp": "model/mlp.yaml",
    "hydra.searchpath=[file://{mine}] model=mlp": "model/mlp.yaml",
    "--config-dir={mine} +attack@evaluation.attacks.own=mim": "attack/mim.yaml",
    "--config-dir={mine} -m model=linear,mlp": "model/mlp.yaml",
}


@pytest.mark.parametrize("words", HIDDEN)
def test_an_option_that_a_built_in_one_hides_is_refused(
    words: str, mine: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    given = [word.format(mine=mine) for word in words.split()]
    answer = command_line.run(*TINY, *given, cwd=tmp_path)
    assert answer.code == 1
    assert f"{mine / HIDDEN[words]} is hidden by " in answer.err
    assert "Traceback" not in answer.said
    runs = [path.parent.name for path in tmp_path.rglob("manifest.json")]
    assert runs == (["0"] if "-m" in given else [])


def test_so_is_a_main_file(mine: Path, command_line: CommandLine, tmp_path: Path) -> None:
    (mine / "config.yaml").write_text("seed: 3\n")
    answer = command_line.run("--config-dir", mine, *TINY, "model=own", cwd=tmp_path)
    assert answer.code == 1
    assert answer.err.startswith(f"robusttrain: {mine / 'config.yaml'} is hidden by ")


def test_options_that_are_not_chosen_may_have_any_name(
    mine: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    words = [*TINY, "model=own", "evaluation=pgd50_10"]
    answer = command_line.run("--config-dir", mine, *words, cwd=tmp_path)
    assert answer.code == 0, answer.said


@pytest.mark.parametrize("words", ["hydra.job.chdir=true", "experiment=moves"])
@pytest.mark.parametrize("many", [[], ["-m", "seed=0,1"]])
def test_a_change_of_the_directory_is_refused(
    many: list[str], words: str, mine: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    given = ["--config-dir", str(mine), *many, *TINY, words]
    answer = command_line.run(*given, cwd=tmp_path)
    assert answer.code == 1
    assert answer.err == (
        "robusttrain: hydra.job.chdir=True is not allowed: it must be false, since relative paths "
        "such as data_dir start in the directory of the command\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
