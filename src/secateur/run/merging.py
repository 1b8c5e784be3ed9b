"""An adapter that was trained elsewhere, merged into a cut model: nothing is trained here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.models.anatomy import ModelView
from secateur.models.loading import Loaded
from secateur.run.recovery import round_to_stored
from secateur.training.masked import check_masks, prove_zeros
from secateur.training.peft_format import CONFIG, WEIGHTS, import_peft, lost_on_zeros


@dataclass
class Merger:
    """Stands where a ``Recoverer`` would: PEFT's adapter is merged, and what is gone stays gone.

    Attributes:
        folder: of the adapter.
        teacher: makes the dense model, to compare with.
    """

    folder: Path
    loaded: Loaded
    view: ModelView
    teacher: Callable[[], nn.Module] | None = None
    needs_teacher: bool = False

    @classmethod
    def of(
        cls, folder: Path, loaded: Loaded, view: ModelView, masks: Mapping[str, Tensor]
    ) -> Merger:
        """Try the adapter on, and take it off again.

        Raises:
            UsageError: it does not fit; see ``import_peft``.
        """
        import_peft(view, masks, folder).detach()
        return cls(folder, loaded, view)

    @property
    def identity(self) -> str:
        """Hash of the adapter's two files."""
        both = b"".join((self.folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
        return hashlib.sha256(both).hexdigest()

    def structure(self) -> dict[str, Any]:
        """See ``Recoverer``; nothing is added."""
        return {"added_biases": False, "untied": False}

    def recover(self, masks: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Any]:
        """Merge, prove the zeros, and say what was done."""
        started = time.perf_counter()
        before = check_masks(self.view, masks)
        total = sum(p.numel() for p in self.view.model.parameters())
        adapters = import_peft(self.view, masks, self.folder)
        kinds = {module.kind for module in adapters.modules.values()}
        ranks = {module.lora_a.shape[0] for module in adapters.modules.values()}
        own = sum(p.numel() for p in adapters.parameters().values())
        lost = lost_on_zeros(adapters)
        adapters.merge()
        round_to_stored(self.view.model, self.loaded.stored)
        return {
            "method": "adapter",
            "train": sorted(kinds),
            "adapter": {"kind": "peft", "rank": max(ranks), "folder": self.folder.name},
            "lost_on_zeros": lost,
            "steps": 0,
            "trained": own,
            "total": total,
            "share": own / max(1, total),
            "zeros": prove_zeros(self.view, masks, before),
            "seconds": round(time.perf_counter() - started, 3),
        }
