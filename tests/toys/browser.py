"""A page in a real browser, headless Chromium, without anything but what it ships.

The page is served by this process, and shown in frames of several widths. Their parent measures
them, and reads what the browser has noted of their requests: the page itself runs no script.
"""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from toys.command_line import PATIENCE

FOUND = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needed = pytest.mark.skipif(FOUND is None, reason="no Chromium is installed (apt install chromium)")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-default-apps", "--hide-scrollbars",
    "--enable-logging=stderr",
)  # fmt: skip

# Pixels: a phone and a desktop.
WIDTHS = (400, 1400)

# Measures each frame once it is loaded, and writes what it found into the page.
FRAMES = """<!DOCTYPE html><link rel="icon" href="data:,"><body>%s<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const inside = (text, box) => text.left >= box.left - 2 && text.right <= box.right + 2
      && text.top >= box.top - 2 && text.bottom <= box.bottom + 2;
    const cut = [...page.querySelectorAll("svg")].flatMap(svg =>
      [...svg.querySelectorAll("text")].filter(text =>
        !inside(text.getBoundingClientRect(), svg.getBoundingClientRect())
      ).map(text => text.textContent));
    const style = page.defaultView.getComputedStyle(page.body);
    return {width: root.clientWidth, needed: root.scrollWidth, cut: cut,
      requests: page.defaultView.performance.getEntriesByType("resource").map(one => one.name),
      text: style.color, background: style.backgroundColor, broken: [...page.images].filter(
        image => !image.naturalWidth).length};
  });
  document.title = JSON.stringify(seen);
});
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page.

    Parameters
    ----------
    frames
        For each of the `WIDTHS` what was measured.
    console
        The messages of its console, among them those of requests that its policy forbids.
    """

    frames: list[dict[str, Any]]
    console: list[str]


def look(page: Path, *, dark: bool = False) -> Seen:
    """Show a page at the `WIDTHS`."""
    frames = "".join(
        f'<iframe src="/page.html?{width}" width="{width}" height="900"></iframe>'
        for width in WIDTHS
    )
    files = {"/frames.html": (FRAMES % frames).encode(), "/page.html": page.read_bytes()}
    with _served(files) as address:
        scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
        done = _chromium(
            scheme, "--window-size=1900,1000", "--virtual-time-budget=10000", "--dump-dom",
            f"{address}/frames.html",
        )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout + done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(unescape(title[1])), console)


def printed(page: Path, to: Path) -> bytes:
    """The page as a PDF."""
    _chromium(f"--print-to-pdf={to}", page.resolve().as_uri())
    return to.read_bytes()


def _chromium(*words: str) -> subprocess.CompletedProcess[str]:
    assert FOUND is not None
    command = [FOUND, *OPTIONS, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)


@contextmanager
def _served(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a server of these files."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.send_response(200 if path in files else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(files.get(path, b""))

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
