"""The pages in a real browser: scripts run, nothing is logged, nothing is fetched."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.report import write_comparison, write_report

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
    "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000",
)  # fmt: skip


def browse(chromium: str, page: Path, folder: Path, *more: str) -> tuple[str, str]:
    """Standard output and console lines of one visit."""
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture
def pages(
    result: Callable[..., dict[str, Any]], comparison: dict[str, Any], tmp_path: Path
) -> dict[str, Path]:
    return {
        "run": write_report(result(), tmp_path / "run")["html"],
        "comparison": write_comparison(comparison, tmp_path / "comparison")["html"],
        "empty": write_report({}, tmp_path / "empty")["html"],
    }


@pytest.mark.parametrize("name", ["run", "comparison", "empty"])
def test_scripts_run_without_errors(
    name: str, pages: dict[str, Path], chromium: str, tmp_path: Path
) -> None:
    dom, console = browse(chromium, pages[name], tmp_path, "--dump-dom")
    assert console == ""
    head = re.search(r"<html[^>]*>", dom)
    assert head is not None
    assert 'data-ready="true"' in head[0]
    assert "data-errors" not in head[0]
    if name == "run":
        panels = re.findall(r'<div class="explorer"( hidden="")?>', dom)
        assert panels.count("") == 1  # one mask is shown, the others wait in the list
        assert len(panels) > 5
        assert len(re.findall(r"<th [^>]*><button>", dom)) >= 9


def test_hostile_names_run_nothing(
    result: Callable[..., dict[str, Any]], chromium: str, tmp_path: Path
) -> None:
    run = result(blocks=1)
    bad = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    run["model"]["name"] = run["modules"][0]["name"] = run["command"] = bad
    page = write_report(run, tmp_path / "run")["html"]
    dom, console = browse(chromium, page, tmp_path, "--dump-dom")
    assert console == ""
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title is not None
    assert not title[1].startswith("hacked")


@pytest.mark.parametrize("width", [1200, 500])
def test_screenshot_is_not_blank(
    width: int, pages: dict[str, Path], chromium: str, tmp_path: Path
) -> None:
    shot = tmp_path / "shot.png"
    browse(chromium, pages["run"], tmp_path, f"--screenshot={shot}", f"--window-size={width},2000")
    data = shot.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, 2000)
    assert len(data) > 50_000  # a blank page of this size takes a tenth of that
