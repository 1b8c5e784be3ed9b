"""Every shipped recipe is valid and documented; the small one really runs."""

import re
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.recipe import Recipe, read_recipe
from secateur.recipe_vision import VisionRecipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_documented(path):
    recipe = Recipe.load(path)
    assert recipe.target.sparsity > 0
    assert Recipe.build(recipe.model_dump()) == recipe
    assert f"recipes/{path.name}" in (ROOT / "docs" / "recipes.md").read_text()
    command = re.search(r"^#   secateur run (\S+) --out \S+", path.read_text(), re.M)
    assert command, "a recipe says how it is run"
    assert command[1] == f"recipes/{path.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "vision").glob("*.yaml")), ids=str)
def test_vision_recipe_is_valid_and_documented(path):
    recipe = VisionRecipe.build(read_recipe(path))
    assert VisionRecipe.build(recipe.model_dump()) == recipe
    assert f"recipes/vision/{path.name}" in (ROOT / "docs" / "recipes.md").read_text()
    assert f"#   secateur run recipes/vision/{path.name} --out" in path.read_text()


def test_there_are_recipes():
    assert len(RECIPES) >= 4


def test_tiny_recipe_runs(tmp_path):
    out = tmp_path / "out"
    assert main(["run", str(ROOT / "recipes" / "tiny.yaml"), "--out", str(out), "--json"]) == 0
    assert main(["verify", str(out), "--quick", "--json"]) == 0


def test_demo_recipe_is_what_the_demo_runs(tmp_path, monkeypatch):
    class Seen(Exception):
        """Stops the demo before it does any work."""

    seen = []

    def execute(recipe, **_):
        seen.append(recipe)
        raise Seen

    monkeypatch.setattr("secateur.run.runner.execute", execute)
    with pytest.raises(Seen):
        main(["demo", "--out", str(tmp_path / "demo")])
    assert seen == [Recipe.load(ROOT / "recipes" / "demo.yaml")]


@pytest.mark.parametrize("written", ["2:4", "'2:4'", '"2:4"'])
def test_a_pattern_needs_no_quotes(tmp_path, written):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: tiny\nsparsity: {written}\ncalibration: {{samples: 8, seed: 12}}\n")
    recipe = Recipe.load(path)
    assert str(recipe.target) == "2:4"
    assert (recipe.calibration.samples, recipe.calibration.seed) == (8, 12)
