"""Settings that are refused before anything is loaded or written."""

from pathlib import Path

import pytest
import torch

from robusttrain.errors import InputError
from robusttrain.runs.device import device_of
from robusttrain.runs.preflight import check_settings
from toys.command_line import CommandLine
from toys.external import TINY, prepared

BAD = {
    "device=nonsense": r"^device=nonsense is not allowed: it must be auto, cpu, or a device that",
    "training.curriculum.steps=[1,2] defense=rt": r"^training\.curriculum cannot change 'steps'",
}


@pytest.mark.parametrize("words", BAD)
def test_settings_that_do_not_fit_are_refused(words: str) -> None:
    with pytest.raises(InputError, match=BAD[words]):
        prepared(*TINY, *words.split())


def test_settings_that_fit_pass() -> None:
    config, _ = prepared(*TINY, "training.curriculum.steps=[1,2]", "defense=madry")
    before = repr(config)
    check_settings(config)
    assert repr(config) == before


def test_a_device_is_chosen_by_name() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("words", BAD)
def test_a_refusal_does_not_change_an_existing_run(
    words: str, command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    answer = command_line.run(*TINY, *words.split(), "hydra.run.dir=run", cwd=tmp_path)
    assert answer.code == 1
    assert (tmp_path / "run" / "manifest.json").read_text() == "{}"
    assert not (tmp_path / "run" / "command.json").exists()
