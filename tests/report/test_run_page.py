"""The page of a run: what it says, and that whatever stands in a run is shown as text."""

import ast
import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from robusttrain.errors import InputError
from robusttrain.evaluation import audit, certification, gradient_checks, radii, verification
from robusttrain.report.page.formats import duration, percent
from robusttrain.report.page.formats import figure as number
from robusttrain.report.proofs import BROKEN_PROOFS, EXCEEDED_BOUNDS
from robusttrain.report.run.advice import ADVICE, advice
from robusttrain.report.run.gallery import magnification
from robusttrain.report.run.page import write_page
from toys import pages

pytestmark = pytest.mark.filterwarnings("ignore::robusttrain.errors.IdentityWarning")


class Reader(HTMLParser):
    """The text of a page, its elements, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = pages.write_run(tmp_path_factory.mktemp("run"))
    assert write_page(run) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def read(run: Path) -> Reader:
    return Reader((run / "report.html").read_text())


def test_five_lines_tell_a_manager_what_was_found(read: Reader) -> None:
    for line in (
        "Model mlp, defense madry, training attack pgd-10",
        "Data toy, 10 test images A guess among 3 classes is right in 33.3 % of all cases.",
        "Threat linf up to 0.1 An attacker may change every pixel by 0.1",
        "Accuracy 80.0 % clean (49.0 to 94.3 %), 40.0 % in the worst case (16.8 to 68.7 %)",
        "Of 10 images, 8 are classified correctly as they are, and 4 whatever the attacks did.",
        "Audit warn, 1 of 3 checks pass Look closer before you quote the worst case.",
    ):
        assert line in read.text


def test_a_requirement_that_is_not_met_stands_below_them(read: Reader) -> None:
    line = "Not met: evaluation.require.worst_case requires worst_case 0.5, found 0.4."
    assert line in read.text


def test_a_check_that_does_not_pass_says_what_it_means_and_what_to_do(read: Reader) -> None:
    for check in ("one step beats many by", "invalid adversarial images"):
        assert ADVICE[check].meaning in read.text
        assert ADVICE[check].action in read.text
    assert ADVICE["accuracy rises with eps by"].question in read.text
    assert ADVICE["accuracy rises with eps by"].meaning not in read.text


def test_the_page_says_how_to_repeat_the_run(read: Reader) -> None:
    for part in (
        "robusttrain rerun .", "0123abc, with changes", "train data aaa", "test data bbb",
        "torch 2.9", "cpu, 1 threads, 1 processes",
        "1.5 min, 1 234 images a second, 9 000 passes, 300 MiB at its peak",
    ):  # fmt: skip
        assert part in read.text


def test_names_of_others_are_shown_as_text(run: Path, read: Reader) -> None:
    """Markup in a class, a command or a message makes no element; control characters are shown."""
    assert not read.all("script")
    assert {attributes["src"][:22] for attributes in read.all("img") if attributes["src"]} == {
        "data:image/png;base64,"
    }
    assert not [1 for _, attributes in read.tags if any(key.startswith("on") for key in attributes)]
    assert pages.HOSTILE in read.text
    assert r"\x1b[31mred" in read.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", (run / "report.html").read_text())


def test_the_page_asks_for_nothing(run: Path, read: Reader) -> None:
    assert not [a for _, a in read.tags if str(a.get("href", "")).startswith(("http", "//", "/"))]
    assert "@import" not in (run / "report.html").read_text()
    (policy,) = [m for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy["content"]).startswith("default-src 'none'")
    assert (run / "report.html").stat().st_size < 2_000_000


def test_ids_are_unique_and_every_reference_leads_to_one(run: Path, read: Reader) -> None:
    ids = [str(attributes["id"]) for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    page = (run / "report.html").read_text()
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)


def test_every_picture_has_an_alternative_text(read: Reader) -> None:
    assert all(attributes["alt"] for attributes in read.all("img"))
    figures = read.all("svg")
    assert len(figures) == 12
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in figures)


def test_the_figures_lie_in_plots(run: Path) -> None:
    names = {path.name for path in (run / "plots").iterdir()}
    assert {"eps.png", "eps.svg", "training.png", "training.svg"} <= names
    assert len(names) == 24
    with Image.open(run / "plots" / "eps.png") as image:
        assert image.size == (688, 464)
    assert (run / "plots" / "eps.svg").read_text().startswith("<?xml")


def test_the_same_files_make_the_same_page(run: Path, tmp_path: Path) -> None:
    again = pages.write_run(tmp_path / "elsewhere")
    write_page(again, formats=("svg",))
    for name in ("report.html", "plots/eps.svg"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_the_gallery_shows_the_images_of_its_file(read: Reader) -> None:
    clean, perturbation, attacked = (
        np.asarray(Image.open(BytesIO(base64.b64decode(str(image["src"]).partition(",")[2]))))
        for image in read.all("img")[:3]
    )
    assert clean.tolist() == [[51, 0], [0, 0]]
    # 0.04 may be magnified ten times: 0.5 + 10 * 0.04 = 0.9.
    assert perturbation.tolist() == [[128, 230], [128, 128]]
    assert attacked.tolist() == [[51, 10], [0, 0]]
    assert "true cat : predicted cat, attacked \\x1b[31mred margin 2 → -0.1, linf 0.04" in read.text


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.5, 1), (0.9, 1), (0.25, 2), (8 / 255, 10), (0.001, 500), (0.0, 1)]
)
def test_a_perturbation_is_magnified_as_far_as_grey_has_room(largest: float, factor: int) -> None:
    assert magnification(np.array([0.0, -largest])) == factor


def test_an_old_run_says_what_is_left_out(tmp_path: Path) -> None:
    run = pages.write_run(
        tmp_path, curve=None, audit=None, certified=None, train=None,
        samples=pages.samples().drop(columns="worst_prediction"),
    )  # fmt: skip
    for name in ("gallery.npz", "manifest.json", "result.json"):
        (run / name).unlink()
    text = Reader(write_page(run).read_text()).text
    for reason in (
        "There is no curve.csv: the run was not audited (evaluation.audit).",
        "There is no certified.csv", "There is no train.csv: the run trained nothing.",
        "The confusion under attack is missing: an earlier version wrote samples.csv",
        "There are no examples: the run has no gallery.npz.", "There is no audit.csv",
        "There is no manifest.json: the run has not finished.",
    ):  # fmt: skip
        assert reason in text
    assert "80.0 % clean" in text


def test_a_training_alone_has_a_page(tmp_path: Path) -> None:
    tables = dict.fromkeys(("report", "samples", "curve", "audit", "certified"))
    text = Reader(write_page(pages.write_run(tmp_path, **tables)).read_text()).text
    assert "catastrophic overfitting" in text
    assert "worst case" not in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run with results: it has neither report\.csv"):
        write_page(tmp_path)
    run = pages.write_run(tmp_path / "run", curve=pd.DataFrame({"curve": ["eps"]}))
    with pytest.raises(InputError, match="is damaged"):
        write_page(run)
    assert not (run / "report.html").exists()


def named(module: object) -> set[str]:
    """The names of checks that the source of a module makes, as far as they are constants."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    } | {"NON_FINITE_GRADIENTS": audit.NON_FINITE_GRADIENTS}
    found = set()
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2]
        if called in ("graded", "weak"):
            first = node.args[0]
            name = first.value if isinstance(first, ast.Constant) else None
            name = constants.get(ast.unparse(first), name)
            found |= {str(name)} if name else set()
    return found


def test_every_check_of_an_audit_has_its_text() -> None:
    modules = audit, certification, verification, gradient_checks, radii
    names = set[str]().union(*map(named, modules))
    # Its name is made up of parts.
    names |= {"suite at eps 0 differs from clean by", audit.NON_FINITE_OUTPUTS}
    names |= {BROKEN_PROOFS, EXCEEDED_BOUNDS, verification.FAILURES}
    assert names == set(ADVICE)
    assert advice("suite at eps 0 differs from clean by (without own)") is not None


def test_numbers_are_written_in_one_way() -> None:
    assert [number(x) for x in (3.0, 0.123456, 1234567.8, None, float("nan"), "a")] == [
        "3", "0.1235", "1 234 568", "–", "–", "a",
    ]  # fmt: skip
    assert [percent(0.4567), percent(None)] == ["45.7 %", "–"]
    assert [duration(s) for s in (0.5, 90, 7200, None)] == ["0.5 s", "1.5 min", "2.0 h", "–"]
