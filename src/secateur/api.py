"""The Python front door: the same grammar as the command line and YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.allocation.plan import Plan
from secateur.data.stream import names_texts
from secateur.models.checks import fingerprint_model
from secateur.models.loading import Loaded
from secateur.progress import SILENT, Progress
from secateur.recipe import Evaluation, Recipe, Recovery, build_part
from secateur.recipe_parts import Pretraining
from secateur.run.allocating import allocate_plan
from secateur.run.evaluate import evaluate_model as evaluate
from secateur.run.pretraining import pretrain_model
from secateur.run.recovering import recover_model
from secateur.run.runner import Result, execute

if TYPE_CHECKING:
    from secateur.run.vision import VisionResult

__all__ = ["allocate", "evaluate", "pretrain", "prune", "recover"]


def prune(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    method: str | None = None,
    sparsity: float | str | None = None,
    calibration: Any = "pydoc",
    samples: int = 64,
    length: int | None = None,
    seed: int = 0,
    evaluation: str | Mapping[str, Any] | Evaluation | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    evidence: str | Path | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> Result:
    """Prune a language model (vision networks: ``prune_vision``).

    Args:
        model: hub id, folder, GGUF file, ``"demo"``, ``"tiny"``, or a transformers model in
            memory, which is then pruned in place.
        tokenizer: needed with a model in memory, unless ``calibration`` is tokens already.
        method: see ``secateur methods``; by default ``wanda``, or what ``quality`` says.
        sparsity: in [0, 1), or ``"2:4"``: keep two of every four; by default 0.5, or what a
            saved plan (``allocation="plan.json"``) was made for.
        calibration: a text file or named corpus, a list of texts, an (N, L) tensor of token
            ids, or an iterable of ``{"input_ids": ..., "attention_mask": ...}``.
        samples, length, seed: how many windows of how many tokens are drawn, and which;
            by default 512 tokens, or as many as the model has positions.
        evaluation: text to measure quality on, dense against pruned, or the fields of
            ``secateur.recipe.Evaluation``; None measures nothing.
        out: a run's folder (resumable, with report); None keeps everything in memory.
        evidence: folder where what is gathered (gradients; with ``propagate="dense"`` also the
            inputs' moments) is kept, and taken from, by this and other runs.
        fresh: throw away what an earlier run left in ``out``.
        progress: ``secateur.progress.RichProgress()`` draws bars.
        **settings: any other field of ``secateur.Recipe`` (``update``, ``scope``, ``options``,
            ``quality``, ``exclude``, ``propagate``, ``stream`` ...).

    Returns:
        The pruned model, its masks and the report.

    Raises:
        SecateurError: naming field, value and fix.

    Examples:
        >>> import secateur
        >>> result = secateur.prune("tiny", method="wanda", sparsity=0.5, samples=4, length=64)
        >>> round(result.report["totals"]["delivered"], 6)
        0.5
    """
    text = str(calibration) if isinstance(calibration, str | Path) else "given"
    recipe = Recipe.build(
        {
            "model": str(model) if isinstance(model, str | Path) else "given",
            **({} if method is None else {"method": method}),
            **({} if sparsity is None else {"sparsity": sparsity}),
            "calibration": {"text": text, "samples": samples, "length": length, "seed": seed},
            "evaluation": {"text": evaluation} if isinstance(evaluation, str) else evaluation,
            **settings,
        }
    )
    loaded = None
    if isinstance(model, nn.Module):
        loaded = Loaded(model, tokenizer, None, _name(model), fingerprint_model(model))
    return execute(
        recipe,
        out=None if out is None else Path(out),
        loaded=loaded,
        calibration=None if isinstance(calibration, str | Path) else calibration,
        fresh=fresh,
        evidence=None if evidence is None else Path(evidence),
        progress=progress,
        command="secateur.prune(...)",
    )


def prune_vision(
    model: str | Path | nn.Module,
    images: Any,
    *,
    method: str | None = None,
    target: float | str | None = None,
    evaluation: Any = None,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> VisionResult:
    """Prune a vision network.

    Args:
        model: ``efficientnet-lite0``, ``resnet`` ..., ``timm:NAME``, a folder, or a network in memory,
            which is then pruned in place.
        images: ``digits``, ``fashion-mnist``, a folder, an ``ImageSet`` or (image, label) pairs: the
            training part; what accuracy is measured on is the test part.
        method: see ``secateur methods``; by default ``channel-l2``.
        target: share that goes, such as 0.5 or ``"50%"``; of what, ``target_kind`` says.
        evaluation: an ``ImageSet``, pairs or SPEC to measure on, or the fields of
            ``secateur.recipe_vision.VisionEvaluation``.
        out: a run's folder (resumable, with report); None keeps everything in memory.
        fresh: throw away what an earlier run left in ``out``.
        **settings: any other field of ``secateur.recipe_vision.VisionRecipe`` (``options``,
            ``structure``, ``pretraining``, ``training`` ...).

    Returns:
        The pruned network, what is gone of it, and the report.

    Raises:
        SecateurError: naming field, value and fix.
    """
    from secateur.recipe_vision import VisionRecipe
    from secateur.run.vision import execute_vision

    named = isinstance(images, str | Path)
    values = {} if evaluation is None else {"evaluation": evaluation}
    tests = None
    if isinstance(evaluation, str | Path):
        values = {"evaluation": {"images": str(evaluation)}}
    elif evaluation is not None and not isinstance(evaluation, Mapping):
        values, tests = {}, evaluation
    recipe = VisionRecipe.build(
        {
            "model": str(model) if isinstance(model, str | Path) else "given",
            "images": str(images) if named else "given",
            **({} if method is None else {"method": method}),
            **({} if target is None else {"target": target}),
            **values,
            **settings,
        }
    )
    return execute_vision(
        recipe,
        out=None if out is None else Path(out),
        model=model if isinstance(model, nn.Module) else None,
        images=None if named else images,
        tests=tests,
        fresh=fresh,
        progress=progress,
        command="secateur.prune_vision(...)",
    )


def allocate(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    allocation: str | dict[str, Any] = "uniform",
    sparsity: float | str = 0.5,
    calibration: Any = "pydoc",
    samples: int = 64,
    length: int | None = None,
    seed: int = 0,
    evidence: str | Path | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> Plan:
    """How much of each matrix would go; the model is left as it is.

    Args:
        model, tokenizer, sparsity, calibration, samples, length, seed, progress: as of ``prune``.
        allocation: see ``secateur allocators``: a name, or ``{"name": ..., **options}``.
        evidence: folder where what is read off the model is kept for other plans.
        **settings: any other field of ``secateur.Recipe`` (``method``, ``include``, ...).

    Returns:
        The plan, exact to the budget. ``plan.record()`` is its JSON; a saved one goes into
        ``prune(allocation="plan.json")``.

    Examples:
        >>> import secateur
        >>> plan = secateur.allocate("tiny", allocation="incremental", sparsity=0.6)
        >>> round(plan.removed / plan.elements, 6)
        0.6
    """
    text = str(calibration) if isinstance(calibration, str | Path) else "given"
    recipe = Recipe.build(
        {
            "model": str(model) if isinstance(model, str | Path) else "given",
            "sparsity": sparsity,
            "allocation": allocation,
            "calibration": {"text": text, "samples": samples, "length": length, "seed": seed},
            "evaluation": None,
            **settings,
        }
    )
    loaded = None
    if isinstance(model, nn.Module):
        loaded = Loaded(model, tokenizer, None, _name(model), fingerprint_model(model))
    return allocate_plan(
        recipe,
        loaded=loaded,
        calibration=None if isinstance(calibration, str | Path) else calibration,
        evidence=None if evidence is None else Path(evidence),
        progress=progress,
    )


def recover(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    masks: Mapping[str, Any] | str | Path | None = None,
    mask_from_zeros: bool = False,
    no_mask: bool = False,
    adapter: str | Path | None = None,
    method: str = "perp",
    text: Any = "pydoc",
    dense: str | Path | nn.Module | None = None,
    evaluation: str | Mapping[str, Any] | Evaluation | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> Result:
    """Train a part of a model that was cut before, keeping its zeros.

    Args:
        model: a run's folder (its masks are used), another folder or hub id, or a transformers
            model in memory, which is then trained in place.
        tokenizer: needed with a model in memory, unless ``text`` is tokens already.
        masks: matrix name -> bool, True where the weight is gone (``Result.masks``), or a
            mask file.
        mask_from_zeros: what is zero now must stay zero.
        no_mask: nothing has to (after structured cuts).
        adapter: folder of an adapter of PEFT's: it is merged, and nothing is trained.
        method: ``perp``, ``full``, ``reconstruct``, or an adapter such as ``mask-lora``.
        text: file, named corpus, texts, or token windows to train on.
        dense: the model it was cut from: compared with, and learnt from by ``reconstruct`` and
            ``distil``.
        evaluation: as for ``prune``.
        out: folder to write (resumable, with report); None keeps everything in memory.
        **settings: any other field of ``secateur.recipe.Recovery`` (``train``, ``steps``, ``lr`` ...).

    Returns:
        The recovered model, its masks and the report.

    Raises:
        SecateurError: naming field, value and fix.

    Examples:
        >>> import secateur
        >>> cut = secateur.prune("tiny", sparsity=0.5, samples=4, length=64)
        >>> mended = secateur.recover(
        ...     cut.model, cut.tokenizer, masks=cut.masks, steps=2, length=64, train=["norms"]
        ... )
        >>> mended.report["recovery"]["zeros"] == cut.report["totals"]["zeros"]
        True
    """
    named = isinstance(text, str | Path)
    values = {"method": method, **({"text": str(text)} if named else {}), **settings}
    return recover_model(
        _source(model, tokenizer),
        build_part(Recovery, "recovery", values),
        out=None if out is None else Path(out),
        masks=Path(masks) if isinstance(masks, str | Path) else masks,
        mask_from_zeros=mask_from_zeros,
        no_mask=no_mask,
        adapter=None if adapter is None else Path(adapter),
        dense=str(dense) if isinstance(dense, str | Path) else dense,
        evaluation=_evaluation(evaluation),
        text=None if named else text,
        fresh=fresh,
        progress=progress,
        command="secateur.recover(...)",
    )


def _evaluation(given: str | Mapping[str, Any] | Evaluation | None) -> Evaluation | None:
    """What to measure on, of a text's name, settings, or the thing itself."""
    values = {"text": given} if isinstance(given, str) else given
    if values is None or isinstance(values, Evaluation):
        return values
    return build_part(Evaluation, "evaluation", dict(values))


def _source(model: str | Path | nn.Module | None, tokenizer: Any) -> Any:
    """What a run starts from: a name, or a model in memory with its tokenizer."""
    if isinstance(model, nn.Module):
        return Loaded(model, tokenizer, None, _name(model), fingerprint_model(model))
    return None if model is None else str(model)


def pretrain(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    keep_params: float | str = 0.5,
    tokens: int | str = "2M",
    text: Any = "pydoc",
    evaluation: str | Mapping[str, Any] | Evaluation | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: Progress = SILENT,
    **settings: Any,
) -> Result:
    """Train a language model on while it shrinks to a budget (EfficientLLM).

    Args:
        model: hub id, folder, ``"demo"``, ``"tiny"``, or a transformers model in memory, which is
            then trained and cut in place.
        tokenizer: needed with a model in memory, unless ``text`` is tokens already.
        keep_params: share of the parameters to end with, or a number (``"100M"``).
        tokens: how many to train on (``"2M"``).
        text: a file, a named corpus or several of them; documents in memory (a list of strings,
            a ``Text``, a data set of ``datasets``); or a source of token windows.
        evaluation: as for ``prune``; also looked at on the way.
        out: the run's folder (resumable, with report); None keeps everything in memory.
        **settings: any other field of ``secateur.recipe_parts.Pretraining`` (``lr``, ``batch``,
            ``kinds``, ``prune_until``, ``distil`` ...).

    Returns:
        The smaller model and the report; ``report["pretraining"]`` holds what went when.

    Raises:
        SecateurError: naming field, value and fix.

    Examples:
        >>> import secateur
        >>> small = secateur.pretrain("tiny", keep_params=0.8, tokens=1024, length=64, batch=4)
        >>> small.report["structure"]["parameters"]["after"] <= 0.8 * 2_755_008
        True
    """
    several = isinstance(text, list | tuple) and all(isinstance(t, str | Path) for t in text)
    named = isinstance(text, str | Path) or (several and names_texts(text))
    values = {"keep_params": keep_params, "tokens": tokens, **settings}
    if named:
        values["text"] = [str(t) for t in text] if several else str(text)
    return pretrain_model(
        _source(model, tokenizer),
        build_part(Pretraining, "pretraining", values),
        out=None if out is None else Path(out),
        evaluation=_evaluation(evaluation),
        text=None if named else text,
        fresh=fresh,
        progress=progress,
        command="secateur.pretrain(...)",
    )


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
