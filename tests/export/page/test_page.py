"""The page as a browser's parser sees it, and in a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from batchpipe.commands.report import report_command
from batchpipe.runner.result import Page, Result
from batchpipe.write.place import open_place
from tests.export.page.page_cases import done, failed, make_output

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "br", "line", "rect", "polyline"}


class Outline(HTMLParser):
    """Tags that are open, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    bad = [failed(index, "wrong_type", "<script>alert(1)</script> & more") for index in range(2)]
    return make_output(tmp_path / "out", [[*bad, *(done(index, 4 * index, 30) for index in range(2, 40))]], num_runs=2)


def page_of(folder: Path) -> tuple[str, Outline]:
    said = report_command(str(folder), None)
    page = (folder / "_report.html").read_text()
    assert said == {
        "page": str(folder / "_report.html"),
        "bytes": len(page.encode()),
        "completions": said["completions"],
    }
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return page, outline


def test_the_page_holds_the_counts_and_asks_for_nothing(output: Path) -> None:
    page, outline = page_of(output)
    text = " ".join(outline.text)
    for words in ("quickstart", "40 completions", "2 failed", "wrong_type", "r0", "Over time, run 2 of 2", "0:02:00"):
        assert words in re.sub(r"\s+", " ", text), words
    assert outline.tags.count("svg") == 2 + 2 * 6
    assert "script" not in outline.tags and "&lt;script&gt;" in page
    assert not re.search(r"https?://|@import|url\(|src=|href=", page)


def test_pages_of_unusual_outputs(tmp_path: Path) -> None:
    page, _ = page_of(make_output(tmp_path / "empty", [], num_runs=0))
    assert "No completions are committed yet" in page and "No run has ended yet" in page
    page, _ = page_of(make_output(tmp_path / "failed", [[failed(0, "empty_prompt", "nothing")]]))
    assert "Failed rows" in page
    folder = make_output(tmp_path / "going", [[done(0, 5)]])
    (folder / "_SUCCESS").unlink()
    assert "not finished" in page_of(folder)[0]


def test_a_notebook_shows_it_in_a_frame(output: Path) -> None:
    shown = Result(open_place(str(output)), {}, 0).report()
    assert isinstance(shown, Page) and shown.startswith("<!doctype html>")
    assert shown._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def test_the_file_may_lie_elsewhere(output: Path, tmp_path: Path) -> None:
    assert report_command(str(output), tmp_path / "page.html")["page"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert not (output / "_report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_it_and_nothing_leaves_it(output: Path, tmp_path: Path) -> None:
    page_of(output)
    log, picture = tmp_path / "net.json", tmp_path / "page.png"
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1800", f"--log-net-log={log}",
        f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking", "--disable-component-update",
        "--no-first-run", f"--screenshot={picture}", f"file://{output / '_report.html'}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000
    urls = re.findall(r'"url":"(https?://[^"]+)"', log.read_text())
    own = ("google", "gstatic", "gvt1")  # what Chromium asks for by itself
    assert [url for url in urls if not any(name in url for name in own)] == []
