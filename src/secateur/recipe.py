"""The grammar of a run. Command line, YAML and Python all build this one object.

Unknown keys are refused, ranges are checked, and every default is the one its paper uses
unless the field's description says otherwise.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from secateur.errors import UsageError
from secateur.masks.target import Scope, Target
from secateur.recipe_parts import Part as _Part
from secateur.recipe_parts import Pretraining

Quality = Literal["fast", "good", "best"]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``2:4`` as written; YAML 1.1 takes it for 2 x 60 + 4 = 124."""


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """What the YAML says, with ``2:4`` and ``64:8`` as written."""
    return yaml.load(text, Loader=_Loader)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings a YAML recipe names, not yet checked.

    Raises:
        UsageError: no such file, not YAML, or no mapping.
    """
    try:
        values = read_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(
            f"the recipe cannot be read: {error.strerror}", field="recipe", value=str(path)
        ) from None
    except UnicodeDecodeError:
        raise UsageError("not text in UTF-8", field="recipe", value=str(path)) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UsageError(f"not YAML{line}", field="recipe", value=str(path)) from None
    if not isinstance(values, dict):
        raise UsageError("a recipe is a YAML mapping", field="recipe", value=str(path))
    return values


class Calibration(_Part):
    """The text a method looks at."""

    text: str = Field("pydoc", description="file (.txt, .jsonl, .parquet) or named corpus")
    samples: int = Field(64, ge=1, description="sequences (the papers use 128)")
    length: int | None = Field(
        None,
        ge=2,
        description="tokens in each (the papers use 2048); null: 512, or the model's positions",
    )
    seed: int = Field(0, ge=0, description="which windows of the text are drawn")
    batch_tokens: int = Field(2048, ge=1, description="tokens in one forward")


class Evaluation(_Part):
    """What is measured on the dense and on the pruned model."""

    text: str = Field("pydoc:test", description="held-out text; never the calibration windows")
    length: int | None = Field(
        None,
        ge=2,
        description="tokens in a window, on which perplexity depends; null: 512, or the positions",
    )
    windows: int | None = Field(16, ge=1, description="the first so many windows; null: all")
    speed: bool = Field(True, description="measure tokens/s, dense against pruned, on this machine")
    speed_seconds: float = Field(8.0, gt=0, description="time budget for that")


class Structure(_Part):
    """What a structured method cuts, and how the target is counted."""

    kinds: tuple[Literal["head", "ffn", "kv_group", "stem", "layer"], ...] | None = Field(
        None, min_length=1, description="kinds of units that go; null: the method's"
    )
    gqa: Literal["groups", "even", "duplicate"] = Field(
        "groups",
        description="heads that share keys and values: whole groups, the same number of query "
        "heads in each, or any (each then gets its own copy of keys and values)",
    )
    ranking: Literal["local", "global"] | None = Field(
        None,
        description="units compete within their group, or with all of their kind; null: the method's",
    )
    target_kind: Literal["ratio", "parameters", "flops", "latency"] = Field(
        "ratio",
        description="sparsity is the share of the units' weights, of the model's parameters, of "
        "its FLOPs, or of its measured time on this machine",
    )
    context: int = Field(512, ge=1, description="tokens for which FLOPs and time are counted")
    round_to: int = Field(1, ge=1, description="widths that stay are multiples of this (8, 64)")
    uniform: bool = Field(False, description="the same widths in every layer")
    align: bool = Field(
        False, description="round each width up or down where measured times say that it pays"
    )
    protect: list[int] = Field(
        default_factory=list, description="blocks left alone; -1 is the last"
    )
    at_least: int = Field(1, ge=1, description="units that stay in every group")


class Search(_Part):
    """The text an allocator that searches tries its plans on."""

    text: str | None = Field(
        None, description="file or named corpus, never evaluated on; null: the calibration's"
    )
    samples: int = Field(16, ge=1, description="sequences a plan is judged on")
    length: int | None = Field(
        None, ge=2, description="tokens in each; null: the calibration's, or 512"
    )
    seed: int = Field(1, ge=0, description="which windows of the text are drawn")
    fitness: Literal["kl", "perplexity"] = Field(
        "kl", description="KL divergence from the dense model's predictions, or perplexity"
    )


class Recovery(_Part):
    """Training after the cut, with the mask kept."""

    method: str = Field(
        "perp", description="perp, full, imp, reconstruct, or an adapter such as mask-lora"
    )
    train: list[str] | None = Field(
        None,
        description="any of biases, norms, head, rescale, all and one adapter (mask-lora ...); "
        "null: the biases and norms there are",
    )
    steps: int = Field(100, ge=1, description="optimizer steps (reconstruct: for each block)")
    lr: float | None = Field(None, gt=0, description="highest learning rate; null: the method's")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the rate falls"
    )
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps in which it rises")
    batch: int = Field(4, ge=1, description="windows in a step, over all processes")
    micro_batch: int | None = Field(None, ge=1, description="windows in a forward; null: all")
    length: int | None = Field(
        None, ge=2, description="tokens in a window; null: 512, or the positions"
    )
    text: str = Field("pydoc", description="file or named corpus to train on")
    seed: int = Field(0, ge=0, description="order of the windows, start of the adapters")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a gradient; null: any")
    rank: int = Field(16, ge=1, description="of adapters")
    alpha: float = Field(32.0, gt=0, description="adapters are multiplied by alpha / rank")
    init: Literal["broken", "ones"] = Field(
        "broken", description="how scale-lora starts; 'ones' as published"
    )
    targets: list[str] = Field(
        default_factory=list, description="adapters only on these roles or names; none: all"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of adapters")
    every: int = Field(
        1, ge=1, description="of mask-lora: its mask takes part in every so many steps only"
    )
    keep_adapter: bool = Field(
        False,
        description="of recover, lora and lora-prune: also write it in PEFT's format, unmerged",
    )
    samples: int = Field(128, ge=1, description="windows that reconstruct goes round, at most")
    unit: Literal["block", "matrix"] = Field(
        "block", description="what reconstruct trains at a time"
    )
    stream: Literal["pruned", "dense"] = Field(
        "pruned",
        description="reconstruct's wanted outputs: the dense block's on what the pruned model "
        "feeds it, or on what the dense model does",
    )
    add_biases: bool = Field(False, description="give linears biases where they have none")
    distil: float = Field(
        0.0, ge=0, le=1, description="share of the loss that is the divergence from the dense model"
    )
    temperature: float = Field(2.0, gt=0, description="of that divergence")
    cycles: int | None = Field(
        None, ge=1, description="rounds of pruning and retraining; null: 3 for imp, else 1"
    )
    cycle_schedule: Literal["geometric", "cubic"] = Field(
        "geometric", description="how much is gone after each round"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")
    patience: int | None = Field(
        None, ge=1, description="stop after so many looks at held-out windows without a gain"
    )
    validate_every: int = Field(50, ge=1, description="steps between such looks")
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it; fp16: under a scaled loss"
    )
    shard: bool = Field(
        False, description="share weights out over the processes of torchrun (FSDP)"
    )
    checkpointing: bool = Field(
        False, description="compute activations again in backward: less memory, more time"
    )

    @property
    def rounds(self) -> int:
        """Rounds of pruning and retraining."""
        return self.cycles or (3 if self.method == "imp" else 1)


class Recipe(_Part):
    """One run, from model to report."""

    model: str = Field(description="hub id, folder, GGUF file, 'demo' or 'tiny'")
    method: str = Field("wanda", description="see 'secateur methods'")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own options")
    sparsity: float | str = Field(0.5, description="in [0, 1), or N:M: keep N of every M")
    pattern: str | None = Field(None, description="N:M, when sparsity is given as a number too")
    scope: str | None = Field(
        None, description="row, layer, block[:WIDTH], global; null: the method's"
    )
    update: Literal["none", "obs", "exact", "best"] | None = Field(
        None, description="what survivors become; null: the method's"
    )
    quality: Quality | None = Field(
        None, description="a preset that fills in method, update and granularity"
    )
    allocation: str | dict[str, Any] = Field(
        "uniform",
        description="see 'secateur allocators': a name, {name: ..., its options}, or a plan.json",
    )
    structure: Structure = Structure()
    include: list[str] = Field(
        default_factory=list, description="only matrices matching these globs"
    )
    exclude: list[str] = Field(default_factory=list, description="no matrix matching these globs")
    blocks: str | None = Field(
        None, description="path of the list of blocks, if not found by itself"
    )
    calibration: Calibration = Calibration()
    search: Search = Search()
    propagate: Literal["pruned", "dense"] = Field(
        "pruned", description="what later blocks are calibrated on"
    )
    granularity: Literal["block", "true_sequential"] = Field(
        "block", description="true_sequential: re-run the block after each group of matrices"
    )
    reconstruct: Literal["block", "dense"] = Field(
        "block",
        description="what survivors are fitted to: the block's own outputs, or the dense model's",
    )
    recovery: Recovery | None = Field(None, description="training after the cut; null: none")
    pretraining: Pretraining | None = Field(
        None, description="pruning-aware pretraining, instead of a cut; null: none"
    )
    evaluation: Evaluation | None = Evaluation()
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    dtype: str = Field("auto", description="auto: float32 on CPU, the checkpoint's own on a GPU")
    stream: bool = Field(False, description="hold one block's weights at a time")
    trust_remote_code: bool = Field(False, description="run Python code shipped with the model")

    @field_validator("sparsity", mode="after")
    @classmethod
    def _target_is_readable(cls, value: float | str) -> float | str:
        Target.parse(value)
        return value

    @field_validator("scope")
    @classmethod
    def _scope_is_readable(cls, value: str | None) -> str | None:
        return None if value is None else str(Scope.parse(value))

    @field_validator("allocation")
    @classmethod
    def _allocation_has_a_name(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, str):
            return value
        if not isinstance(value.get("name"), str):
            raise UsageError(
                "an allocation with options has a name",
                field="allocation",
                value=value,
                fix="e.g. {name: als, mu: row}",
            )
        return value if len(value) > 1 else str(value["name"])

    @model_validator(mode="before")
    @classmethod
    def _fill_from_quality(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("quality"):
            quality = data["quality"]
            if not isinstance(quality, str) or quality not in PRESETS:
                return data  # the field's own message names the choices
            preset = PRESETS[quality]
            # null leaves a setting to the preset; elsewhere (evaluation) it means what it says.
            return preset | {k: v for k, v in data.items() if v is not None or k not in preset}
        return data

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        target = self.target
        if self.stream and self.recovery is not None:
            raise UsageError(
                "a recovery trains a model that is in memory, and this one is streamed from disk",
                field="recovery",
                value=self.recovery.method,
                fix="drop --stream; or prune first, then recover the finished folder on a larger machine "
                "or, from Python, with secateur.training.reconstruction.Reconstruction and resident=...",
            )
        if target.is_pattern and self.scope not in (None, "row"):
            raise UsageError(
                f"an N:M pattern is chosen inside groups of {target.group} inputs, so no scope applies",
                field="scope",
                value=self.scope,
                fix="drop --scope, or give the sparsity as a number",
            )
        if self.propagate == "dense" and self.granularity == "true_sequential":
            raise UsageError(
                "true_sequential re-runs the pruned block, so it cannot propagate the dense one",
                field="granularity",
                value=self.granularity,
                fix="use propagate: pruned",
            )
        if self.reconstruct == "dense" and self.propagate == "dense":
            raise UsageError(
                "with dense propagation the block's outputs are the dense model's already",
                field="reconstruct",
                value="dense",
                fix="use propagate: pruned",
            )
        if self.recovery is not None:
            self._recovery_fits(self.recovery)
        return self

    def _recovery_fits(self, recovery: Recovery) -> None:
        if recovery.rounds > 1 and self.target.is_pattern:
            raise UsageError(
                "an N:M pattern is reached in one cut",
                field="recovery.cycles",
                value=recovery.rounds,
                fix="cycles: 1",
            )
        if recovery.rounds > 1 and self.allocator[0].endswith(".json"):
            raise UsageError(
                "a saved plan is one cut",
                field="recovery.cycles",
                value=recovery.rounds,
                fix="cycles: 1, or an allocation by name",
            )

    @property
    def allocator(self) -> tuple[str, dict[str, Any]]:
        """Name (or path of a plan) and options of the allocation."""
        if isinstance(self.allocation, str):
            return self.allocation, {}
        return self.allocation["name"], {k: v for k, v in self.allocation.items() if k != "name"}

    @property
    def target(self) -> Target:
        """What is asked for, with any contradiction refused."""
        return Target.parse(self.sparsity, self.pattern)

    @classmethod
    def build(cls, values: dict[str, Any]) -> Recipe:
        """Validate ``values``; the first problem becomes a message that names field and fix."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise readable(error, cls) from None

    @classmethod
    def load(cls, path: Path, **override: Any) -> Recipe:
        """Read a YAML recipe; ``override`` replaces top-level keys."""
        return cls.build({**read_recipe(path), **override})

    def yaml(self) -> str:
        """The recipe with every default resolved."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


P = TypeVar("P", bound=_Part)


def build_part(kind: type[P], name: str, values: dict[str, Any]) -> P:
    """One part of a recipe by itself; problems are named as they would be inside the recipe."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise readable(error, kind, name) from None


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "wanda", "update": "none"},
    "good": {"method": "sparsegpt", "update": "exact"},
    "best": {"method": "sparsegpt", "update": "best"},
}


def readable(error: ValidationError, root: type[_Part], inside: str | None = None) -> UsageError:
    """The first problem of a recipe, or of its part ``inside``, as a message with a fix."""
    first = error.errors()[0]
    path = [str(p) for p in first["loc"] if p not in ("float", "str", "dict[str,any]")]
    field = ".".join([inside, *path] if inside else path) or "recipe"
    if first["type"] == "extra_forbidden":
        part = root
        for key in path[:-1]:
            part = _part_of(part, key) or part
        near = difflib.get_close_matches(path[-1], part.model_fields, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        known = ", ".join(part.model_fields)
        return UsageError(
            "no such setting", field=field, value=first["input"], fix=hint + f"known: {known}"
        )
    if first["type"] == "missing":
        return UsageError("is required", field=field, fix=f"give '{field}'")
    return UsageError(first["msg"], field=field, value=first["input"])


def _part_of(part: type[_Part], key: str) -> type[_Part] | None:
    """The kind of a recipe's part that lies under ``key``."""
    known = part.model_fields.get(key)
    kinds = () if known is None else (known.annotation, *get_args(known.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, _Part)), None)
