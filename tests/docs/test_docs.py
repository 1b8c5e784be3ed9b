"""Every code block of the docs runs: ``python`` as Python, ``bash`` lines as commands.

A fence with ``no-run`` is shown but not run (it needs a network, a large model or a GPU). The
blocks of one page share a folder and, for Python, their names, from top to bottom.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from secateur.allocation import allocators
from secateur.cli import main
from secateur.methods import methods
from secateur.recipe import Calibration, Evaluation, Recipe, Recovery, Search, Structure
from secateur.recipe_parts import Pretraining
from secateur.recipe_vision import VisionEvaluation, VisionRecipe, VisionStructure, VisionTraining

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)


def blocks(page):
    for match in FENCE.finditer(page.read_text()):
        language, flags, body = match.groups()
        if language in ("python", "bash") and "no-run" not in flags:
            yield language, body


def commands(body):
    """The ``secateur`` lines of a bash block, continuation lines joined."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "secateur":
            yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # What a page registers stays on that page.
    monkeypatch.setattr(methods, "_table", dict(methods._table))
    monkeypatch.setattr(allocators, "_table", dict(allocators._table))
    names = {"__name__": "docs"}
    for language, body in blocks(page):
        if language == "python":
            exec(compile(body, page.name, "exec"), names)
            continue
        for words in commands(body):
            code = main(words)
            assert code == 0, (
                f"{page.name}: secateur {shlex.join(words)}\n{capsys.readouterr().err}"
            )


def test_internal_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(
            r"\]\(([^)#:]+\.(?:md|py|yaml|json|svg|png))[^)]*\)", page.read_text()
        ):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_method_has_a_page():
    text = " ".join(p.read_text() for p in (ROOT / "docs").rglob("*.md"))
    # Other tests register methods of their own in the same process.
    for name in (n for n in methods if methods[n].__module__.startswith("secateur.")):
        assert f"`{name}`" in text, f"no page of the docs speaks of `{name}`"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"([\w/-]+\.md)", nav)) == pages


@pytest.mark.parametrize(
    "part", [Recipe, Calibration, Evaluation, Recovery, Search, Structure, Pretraining]
)
def test_every_key_of_a_recipe_is_documented(part):
    page = (ROOT / "docs" / "recipes.md").read_text()
    for name in part.model_fields:
        assert f"`{name}`" in page, f"docs/recipes.md does not speak of `{name}`"


@pytest.mark.parametrize(
    "part",
    [VisionRecipe, VisionStructure, VisionTraining, VisionEvaluation],
    ids=lambda p: p.__name__,
)
def test_every_key_of_a_vision_recipe_is_documented(part):
    page = (ROOT / "docs" / "vision.md").read_text()
    for name in part.model_fields:
        assert f"`{name}`" in page, f"docs/vision.md does not speak of `{name}`"


def test_the_example_method_is_short_and_announced_rightly():
    page = (ROOT / "docs" / "extending.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1]
    assert len(code.splitlines()) <= 30
    toml = tomllib.loads(re.search(r"^```toml\n(.*?)^```", page, re.M | re.S)[1])
    (group,) = toml["project"]["entry-points"]
    assert group == methods.group
    assert toml["project"]["entry-points"][group]["tempered"].endswith(":Tempered")
