"""Trials on disk, so that workers elsewhere open them without gathering anything again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from secateur.data.windows import Windows
from secateur.errors import SecateurError
from secateur.masks.ranking import Ranking
from secateur.masks.target import Scope, Target
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.run.trials import Fitness, Trials
from secateur.tensorfile import save_tensors

RANKINGS, WINDOWS = "rankings.safetensors", "windows.safetensors"


def write_trials(folder: Path, rankings: Mapping[str, Ranking], windows: Windows) -> None:
    """Keep sorted scores and search windows in ``folder``."""
    first = next(iter(rankings.values()))
    about = json.dumps({"scope": str(first.scope), "group": first.group})
    tokens: dict[str, Tensor] = {"ids": windows.ids.contiguous()}
    if windows.mask is not None:
        tokens["mask"] = windows.mask.contiguous()
    save_tensors(folder / WINDOWS, tokens)
    places = {name: r.places.cpu().contiguous() for name, r in rankings.items()}
    save_tensors(folder / RANKINGS, places, {"about": about})


def read_rankings(folder: Path) -> dict[str, Ranking] | None:
    """The sorted scores kept in ``folder``; None when there are none.

    Raises:
        SecateurError: the file is not whole.
    """
    path = folder / RANKINGS
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads(file.metadata()["about"])
            names = list(file.keys())
            scope = Scope.parse(about["scope"])
            return {n: Ranking(file.get_tensor(n), scope, about["group"]) for n in names}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SecateurError(
            f"the sorted scores cannot be read: {error}",
            field="file",
            value=str(path),
            fix="delete it and run again",
        ) from None


@dataclass(frozen=True)
class OpenTrials:
    """Opens the trials of a folder on a model loaded anew; picklable, for workers.

    Attributes:
        folder: where ``write_trials`` put them.
        model, dtype, device, trust_remote_code, blocks, include, exclude: as in the recipe.
        target, rungs, fitness, batch_tokens: as ``Trials`` wants them.
    """

    folder: Path
    model: str
    dtype: str
    device: str
    trust_remote_code: bool
    blocks: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    target: Target
    rungs: Sequence[int]
    fitness: Fitness
    batch_tokens: int

    def __call__(self) -> Trials:
        """Load the model and make its evaluator."""
        loaded = load(
            self.model,
            dtype=self.dtype,
            device=self.device,
            tokenizer=False,
            trust_remote_code=self.trust_remote_code,
            blocks=self.blocks,
        )
        view = ModelView.of(loaded.model, self.blocks, self.include, self.exclude)
        rankings = read_rankings(self.folder)
        if rankings is None:
            raise SecateurError("the sorted scores are gone", field="file", value=str(self.folder))
        tokens = load_file(self.folder / WINDOWS)
        return Trials(
            view,
            rankings,
            Windows(tokens["ids"], tokens.get("mask")),
            self.target,
            rungs=self.rungs,
            fitness=self.fitness,
            batch_tokens=self.batch_tokens,
            device=loaded.device,
        )
