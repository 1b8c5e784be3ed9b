"""``secateur.prune`` fills in what is left open exactly as the recipe does."""

import pytest

import secateur
from secateur.errors import UsageError

SMALL = {"samples": 4, "length": 16}


def test_quality_chooses_the_method_unless_one_is_named(tiny_folder):
    door = tiny_folder()
    good = secateur.prune(door, quality="good", **SMALL).report
    named = secateur.prune(door, quality="good", method="wanda", **SMALL).report
    plain = secateur.prune(door, **SMALL).report
    assert [good["recipe"]["method"], good["resolved"]["update"]] == ["sparsegpt", "exact"]
    assert [named["recipe"]["method"], named["resolved"]["update"]] == ["wanda", "exact"]
    assert [plain["recipe"]["method"], plain["resolved"]["update"]] == ["wanda", "none"]
    assert good["quality"] is None, "no evaluation was asked for"


def test_evaluation_takes_a_text_or_its_fields(tiny_folder):
    fields = {"text": "pydoc:test", "length": 16, "windows": 2, "speed": False}
    report = secateur.prune(tiny_folder(), evaluation=fields, **SMALL).report
    assert report["quality"]["protocol"]["windows"] == 2
    assert report["speed"] is None
    assert secateur.prune(tiny_folder(), **SMALL).report["quality"] is None


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}, {"evaluation": {"lenght": 8}}])
def test_a_wrong_value_is_a_usage_error(tiny_folder, wrong):
    with pytest.raises(UsageError):
        secateur.prune(tiny_folder(), **{**SMALL, **wrong})
