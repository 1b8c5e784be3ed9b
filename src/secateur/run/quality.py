"""Dense and pruned logits on the same windows, without holding two models.

Before the first cut the dense model's last hidden states are stored (tokens x width, small);
its head does not change, so its logits can be had again at any time, one batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from secateur.data.windows import Windows
from secateur.evidence.replay import Replay, Residency
from secateur.models.anatomy import ModelView
from secateur.progress import SILENT, Progress
from secateur.tensorfile import save_tensors


class FinalStates:
    """The last hidden states of every evaluation window, and the logits that follow.

    Args:
        view: the model, as it is now.
        windows: what is evaluated.
        batch_tokens: tokens per forward.
        device: where to compute.
        resident: makes a block present (streaming).
    """

    def __init__(
        self,
        view: ModelView,
        windows: Windows,
        *,
        batch_tokens: int,
        device: torch.device | str,
        resident: Residency | None = None,
    ) -> None:
        size = max(1, batch_tokens // windows.ids.shape[1])
        self.replay = Replay(
            view, windows.ids, windows.mask, batch_size=size, device=device, resident=resident
        )
        self.replay.start()
        self.fingerprint = windows.fingerprint
        self._outside: dict[str, Tensor] = {}
        self._where = {
            row.numpy().tobytes(): (b, i)
            for b, ids in enumerate(self.replay.ids)
            for i, row in enumerate(ids)
        }

    def remember_outside(self) -> None:
        """Keep what lies outside the blocks as it is now: training may change the head.

        The logits are then always those of this moment's final norm and head.
        """
        inside = {id(p) for block in self.replay.view.blocks for p in block.module.parameters()}
        self._outside = {
            name: parameter.detach().clone()
            for name, parameter in self.replay.view.model.named_parameters(remove_duplicate=False)
            if id(parameter) not in inside
        }

    @contextmanager
    def _as_remembered(self) -> Iterator[None]:
        """The remembered tensors in the model for a moment, where they differ."""
        now = dict(self.replay.view.model.named_parameters(remove_duplicate=False))
        swapped = {
            n: now[n].detach().clone()
            for n, kept in self._outside.items()
            if not torch.equal(now[n].detach(), kept)
        }
        try:
            for name in swapped:
                now[name].copy_(self._outside[name])
            yield
        finally:
            for name, value in swapped.items():
                now[name].copy_(value)

    def compute(self, progress: Progress = SILENT, label: str = "evaluating") -> FinalStates:
        """Run all blocks."""
        self.replay.to_end(progress, label)
        return self

    def load(self, path: Path) -> bool:
        """Take the states an earlier attempt saved; False when there are none that fit."""
        if not path.exists():
            return False
        try:
            with safe_open(str(path), "pt") as file:
                known = (file.metadata() or {}).get("windows")
            tensors = load_file(path, device=str(self.replay.device))
        except (SafetensorError, OSError):  # not ours, or torn: compute again
            return False
        if known != self.fingerprint:
            return False
        saved = [tensors[k] for k in sorted(tensors)]
        if [t.shape for t in saved] != [h.shape for h in self.replay.hidden]:
            return False
        self.replay.hidden = saved
        return True

    def save(self, path: Path) -> None:
        """Keep the states for a resumed run."""
        tensors = {f"{b:06d}": h.contiguous().cpu() for b, h in enumerate(self.replay.hidden)}
        save_tensors(path, tensors, {"windows": self.fingerprint})

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, L, V) of windows given by their token ids (B, L), in any batching."""
        out = []
        with self._as_remembered():
            for row in ids.cpu():
                batch, i = self._where[row.contiguous().numpy().tobytes()]
                out.append(self.replay.logits_of(batch, i))
        return torch.cat(out)
