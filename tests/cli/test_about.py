"""`--version` and `--help` answer at once, and whatever stands beside them."""

import subprocess
import sys

import pytest
import torch

import robusttrain
from robusttrain.__main__ import main

SLOW = {"hydra", "omegaconf", "torch", "pandas"}


@pytest.mark.parametrize("words", [["--version"], ["defense=nosuch", "--version"]])
def test_the_version_is_that_of_robusttrain(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["robusttrain", *words])
    main()
    name, version, *others = capsys.readouterr().out.replace(",", "").split()
    assert (name, version) == ("robusttrain", robusttrain.__version__)
    python = ".".join(map(str, sys.version_info[:3]))
    assert others == ["torch", torch.__version__.partition("+")[0], "Python", python]


@pytest.mark.parametrize("word", ["--help", "-h", "--version"])
def test_nothing_is_imported_that_takes_long(word: str) -> None:
    program = "import sys; from robusttrain.__main__ import main; main(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, word], capture_output=True, text=True, check=True
    )
    *said, modules = done.stdout.splitlines()
    assert not SLOW & set(modules.split())
    assert said[0].startswith("robusttrain")
    assert max(map(len, said)) <= 80
