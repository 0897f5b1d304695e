"""The reference models: their files, their names, and the figures of their cards."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from robusttrain import load_model
from robusttrain.attacks.pgd import PGD
from robusttrain.checkpoints import checkpoint, external, pretrained
from robusttrain.checkpoints.pretrained import FOLDER, PREFIX, card, names
from robusttrain.data import Split
from robusttrain.data.digits import Digits
from robusttrain.data.torchvision import Torchvision
from robusttrain.errors import InputError
from robusttrain.evaluation import Evaluation, evaluate
from robusttrain.evaluation.attack_suite import open_session
from robusttrain.evaluation.settings import Bounds, Verification
from robusttrain.evaluation.verification import verify
from robusttrain.report.ledger import wilson
from robusttrain.runs.inputs import other_model
from robusttrain.runs.saved_model import load_pretrained
from robusttrain.threat import Norm, Threat
from toys.command_line import CommandLine
from toys.manual import MANUAL, ROOT, rows, section

LARGEST = 1_000_000
DIGITS = "digits-linf-0.1"

# Where MNIST is looked for: it is not downloaded for these tests.
PLACES = (ROOT / "data", ROOT.parent / "shared" / "data")

IMAGES = 60
INTERVALS = Verification(Bounds.intervals, branching=False)


def images_of(name: str) -> Split:
    if card(name)["dataset"] == "digits":
        return Digits().load()[1]
    there = [place for place in PLACES if (place / "MNIST" / "raw").is_dir()]
    if not there:
        pytest.skip("MNIST is not here")
    return Torchvision("mnist", str(there[0]), download=False).load()[1]


def agrees(right: int, n: int, figure: dict[str, float]) -> bool:
    """Whether the interval of a share overlaps with that of a card."""
    low, high = wilson(right, n)
    return low <= figure["ci_high"] and figure["ci_low"] <= high


def test_there_are_several_and_they_are_small() -> None:
    assert 3 <= len(names()) <= 5
    assert DIGITS in names()
    files = [f"{name}{end}" for name in names() for end in (".json", ".pt")]
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(files)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < LARGEST


@pytest.mark.parametrize("name", names())
def test_a_file_holds_weights_alone_and_no_place_of_its_maker(name: str) -> None:
    saved = checkpoint.load(FOLDER / f"{name}.pt")
    assert saved.training == {}
    assert {weight.dtype for weight in saved.model.values()} == {torch.float32}
    assert saved.config["data_dir"] == "data"
    assert not re.search(r"['\"]/", repr(saved.config))


@pytest.mark.parametrize("name", names())
def test_the_figures_of_a_card_are_met(name: str) -> None:
    """On a few of the same images and under one attack; intervals have to overlap."""
    about, images, model = card(name), images_of(name), load_pretrained(name)
    threat = Threat(Norm(about["norm"]), about["eps"])
    attack = PGD(norm=threat.norm, eps=threat.eps, steps=20)
    # All images of digits, and the first ones of MNIST: rows and positions are the same there.
    count = about["figures"]["clean"]["n"]
    spread = [*range(0, count, count // IMAGES)][:IMAGES]
    settings = Evaluation({"pgd": attack}, indices=spread)
    ledger = evaluate(model, images, settings, threat=threat, seed=0)
    clean, robust = int((~ledger.misclassified).sum()), int((~ledger.union).sum())
    figures = about["figures"]
    assert agrees(clean, IMAGES, figures["clean"])
    assert agrees(robust, IMAGES, figures["worst_case"])
    assert figures["worst_case"]["accuracy"] < figures["clean"]["accuracy"]
    if "verified" in figures:
        verify(open_session(model, images, settings, 0)[1], ledger, INTERVALS, threat)
        sure = ledger.proofs.proven & ~ledger.misclassified
        assert agrees(int(sure.sum()), IMAGES, figures["verified"])
        assert not (sure & ledger.union).any()


def test_a_wrong_name_is_answered_with_all_names() -> None:
    with pytest.raises(InputError) as caught:
        load_pretrained("digits-linf-0.2")
    assert all(f"{PREFIX}{name}" in str(caught.value) for name in names())
    with pytest.raises(InputError, match=r"^attack\.source\.run=pretrained:\.\./mine"):
        external.load(f"{PREFIX}../mine", key="attack.source.run")


def test_another_file_under_the_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (".pt", ".json"):
        shutil.copy(FOLDER / f"{DIGITS}{end}", tmp_path)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    load_pretrained(DIGITS)
    with (tmp_path / f"{DIGITS}.pt").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"is not the model of its card: .* missing or damaged"):
        load_pretrained(DIGITS)
    (tmp_path / f"{DIGITS}.pt").unlink()
    with pytest.raises(InputError, match="is not the model of its card"):
        load_pretrained(DIGITS)


def test_a_name_stands_wherever_a_run_can_be_named(
    command_line: CommandLine, tmp_path: Path
) -> None:
    """`checkpoint`, the source of a transfer attack, the teacher of `distill`, and Python."""
    run = f"{PREFIX}{DIGITS}"
    answer = command_line.run(
        "stages=[evaluate]", f"checkpoint={run}", "evaluation=quick", "evaluation.audit=false",
        "evaluation.first=20", "~evaluation.attacks.apgd_ce", "~evaluation.attacks.pgd",
        "+attack@evaluation.attacks.other=transfer", f"evaluation.attacks.other.source.run={run}",
        "device=cpu", cwd=tmp_path,
    )  # fmt: skip
    assert answer.code == 0, answer.said
    report = pd.read_csv(answer.run_dir / "report.csv")
    about = card(DIGITS)
    for key in ("dataset", "model"):
        assert set(report[key]) == {about[key]}
    assert set(report["defense"]) == {"madry"}
    worst = report[report["attack"] == "worst_case"].iloc[0]
    assert (worst["norm"], worst["eps"]) == (about["norm"], about["eps"])
    assert report[report["attack"] == "other"]["accuracy"].item() < 1
    x = torch.rand(3, 1, 8, 8)
    model, teacher = load_pretrained(DIGITS), other_model((), Digits().info(), "teacher", run)
    assert not model.training
    assert torch.equal(model(x), load_model(run)(x))
    assert torch.equal(model(x), teacher(x))


@pytest.mark.parametrize("heading", ["Models", "Recipes"])
def test_the_manual_lists_what_the_cards_say(heading: str) -> None:
    table = rows(section(MANUAL / "pretrained.md", heading))
    assert [row["name"].strip("`") for row in table] == names()
    for row, about in zip(table, map(card, names()), strict=True):
        for column, key in (
            ("clean", "clean"),
            ("worst case", "worst_case"),
            ("proven", "verified"),
        ):
            if column in row and key in about["figures"]:
                figure = about["figures"][key]
                found = [float(number) / 100 for number in re.findall(r"[\d.]+", row[column])]
                expected = [figure[name] for name in ("accuracy", "ci_low", "ci_high")]
                assert found == pytest.approx(expected, abs=5.1e-4)
        for column, key in (("audit", "audit"), ("SHA-256", "sha256"), ("training", "training"),
                            ("evaluation", "evaluation"), ("data", "data")):  # fmt: skip
            assert column not in row or row[column].strip("`") == about[key]
