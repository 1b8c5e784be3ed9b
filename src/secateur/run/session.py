"""A loaded model and everything a recipe leaves to defaults, resolved; nothing changed yet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur import __version__
from secateur.allocation import Allocator, allocators
from secateur.data.windows import Windows, calibration_windows, evaluation_windows
from secateur.errors import UsageError
from secateur.evidence.readings import Reading
from secateur.evidence.replay import Replay, Residency
from secateur.masks.target import Scope
from secateur.methods import Described, Method, Need, methods
from secateur.methods.base import Update
from secateur.models.anatomy import Block, ModelView
from secateur.models.loading import Loaded, load
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe
from secateur.run.quality import FinalStates
from secateur.run.ranks import Ranks


@dataclass
class Session:
    """A loaded model and everything resolved from the recipe; the steps of a run share it."""

    recipe: Recipe
    loaded: Loaded
    view: ModelView
    method: Described
    scope: Scope
    update: Update
    device: torch.device
    progress: Progress
    resident: Residency | None = None
    calibration: Windows | None = None
    evaluation: Windows | None = None
    timing: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def ranker(self) -> Method:
        """The method, where single weights are pruned; any other is a UsageError."""
        if not isinstance(self.method, Method):
            raise UsageError(
                "removes whole units, and this is about single weights",
                field="method",
                value=self.recipe.method,
                fix="secateur prune --method ..., or another method here",
            )
        return self.method

    @property
    def needs(self) -> frozenset[Need]:
        """Evidence of the method and of the survivors' update together."""
        return needs(self.method, self.update)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every matrix to prune."""
        return {m.name: m.shape for m in self.view.matrices()}

    def present(self, block: Block) -> AbstractContextManager[Any]:
        """The block's weights in memory, as long as the context lasts."""
        return nullcontext() if self.resident is None else self.resident(block)

    @contextmanager
    def timed(self, account: str) -> Iterator[None]:
        """Add the time of a step to the run's record."""
        start = time.perf_counter()
        yield
        self.timing[account] = self.timing.get(account, 0.0) + time.perf_counter() - start

    def replay(self, windows: Windows, batch_size: int | None = None) -> Replay:
        """A started replay of this rank's share of ``windows``."""
        tokens = self.recipe.calibration.batch_tokens
        size = batch_size or max(1, tokens // windows.ids.shape[1])
        return Replay(
            self.view,
            self.ranks.share(windows.ids),
            None if windows.mask is None else self.ranks.share(windows.mask),
            batch_size=size,
            device=self.device,
            resident=self.resident,
        ).start()

    def states(self, windows: Windows) -> FinalStates:
        """Evaluation states of the model as it is now (not yet computed)."""
        return FinalStates(
            self.view,
            windows,
            batch_tokens=self.recipe.calibration.batch_tokens,
            device=self.device,
            resident=self.resident,
        )


def resolve(recipe: Recipe) -> tuple[Described, Scope, Update]:
    """The method, with what the recipe leaves open filled in from the method's defaults."""
    method = methods[recipe.method].with_options(recipe.options)
    scope = Scope.parse(recipe.scope) if recipe.scope else method.scope
    return method, scope, recipe.update or method.update


def needs(method: Described, update: Update) -> frozenset[Need]:
    """Evidence of a method and of the survivors' update together."""
    return method.requirements() | ({Need.GRAM} if update != "none" else frozenset())


def allocator_of(recipe: Recipe) -> Allocator | None:
    """The recipe's allocator with its options; None when the allocation is a saved plan.

    Raises:
        UsageError: neither an allocator nor a plan; unknown or wrong options.
    """
    name, options = recipe.allocator
    if name.endswith(".json"):
        if options:
            raise UsageError("a saved plan has no options", field="allocation", value=options)
        return None
    if recipe.scope is not None and Scope.parse(recipe.scope).kind == "global":
        name, options = "global", {}
    return allocators[name].with_options(options)


def readings_of(recipe: Recipe) -> tuple[Reading, ...]:
    """What the recipe's allocator reads off the dense model."""
    allocator = allocator_of(recipe)
    return () if allocator is None else allocator.readings()


def prepare(
    recipe: Recipe,
    loaded: Loaded | None = None,
    calibration: Any = None,
    progress: Progress = SILENT,
) -> Session:
    """Load the model and resolve what the recipe leaves to defaults; nothing is changed yet."""
    ranks = Ranks.from_environment(recipe.device)  # first: it chooses this process's GPU
    method, scope, update = resolve(recipe)
    repairs = update != "none" or getattr(method, "driver", None) == "blocks"
    if recipe.reconstruct == "dense" and not repairs:
        raise UsageError(
            f"survivors are not updated with update={update!r}, so they cannot be fitted to anything",
            field="reconstruct",
            value="dense",
            fix="--update exact, or reconstruct: block",
        )
    if loaded is None:
        with progress.stage(f"loading {recipe.model}", total=1) as advance:
            loaded = load(
                recipe.model,
                dtype=recipe.dtype,
                device=recipe.device,
                stream=recipe.stream,
                trust_remote_code=recipe.trust_remote_code,
                blocks=recipe.blocks,
            )
            advance(1)
    streamed = loaded.streamed
    view = ModelView.of(loaded.model, recipe.blocks, recipe.include, recipe.exclude)
    session = Session(
        recipe=recipe,
        loaded=loaded,
        view=view,
        method=method,
        scope=scope,
        update=update,
        device=loaded.device,
        progress=progress,
        resident=None if streamed is None else streamed.resident,
        ranks=ranks,
    )
    spec = recipe.calibration
    reads = any(r.inputs or r.sample for r in readings_of(recipe))
    if session.needs or reads:
        session.calibration = calibration_windows(
            spec.text if calibration is None else calibration,
            loaded.tokenizer,
            samples=spec.samples,
            length=loaded.window(spec.length, "calibration.length"),
            seed=spec.seed,
            vocabulary=loaded.vocabulary,
        )
    if recipe.evaluation is not None:
        if loaded.tokenizer is None:
            raise UsageError("measuring quality needs a tokenizer", field="tokenizer", value=None)
        session.evaluation = evaluation_windows(
            recipe.evaluation.text,
            loaded.tokenizer,
            loaded.window(recipe.evaluation.length, "evaluation.length"),
            limit=recipe.evaluation.windows,
            vocabulary=loaded.vocabulary,
        )
    return session


def identity(session: Session) -> dict[str, Any]:
    """Everything the pruned weights depend on, and nothing else."""
    recipe = session.recipe.model_dump(mode="json")
    plan = Path(session.recipe.allocator[0])
    if plan.suffix == ".json" and plan.exists():
        recipe["allocation"] = hashlib.sha256(plan.read_bytes()).hexdigest()
    for key in ("evaluation", "model", "stream", "device", "trust_remote_code"):
        recipe.pop(key)
    return {
        "secateur": __version__,
        "model": session.loaded.fingerprint,
        "calibration": None if session.calibration is None else session.calibration.fingerprint,
        "threads": torch.get_num_threads() if session.device.type == "cpu" else None,
        "device": session.device.type,
        "ranks": session.ranks.world,
        **{f"recipe.{k}": v for k, v in recipe.items()},
    }
