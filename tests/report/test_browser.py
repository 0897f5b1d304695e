"""Pages in a real browser: what they ask for, what they complain of, and whether they fit."""

import re
from pathlib import Path

import pytest

from robusttrain.report.page import document
from robusttrain.report.run.page import write_page
from toys import browser, pages

pytestmark = pytest.mark.filterwarnings("ignore::robusttrain.errors.IdentityWarning")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = pages.write_run(tmp_path_factory.mktemp("run"))
    return write_page(run, formats=())


@browser.needed
def test_a_page_fits_a_phone_and_a_desktop_and_asks_for_nothing(page: Path) -> None:
    seen = browser.look(page)
    assert seen.console == []
    assert [frame["width"] for frame in seen.frames] == list(browser.WIDTHS)
    for frame in seen.frames:
        assert frame["needed"] == frame["width"]
        assert frame["requests"] == []
        assert frame["cut"] == []
        assert frame["broken"] == 0
        assert brightness(frame["background"]) > 0.9 > 0.3 > brightness(frame["text"])


@browser.needed
def test_a_page_is_dark_where_the_reader_wants_that(page: Path) -> None:
    seen = browser.look(page, dark=True)
    assert seen.console == []
    for frame in seen.frames:
        assert brightness(frame["text"]) > 0.8 > 0.2 > brightness(frame["background"])


@browser.needed
def test_a_page_prints(page: Path, tmp_path: Path) -> None:
    pdf = browser.printed(page, tmp_path / "page.pdf")
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


@browser.needed
def test_the_browser_sees_what_would_be_wrong(tmp_path: Path) -> None:
    """A page that asks, complains and does not fit: the tests above would notice."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!DOCTYPE html><body style="margin:0"><img src="http://elsewhere.test/x.png">'
        '<div style="width:900px">wide</div><script>console.log("said")</script>'
        '<svg width="50" height="20"><text x="40" y="10">overlong</text></svg>'
    )
    seen = browser.look(bad)
    assert sum('"said"' in line for line in seen.console) == len(browser.WIDTHS)
    assert seen.frames[0]["requests"] == ["http://elsewhere.test/x.png"]
    assert [frame["needed"] > frame["width"] for frame in seen.frames] == [True, False]
    assert seen.frames[0]["cut"] == ["overlong"]
    assert seen.frames[0]["broken"] == 1


def brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / (3 * 255)


def palettes() -> dict[str, dict[str, str]]:
    """The colours of the style sheet by theme."""
    folder = Path(document.__file__).parent
    light, dark = re.findall(r":root \{(.*?)\}", (folder / "style.css").read_text(), re.DOTALL)[:2]
    return {
        theme: dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for theme, block in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "muted", "blue", "pass", "warn", "fail"])
def test_text_has_contrast_in_both_themes(theme: str, name: str) -> None:
    colours = palettes()[theme]
    for ground in ("paper", "tint"):
        low, high = sorted(luminance(colours[key]) for key in (name, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["blue", "vermilion", "green", "purple", "sky", "orange"])
def test_lines_stand_out_in_both_themes(theme: str, name: str) -> None:
    colours = palettes()[theme]
    low, high = sorted(luminance(colours[key]) for key in (name, "paper"))
    assert (high + 0.05) / (low + 0.05) >= 2.1
