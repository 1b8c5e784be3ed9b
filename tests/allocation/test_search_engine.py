"""The search on made-up fitness: better than luck, exact to its budget, the same after a kill."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from random import Random

import pytest

from secateur.allocation.projection import round_to_units
from secateur.allocation.search.engine import Evolution, SearchSettings
from secateur.allocation.search.executors import Processes, Serial, executor
from secateur.allocation.search.journal import Journal
from secateur.allocation.search.spaces import RatioSpace
from secateur.errors import MissingExtra, SecateurError, UsageError

BLOCKS, SIZE, S = 8, 1000, 0.7
PLANTED = [0.55, 0.6, 0.72, 0.7, 0.75, 0.78, 0.8, 0.7]


def to_plan(ratios):
    shift = S - sum(ratios) / len(ratios)
    moved = [min(max(r + shift, 0), 1) for r in ratios]
    return tuple(round_to_units(moved, [1] * BLOCKS, [SIZE] * BLOCKS, round(S * BLOCKS * SIZE)))


def space():
    return RatioSpace(BLOCKS, S, to_plan)


def distance(plan, rung=0):
    """Squared distance to the planted plan, in ten windows, the first of which are noisier."""
    true = sum((c / SIZE - p) ** 2 for c, p in zip(plan, PLANTED, strict=True))
    noise = Random(hash(plan)).gauss(0, 0.002) if rung == 0 else 0.0
    return (2 * (true + noise), 2.0) if rung == 0 else (8 * true, 8.0)


def exact(plan, rung):
    return sum((c / SIZE - p) ** 2 for c, p in zip(plan, PLANTED, strict=True)), 1.0


def run(evaluate=exact, rungs=1, journal=None, seeds=(), executor=None, **settings):
    return Evolution(
        space(),
        executor or Serial(evaluate),
        rungs=rungs,
        settings=SearchSettings(**settings),
        seeds=list(seeds),
        journal=journal,
    ).run()


def test_beats_random_search_at_equal_unique_evaluations_in_the_median_of_20_seeds():
    gains = []
    for seed in range(20):
        evolved = run(budget=150, seed=seed)
        draws, plans = Random(seed), set()
        while len(plans) < 150:
            plans.add(space().plan(space().draw(draws)))
        lucky = min(exact(plan, 0)[0] for plan in plans)
        assert len(evolved.history) == 150
        gains.append(evolved.best.value / lucky)
    assert statistics.median(gains) < 0.5


def test_best_never_rises_and_the_budget_holds_to_the_plan():
    calls = []

    def counting(plan, rung):
        calls.append((plan, rung))
        return distance(plan, rung)

    found = run(counting, rungs=2, budget=83, offspring=4)
    best = [line["best"] for line in found.history]
    assert all(a >= b for a, b in itertools.pairwise(best))
    assert len(found.history) == 83
    assert [rung for _, rung in calls].count(0) == 83
    assert len(set(calls)) == len(calls)  # nothing is evaluated twice
    full = [line for line in found.history if line["full"]]
    assert len(full) == [rung for _, rung in calls].count(1)
    assert len(full) < 83 / 2  # halving spares most of the second look
    assert found.best.value == min(line["value"] for line in full)
    assert found.best.full


def test_same_seed_same_history_another_seed_another():
    assert run(budget=40, seed=3).history == run(budget=40, seed=3).history
    assert run(budget=40, seed=3).history != run(budget=40, seed=4).history


def test_never_worse_than_the_seeds_even_when_the_first_look_misjudges_them():
    good = tuple(p - S for p in PLANTED)

    def misleading(plan, rung):
        value = exact(plan, 0)[0]
        return (-100 * value, 1.0) if rung == 0 else (1000 * value, 1.0)

    found = run(misleading, rungs=2, budget=60, seeds=[(0.0,) * BLOCKS, good])
    first = found.history[:2]
    assert all(line["full"] for line in first)
    assert found.best.value <= min(line["value"] for line in first)


def test_equal_plans_are_one_and_repeats_cost_nothing():
    seeds = [(0.0,) * BLOCKS, (1e-9,) * BLOCKS]
    found = run(budget=5, population=2, seeds=seeds)
    assert found.repeated >= 1
    assert len(found.history) == 5


@dataclass
class Few:
    """A space of three plans, one of them invalid."""

    def draw(self, random):
        return random.randrange(3)

    def mutate(self, one, random):
        return random.randrange(3)

    def cross(self, one, other, random):
        return max(one, other)

    def plan(self, one):
        return None if one == 0 else (one,)

    def text(self, one):
        return str(one)


def test_invalid_candidates_never_enter_and_an_exhausted_space_ends_the_search():
    seen = []
    found = Evolution(
        Few(), Serial(lambda plan, rung: (seen.append(plan) or -float(plan[0]), 1.0)),
        settings=SearchSettings(budget=50, population=4),
    ).run()  # fmt: skip
    assert sorted(seen) == [(1,), (2,)]
    assert found.exhausted
    assert found.invalid > 0
    assert found.best.candidate == 2


def test_values_that_are_not_finite_lose_to_everything():
    def often_nan(plan, rung):
        return (float("nan") if plan[0] % 2 else exact(plan, 0)[0], 1.0)

    found = run(often_nan, budget=60)
    assert found.best.value < float("inf")
    nothing = run(lambda plan, rung: (float("nan"), 1.0), budget=10)
    assert nothing.best.value == float("inf")


def test_nothing_valid_at_all_is_said():
    class Nothing(Few):
        def plan(self, one):
            return None

    with pytest.raises(UsageError, match="no candidate is valid"):
        Evolution(Nothing(), Serial(exact)).run()


@pytest.mark.parametrize(
    ("field", "value"), [("budget", 0), ("pool", 0.0), ("eta", 1), ("offspring", 0), ("top", 0)]
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UsageError) as caught:
        SearchSettings(**{field: value})
    assert caught.value.field == field


def test_a_budget_below_the_seeds_is_refused():
    with pytest.raises(UsageError, match="budget"):
        run(budget=1, seeds=[(0.0,) * BLOCKS, tuple(p - S for p in PLANTED)])


# -- resuming ----------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 7, 19, 20, 21, 44])
def test_killed_anywhere_it_ends_with_the_same_history(tmp_path, after):
    whole = run(distance, rungs=2, budget=40, offspring=3, seed=5)
    calls = []

    def mortal(plan, rung):
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return distance(plan, rung)

    path = tmp_path / "journal.jsonl"
    with pytest.raises(Killed):
        run(mortal, rungs=2, budget=40, offspring=3, seed=5, journal=Journal(path))
    with path.open("a") as file:
        file.write('{"plan": [1, 2')  # a line cut short
    resumed, again = [], Journal(path)
    assert again.read == after

    def counting(plan, rung):
        resumed.append(1)
        return distance(plan, rung)

    found = run(counting, rungs=2, budget=40, offspring=3, seed=5, journal=again)
    assert found.history == whole.history
    assert found.best.plan == whole.best.plan
    total = len(Journal(path))
    assert len(resumed) == total - after  # what was known was not asked again


def test_a_larger_budget_continues(tmp_path):
    path = tmp_path / "j"
    short = run(budget=30, seed=2, journal=Journal(path))
    asked = []
    long = run(
        lambda plan, rung: (asked.append(1), exact(plan, rung))[1],
        budget=50, seed=2, journal=Journal(path),
    )  # fmt: skip
    # The last generation of the short one may have been cut by its budget.
    assert long.history[:29] == short.history[:29]
    assert len(asked) <= 21


SCRIPT = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    from test_search_engine import run, distance
    from secateur.allocation.search.journal import Journal

    def slow(plan, rung):
        time.sleep(0.02)
        return distance_of(plan, rung)

    from test_search_engine import exact as distance_of
    run(slow, rungs=2, budget=400, seed=1, journal=Journal(Path(sys.argv[1])))
    """
)


def test_a_process_killed_outright_loses_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    here = os.path.dirname(__file__)
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), here])
    deadline = time.time() + 60
    while time.time() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    journal = Journal(path)
    assert journal.read >= 5
    for line in path.read_text().splitlines():
        json.loads(line)
    found = run(exact, rungs=2, budget=60, seed=1, journal=journal)
    assert found.history == run(exact, rungs=2, budget=60, seed=1).history


# -- workers -----------------------------------------------------------------------------------


def open_exact():
    return exact


def open_nothing():
    raise UsageError("no model here", field="model", value="x")


def test_processes_give_the_same_history_as_serial():
    alone = run(budget=40, seed=7, offspring=4, population=6)
    pool = Processes(open_exact, 2)
    try:
        many = run(budget=40, seed=7, offspring=4, population=6, executor=pool)
    finally:
        pool.close()
    assert many.history == alone.history


def test_what_goes_wrong_in_a_worker_is_told():
    pool = Processes(open_nothing, 1)
    try:
        with pytest.raises(SecateurError, match="no model here"):
            run(budget=10, executor=pool)
    finally:
        pool.close()


def die(plan, rung):
    os._exit(9)


def open_deadly():
    return die


def test_a_worker_that_dies_is_told():
    pool = Processes(open_deadly, 1)
    try:
        with pytest.raises(SecateurError, match="died"):
            run(budget=10, executor=pool)
    finally:
        pool.close()


def test_unknown_executors_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="unknown kind"):
        executor("threads", open_exact)
    with pytest.raises(UsageError, match="at least 1"):
        executor("serial", open_exact, 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"secateur\[ray\]"):
        executor("ray", open_exact, 1)


@pytest.mark.slow
def test_a_local_ray_gives_the_same_history(monkeypatch):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    alone = run(budget=24, seed=7, offspring=4, population=6)
    pool = executor("ray", open_exact, 2)
    try:
        many = run(budget=24, seed=7, offspring=4, population=6, executor=pool)
    finally:
        pool.close()
    assert many.history == alone.history
    import ray

    assert not ray.is_initialized()
