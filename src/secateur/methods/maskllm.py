"""MaskLLM: an N:M mask learned end to end over frozen weights, from any one-shot mask.

    W^ = W * softmax((kappa pi + g) / tau) S ,   only the logits pi are trained

Source: Fang et al., NeurIPS 2024 (arXiv 2409.17481). The maths and the defaults are in
``training.maskllm``; here are the options a recipe gives. The paper trains 2,000 steps of 256
windows of 4,096 tokens; the defaults here fit a small machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secateur.errors import UsageError
from secateur.masks.target import Target
from secateur.methods.base import Described, Need
from secateur.training.mask_logits import Learning, Logits
from secateur.training.settings import Optimizer, TrainSettings


@dataclass(frozen=True)
class MaskLLM(Described):
    """Learned N:M masks.

    Attributes:
        prior: a one-shot method (magnitude, wanda, sparsegpt, gblm ...), a mask file, a run's
            folder, or ``none``.
        steps, batch, micro_batch, length: optimizer steps, windows in each, in each forward,
            and tokens in a window (default: the calibration's).
        lr: of the logits; the paper's 5e-4 is for 2,000 steps, fewer want more.
        optimizer: ``adamw``; ``adamw8bit``, its moments in 8 bits (package bitsandbytes), which
            learns as well in less memory; or ``sgd`` with momentum.
        weight_decay: on the logits.
        turns: the blocks are learned in so many shares, one after the other, each in its part of
            the steps, while the others are held under their masks: memory for one share only.
        alpha, init_std, kappa, tau, weight_reg, logits, candidates: see
            ``training.mask_logits.Learning``.
        distil: share of the loss that is the divergence from the dense model.
        temperature: of that divergence.
        validate_every: steps between two looks at the mask as it would be exported, on windows
            set aside.
        keep_best: take the best mask of those looks rather than the last.
        checkpoint_every: steps between two checkpoints.
        seed: of the first logits, the noise and the order of the windows.
    """

    name = "maskllm"
    summary = "mask learned end to end by Gumbel-softmax over N:M patterns, weights frozen"
    paper = "Fang et al. 2024, arXiv:2409.17481"

    prior: str = "sparsegpt"
    steps: int = 200
    batch: int = 8
    micro_batch: int | None = None
    length: int | None = None
    lr: float = 2e-3
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.1
    turns: int = 1
    alpha: float = 3.0
    init_std: float = 0.01
    kappa: tuple[float, float] = (100.0, 500.0)
    tau: tuple[float, float] = (4.0, 0.05)
    weight_reg: float = 1e-5
    logits: Logits = "auto"
    candidates: int | None = None
    distil: float = 0.0
    temperature: float = 1.0
    validate_every: int = 50
    keep_best: bool = True
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.distil <= 1:
            raise UsageError("a share in [0, 1]", field="distil", value=self.distil)
        if not self.temperature > 0:
            raise UsageError("must be positive", field="temperature", value=self.temperature)
        if self.length is not None and self.length < 2:
            raise UsageError("at least 2 tokens", field="length", value=self.length)
        if not self.one_shot and self.prior != "none" and not Path(self.prior).exists():
            from secateur.methods import methods

            known = ", ".join(name for name in methods if name != self.name)
            raise UsageError(
                "neither a method nor a file",
                field="prior",
                value=self.prior,
                fix=f"none, the path of a mask, or one of {known}",
            )
        if not 1 <= self.turns <= max(1, self.steps):  # steps of 0 have an error of their own
            raise UsageError("between 1 and the steps", field="turns", value=self.turns)
        if self.turns > 1 and self.prior == "none":
            raise UsageError(
                "blocks whose turn has not come are held under their prior, and there is none",
                field="turns",
                value=self.turns,
                fix="a prior such as wanda, or turns=1",
            )
        _ = self.settings  # refuse what it refuses
        self.learning.refuse_no_prior(self.prior != "none")

    @property
    def one_shot(self) -> bool:
        """Whether the prior is a method's mask."""
        from secateur.methods import methods
        from secateur.methods.base import Method

        return self.prior in methods and issubclass(methods[self.prior], Method)

    def requirements(self) -> frozenset[Need]:
        """What the one-shot prior needs."""
        from secateur.methods import methods

        return methods[self.prior]().requirements() if self.one_shot else frozenset()

    @property
    def learning(self) -> Learning:
        """The part that is about masks."""
        return Learning(
            alpha=self.alpha,
            init_std=self.init_std,
            kappa=self.kappa,
            tau=self.tau,
            weight_reg=self.weight_reg,
            logits=self.logits,
            candidates=self.candidates,
            seed=self.seed,
        )

    @property
    def settings(self) -> TrainSettings:
        """The part that is about training: no warm-up, a cosine to a tenth, Adam's (0.9, 0.95)."""
        return TrainSettings(
            steps=self.steps,
            lr=self.lr,
            batch=self.batch,
            micro_batch=self.micro_batch,
            warmup=0.0,
            schedule="cosine",
            floor=0.1,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.95),
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            validate_every=self.validate_every,
            # So patient that it never stops early; the best state is kept all the same.
            patience=self.steps if self.keep_best else None,
        )

    def check_target(self, target: Target) -> None:
        """Only a pattern can be learned.

        Raises:
            UsageError: a plain sparsity; see ``Learning.logits_per_group``.
        """
        if target.keep is None or target.group is None:
            raise UsageError(
                "MaskLLM learns N:M masks",
                field="sparsity",
                value=str(target),
                fix="--sparsity 2:4",
            )
        self.learning.logits_per_group(target.keep, target.group)
