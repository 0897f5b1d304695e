"""`robusttrain export`, on a reference model and on a run."""

import csv
import re
from pathlib import Path

import pytest
import torch

from robusttrain import load_pretrained
from robusttrain.cli import export
from robusttrain.data.digits import Digits
from toys.command_line import Answer, CommandLine

MODEL = "pretrained:digits-linf-0.1"
RUN = [
    "dataset=synthetic", "dataset.train_size=128", "dataset.test_size=20", "model=linear",
    "defense=standard", "epochs=1", "stages=[train]", "device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def answer(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    done = command_line.run(*RUN, cwd=tmp_path_factory.mktemp("export"))
    assert done.code == 0, done.said
    return done


def test_the_file_is_the_last_line(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    export.export([str(answer.run_dir), "--to", "torch_export"])
    first, last = capsys.readouterr().out.splitlines()
    assert "20 test images of synthetic" in first
    assert "all predictions are equal" in first
    assert last == "model.pt2"
    assert Path(last).is_file()


def test_specifications_name_images_by_their_index_and_the_network_beside_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    positions = Digits().test_positions()[:40].tolist()
    images, labels = (part[:40] for part in Digits().load()[1])
    predicted = load_pretrained("digits-linf-0.1")(images / 255).argmax(1)
    wrong = int((predicted != labels).nonzero()[0]) if (predicted != labels).any() else None
    chosen = positions[:3] if wrong is None else [*positions[:2], positions[wrong]]
    words = ["--spec", "--eps", "0.02", "--indices", *map(str, chosen)]
    export.export([MODEL, "--to", "onnx", "--out", "net.onnx", *words])
    assert "net.onnx-spec has the specifications of" in capsys.readouterr().out
    folder = Path("net.onnx-spec")
    rows = list(csv.reader((folder / "instances.csv").open()))
    right = chosen if wrong is None else chosen[:2]
    assert rows == [["../net.onnx", f"image-{index}.vnnlib", "300"] for index in right]
    text = (folder / f"image-{chosen[0]}.vnnlib").read_text()
    assert f"; image {chosen[0]} of class {int(labels[0])}, linf 0.02" in text
    high = float(images[0].flatten()[20] / 255) + 0.02
    found = re.search(r"<= X_20 ([0-9.]+)", text)
    assert found
    assert float(found[1]) == pytest.approx(high, abs=1e-12)


REFUSED = {
    "--to onxx": r"--to: invalid choice: 'onxx' .*onnx",
    "": r"required: --to",
    "--to torchscript --eps 0.1": r"--eps has no effect: give --spec",
    "--to torchscript --indices 3": r"--indices has no effect",
    "--to torchscript --spec": r"--spec .*--to onnx",
    "--to onnx --spec --uint8": r"--spec .*leave out --uint8",
    "--to safetensors --uint8": r"--uint8 has no effect: --to another format",
    "--to onnx --spec --eps 2": r"--eps=2.0 is not allowed",
    "--to onnx --spec --indices 99999": r"--indices=99999 is not allowed: .*samples.csv",
    "--to onnx --out there": r"--out=there exists already",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_requests_are_refused_before_any_file(words: str) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    Path("there").touch()
    with pytest.raises(SystemExit, match=REFUSED[words]):
        export.export([MODEL, *words.split()])
    assert [path.name for path in Path.cwd().iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["noise=gaussian", "noise.predict=true"],
            "RUN=.* a vote over draws of noise, which a file cannot hold",
        ),
        (["norm=l2"], "--eps is needed: give a radius in linf: the run has l2"),
    ],
)
def test_runs_that_cannot_be_exported_are_refused(
    changes: list[str], message: str, command_line: CommandLine, tmp_path: Path
) -> None:
    done = command_line.run(*RUN, *changes, cwd=tmp_path)
    with pytest.raises(SystemExit, match=message):
        export.export([str(done.run_dir), "--to", "onnx", "--spec"])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match=r"RUN=weights.pt is not allowed: .*pretrained:NAME"):
        export.export(["weights.pt", "--to", "torchscript"])
    with pytest.raises(SystemExit, match=r"RUN=missing"):
        export.export(["missing", "--to", "torchscript"])


def test_noise_in_training_alone_is_left_behind(
    command_line: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command_line.run(*RUN, "noise=gaussian", "noise.predict=false", cwd=tmp_path)
    for name in ("torchscript", "torch_export"):
        export.export([str(done.run_dir), "--to", name])
    assert capsys.readouterr().out.count("all predictions are equal") == 2
