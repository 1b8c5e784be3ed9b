"""A streamed model computes what a resident one does, in the memory of one block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import NumericsError, SecateurError
from secateur.models.anatomy import ModelView, capture_inputs
from secateur.models.saving import block_state
from secateur.models.shards import SafetensorsFolder, write_shard
from secateur.models.streaming import StreamedModel
from secateur.models.tiny import FAMILIES, synthetic_llama

Save = Callable[..., tuple[Any, Path]]


@contextmanager
def _one_block_at_a_time(streamed: StreamedModel) -> Iterator[list[int]]:
    """Bring each block in as its forward begins, and out as it ends; yields the order seen."""
    order: list[int] = []
    open_now: list[ExitStack] = []

    def enter(block: Any) -> None:
        order.append(block.index)
        stack = ExitStack()
        stack.enter_context(streamed.resident(block))
        open_now.append(stack)
        present = [m.name for m in streamed.view.matrices() if not m.stored.is_meta]
        assert present == [m.name for m in block.matrices]

    with ExitStack() as hooks:
        for block in streamed.view.blocks:
            for handle in (
                block.module.register_forward_pre_hook(lambda *_, b=block: enter(b)),
                block.module.register_forward_hook(lambda *_: open_now.pop().close()),
            ):
                hooks.callback(handle.remove)
        yield order


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_resident_ones(family: str, saved: Save, ids: Tensor) -> None:
    model, folder = saved(family)
    streamed = StreamedModel.open(folder)
    with torch.no_grad(), _one_block_at_a_time(streamed) as order:
        assert torch.equal(streamed.model(ids).logits, model(ids).logits)
    assert order == [0, 1]
    assert all(m.stored.is_meta for m in streamed.view.matrices())
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    ours = streamed.model
    same = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert same == tied


def test_capture_and_writing_work_on_a_resident_block(saved: Save, ids: Tensor) -> None:
    model, folder = saved("mixtral")
    streamed = StreamedModel.open(folder)
    seen: set[str] = set()
    with torch.no_grad(), _one_block_at_a_time(streamed):  # noqa: SIM117
        with capture_inputs(streamed.view.matrices(), lambda m, x: seen.add(m.name)):
            streamed.model(ids)
    expected: set[str] = set()
    view = ModelView.of(model)
    with torch.no_grad(), capture_inputs(view.matrices(), lambda m, x: expected.add(m.name)):
        model(ids)
    assert seen == expected
    block = streamed.view.blocks[1]
    with streamed.resident(block):
        block.matrices[0].write(torch.zeros(block.matrices[0].shape))
        state = block_state(streamed.view, block)
        assert not state["model.layers.1.self_attn.q_proj.weight"].any()
        with streamed.resident(block):  # nesting neither reloads nor frees
            assert not block.matrices[0].tensor().any()
        assert not block.matrices[0].tensor().any()
    with streamed.resident(block):
        assert block.matrices[0].tensor().any()


def test_hub_style_names_without_the_prefix(saved: Save, ids: Tensor) -> None:
    model, folder = saved("gpt2")
    tensors = SafetensorsFolder(folder)
    state = {n.removeprefix("transformer."): tensors.read(n) for n in tensors.names()}
    assert "h.0.attn.c_attn.weight" in state
    write_shard(folder / "model.safetensors", state)
    streamed = StreamedModel.open(folder)
    with torch.no_grad(), _one_block_at_a_time(streamed):
        assert torch.equal(streamed.model(ids).logits, model(ids).logits)


def test_a_tied_weight_stored_under_its_other_name(saved: Save, ids: Tensor) -> None:
    model, folder = saved("gemma")
    tensors = SafetensorsFolder(folder)
    state = {n: tensors.read(n) for n in tensors.names()}
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    write_shard(folder / "model.safetensors", state)
    streamed = StreamedModel.open(folder)
    with torch.no_grad(), _one_block_at_a_time(streamed):
        assert torch.equal(streamed.model(ids).logits, model(ids).logits)


def test_weights_are_cast_to_the_type_asked_for(saved: Save) -> None:
    _, folder = saved("llama")
    streamed = StreamedModel.open(folder, dtype=torch.bfloat16)
    with streamed.resident(streamed.view.blocks[0]) as block:
        assert block.matrices[0].tensor().dtype == torch.bfloat16
        original = SafetensorsFolder(folder).read(block.matrices[0].key)
        assert torch.equal(block.matrices[0].tensor(), original.bfloat16())
    assert streamed.model.model.embed_tokens.weight.dtype == torch.bfloat16


def _edited(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = SafetensorsFolder(folder)
    state = {n: tensors.read(n) for n in tensors.names()}
    change(state)
    write_shard(folder / "model.safetensors", state)


def test_a_checkpoint_that_does_not_match_is_refused_at_once(saved: Save) -> None:
    _, folder = saved("mixtral")
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    _edited(folder, lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(SecateurError, match=r"nothing for the model's 'model.layers.1.self_attn.k"):
        StreamedModel.open(folder)
    assert key in SafetensorsFolder(folder)


def test_another_shape_or_a_nan_is_named_when_its_block_comes_in(saved: Save) -> None:
    _, folder = saved("llama")
    key = "model.layers.1.mlp.up_proj.weight"
    _edited(folder, lambda s: s.update({key: torch.zeros(3, 48)}))
    streamed = StreamedModel.open(folder)
    with (
        pytest.raises(SecateurError, match=rf"'{key}' is \(3, 48\)"),
        streamed.resident(streamed.view.blocks[1]),
    ):
        pass
    _edited(folder, lambda s: s.update({key: torch.full((96, 48), float("nan"))}))
    streamed = StreamedModel.open(folder)
    with (
        pytest.raises(NumericsError, match=f"'{key}'"),
        streamed.resident(streamed.view.blocks[1]),
    ):
        pass
    assert all(m.stored.is_meta for m in streamed.view.matrices())


_WALK = """
import resource, sys, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama, accelerate
from secateur.models.streaming import StreamedModel

def field(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith(name)).split()[1]) // 1024

folder, limit = sys.argv[1], int(sys.argv[2])
if limit:
    cap = (field("VmData") + limit) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
streamed = StreamedModel.open(folder)
total = 0.0
for block in streamed.view.blocks:
    with streamed.resident(block):
        total += sum(m.tensor().square().sum().item() for m in block.matrices)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, total)
"""


def _walk(folder: Path, limit_mib: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WALK, str(folder), str(limit_mib)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc (Linux)")
@pytest.mark.slow
def test_memory_does_not_grow_with_depth_and_obeys_a_limit(tmp_path: Path) -> None:
    """16 and 64 blocks of 5 MiB; the 64 (330 MiB) under a limit of 150 MiB of data."""
    short = synthetic_llama(tmp_path / "short", 16, 288)
    long = synthetic_llama(tmp_path / "long", 64, 288)
    assert SafetensorsFolder(long).nbytes > 2 * 150 * 2**20
    runs = [_walk(short), _walk(long, 150)]
    for run in runs:
        assert run.returncode == 0, run.stderr[-2000:]
    small, large = (float(run.stdout.split()[0]) for run in runs)
    assert large <= 1.1 * small
