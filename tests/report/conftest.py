"""The sample run as fixtures, and a headless browser where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from report_sample import sample_comparison, sample_result

_VOID = {"meta", "link", "br", "input", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers ids, text and every address the page names."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "action", "data"):
                self.addresses.append(str(value))
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture
def result() -> Callable[..., dict[str, Any]]:
    return sample_result


@pytest.fixture
def comparison() -> dict[str, Any]:
    return sample_comparison()


@pytest.fixture
def parse() -> Callable[[str], Page]:
    return Page


@pytest.fixture(scope="session")
def chromium() -> str:
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    return found
