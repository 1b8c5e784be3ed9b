"""The trial a searching allocator is given: a plan's value on a split never evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.allocation.search.journal import Journal
from secateur.data.overlap import refuse_overlap
from secateur.data.windows import Windows, calibration_windows
from secateur.errors import UsageError
from secateur.evidence.score_summary import ScoreSummary
from secateur.evidence.store import digest
from secateur.masks.ranking import Ranking
from secateur.run.session import Session
from secateur.run.trials import Trials

Scores = Callable[[], Iterator[tuple[str, Tensor]]]


def search_windows(session: Session) -> Windows:
    """The windows plans are tried on: the recipe's search text, or more of the calibration's.

    Raises:
        UsageError: they share text with the evaluation's, or there is no text to draw from.
    """
    spec, calibration = session.recipe.search, session.recipe.calibration
    if spec.text is None and calibration.text == "given":
        if session.calibration is None:
            raise UsageError("there is no text to try plans on", field="search.text", value=None)
        chosen = slice(0, spec.samples)
        ids, mask = session.calibration.ids[chosen], session.calibration.mask
        windows = Windows(ids, None if mask is None else mask[chosen], {"source": "calibration"})
    else:
        length = calibration.length if spec.length is None else spec.length
        windows = calibration_windows(
            calibration.text if spec.text is None else spec.text,
            session.loaded.tokenizer,
            samples=spec.samples,
            length=session.loaded.window(length, "search.length"),
            seed=spec.seed,
            vocabulary=session.loaded.vocabulary,
        )
    if session.evaluation is not None:
        refuse_overlap(windows, session.evaluation)
    return windows


def sorted_scores(
    session: Session, scores: Scores, *, summaries: bool = False
) -> tuple[dict[str, Ranking], list[ScoreSummary]]:
    """Every matrix's scores sorted, weights that are zero already first, as the engine has them.

    Args:
        scores: the method's scores of every matrix, in the model's order.
        summaries: also summarise them, a block each.
    """
    blocks = [b for b in session.view.blocks if b.matrices]
    place = {m.name: i for i, b in enumerate(blocks) for m in b.matrices}
    found = [ScoreSummary() for _ in blocks] if summaries else []
    rankings: dict[str, Ranking] = {}
    matrices = {m.name: m for m in session.view.matrices()}
    for name, score in scores():
        if summaries:
            found[place[name]].update(score, name)
        score = score.masked_fill(matrices[name].tensor() == 0, float("-inf"))
        group = session.recipe.target.group
        rankings[name] = Ranking.of(score, session.scope, group, name)
    return rankings, found


class Trial:
    """``trial(plan)``: nats per token, lower is better; nothing is gathered until first called.

    Args:
        session: the dense model, resolved.
        scores: the method's scores of every matrix, in the model's order.
        root: folder where values are noted, so that a killed run does not try a plan twice.
    """

    def __init__(self, session: Session, scores: Scores, root: Path | None = None) -> None:
        self.session, self.scores, self.root = session, scores, root
        self.windows: Windows | None = None
        self.journal = Journal()
        self.trials: Trials | None = None

    def __call__(self, plan: Plan) -> float:
        """The value of ``plan``; a plan tried before costs nothing."""
        job = (tuple(plan.counts[name] for name in self.session.shapes), 0)
        if self.windows is None:
            self.windows = self._begin()
        if job not in self.journal:
            if self.trials is None:
                self.trials = self._open(self.windows)
            self.journal.note(job, self.trials(*job))
        total, tokens = self.journal[job]
        return total / tokens

    def _begin(self) -> Windows:
        """The search windows, and what an earlier attempt noted about them."""
        session, recipe = self.session, self.session.recipe
        if session.resident is not None:
            raise UsageError(
                "trying plans needs the model in memory",
                field="stream",
                value=True,
                fix="give the allocator what it would search, or drop --stream",
            )
        windows = search_windows(session)
        # Ranks open together or not at all: a journal one of them has would part them.
        if self.root is not None and session.ranks.world == 1:
            key = {
                "model": session.loaded.fingerprint,
                "calibration": getattr(session.calibration, "fingerprint", None),
                "search": windows.fingerprint,
                "method": recipe.method,
                "options": recipe.options,
                "scope": str(session.scope),
                "target": str(recipe.target),
                "fitness": recipe.search.fitness,
                "matrices": list(session.shapes),
            }
            self.journal = Journal(self.root / f"trials-{digest(key)}.jsonl")
        return windows

    def _open(self, windows: Windows) -> Trials:
        session = self.session
        return Trials(
            session.view,
            sorted_scores(session, self.scores)[0],
            windows,
            session.recipe.target,
            rungs=[len(windows)],
            fitness=session.recipe.search.fitness,
            batch_tokens=session.recipe.calibration.batch_tokens,
            device=session.device,
            progress=session.progress,
        )
