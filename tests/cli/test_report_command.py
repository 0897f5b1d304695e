"""`robusttrain report` and `report=html`, on a run that keeps all of its attacked images."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robusttrain.cli import report
from robusttrain.data.synthetic import Synthetic
from toys.command_line import Answer, CommandLine

RUN = [
    "dataset=synthetic", "dataset.train_size=96", "dataset.test_size=60", "model=linear",
    "defense=standard", "epochs=2", "batch_size=32", "optimizer.lr=0.02", "eps=0.05",
    "evaluation=quick", "evaluation.attacks.pgd.steps=3", "evaluation.audit=false",
    "evaluation.save_adversarial=true", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def answer(command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    done = command_line.run(*RUN, "report=html", cwd=tmp_path_factory.mktemp("report"))
    assert done.code == 0, done.said
    return done


@pytest.fixture
def run(answer: Answer, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(answer.run_dir, tmp_path / "run"))


def test_a_run_ends_with_its_page(answer: Answer) -> None:
    page = answer.run_dir / "report.html"
    assert f"report: {page}" in answer.out
    assert (answer.run_dir / "plots" / "classes.png").is_file()
    assert "standard, linear on synthetic" in page.read_text()


def test_the_command_makes_the_same_page(
    answer: Answer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "plots")
    (run / "report.html").unlink()
    # All images are not needed again.
    (run / "adversarial.npz").unlink()
    report.report([str(run), "--pdf"])
    assert capsys.readouterr().out.splitlines() == [str(run / "report.html")]
    assert (run / "report.html").read_bytes() == (answer.run_dir / "report.html").read_bytes()
    names = {path.name for path in (answer.run_dir / "plots").iterdir()}
    pdf = {path.with_suffix(".pdf").name for path in (answer.run_dir / "plots").iterdir()}
    assert {path.name for path in (run / "plots").iterdir()} == names | pdf
    assert (run / "plots" / "classes.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "report needs a run: robusttrain report RUN ..."),
        (["nowhere"], "nowhere is not a run with results"),
        (["--latext"], "unrecognized arguments: --latext (see robusttrain report --help)"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as left:
        report.report(words)
    assert str(left.value.code).startswith(f"robusttrain: {message}")


def test_an_edited_run_is_refused(run: Path) -> None:
    with (run / "report.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(SystemExit) as left:
        report.report([str(run)])
    assert "holds results of several runs, or edited ones" in str(left.value.code)


def test_examples_are_the_images_of_the_run(run: Path) -> None:
    """Compared with the images of the data set, and with all attacked images, which it has kept."""
    stored, every = np.load(run / "gallery.npz"), np.load(run / "adversarial.npz")
    assert every["norm"].tolist() == ["linf"] * 60
    _, test = Synthetic(train_size=96, test_size=60).load()
    rows = stored["index"]
    assert np.array_equal(stored["clean"], test.images[rows].numpy())
    place = [every["index"].tolist().index(row) for row in rows.tolist()]
    attacked = stored["clean"] / 255 + stored["perturbation"]
    assert np.abs(attacked - every["images"][place]).max() < 1e-4
    assert stored["size"] == pytest.approx(
        np.abs(stored["perturbation"]).max(axis=(1, 2, 3)), abs=1e-4
    )


def test_examples_are_the_most_telling_ones(run: Path) -> None:
    stored, samples = np.load(run / "gallery.npz"), pd.read_csv(run / "samples.csv")
    samples = samples.assign(broken_by=samples["broken_by"].fillna(""))
    margins = samples.filter(regex="_margin$").min(axis=1)
    chosen = {g: stored["index"][stored["group"] == g].tolist() for g in set(stored["group"])}
    broken = samples["broken_by"] != ""
    attacked = samples[broken & (samples["broken_by"] != "clean")]
    assert set(chosen["broken"]) <= set(attacked["index"])
    assert len(chosen["broken"]) == min(6, len(attacked))
    assert set(chosen["resisted"]) <= set(samples["index"][~broken])
    surest = margins[~broken].sort_values(ascending=False).index[:6]
    assert margins[chosen["resisted"]].tolist() == pytest.approx(margins[surest].tolist(), abs=1e-5)
    assert set(chosen["confident"]) <= set(samples["index"][broken])
    drawn = stored["margin"][stored["group"] == "confident"]
    assert (np.diff(drawn) >= 0).all()


def test_the_predicted_class_of_what_broke_an_image_is_a_wrong_one(run: Path) -> None:
    samples = pd.read_csv(run / "samples.csv")
    wrong = samples["worst_prediction"] != samples["label"]
    assert wrong.equals(samples["broken_by"].notna())
    clean = samples["broken_by"] == "clean"
    predictions = samples.loc[clean, ["worst_prediction", "clean_prediction"]]
    assert predictions["worst_prediction"].equals(predictions["clean_prediction"])
