"""What can be chosen about a training: plain records that are checked when they are made, and need no Lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
Schedule = Literal["constant", "cosine"]


# the files of a training, in its folder
CHECKPOINT = "checkpoint.ckpt"
MODEL = "model.safetensors"
HISTORY = "history.json"


@dataclass(frozen=True)
class OptimizerOptions:
    """How the weights move.

    The default rate gives NDCG@10 0.26 after 20 epochs on the synthetic set, 1e-3 gives 0.20 (Markov: 0.18).

    Args:
        learning_rate: of Adam; with a schedule, its peak.
        weight_decay: decoupled (AdamW), on matrices only: a bias or a norm has no reason to be small.
        gradient_clip: largest norm of all gradients together; 0: not clipped.
        warmup_steps: the rate rises linearly over this many steps.
        schedule: ``"constant"``, or ``"cosine"``: down to a hundredth at the last epoch.

    Raises:
        ValueError: for a number out of range or an unknown schedule.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    gradient_clip: float = 5.0
    warmup_steps: int = 0
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")
        for name in ("weight_decay", "gradient_clip", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")

    def rate_at(self, step: int, total_steps: int) -> float:
        """Factor on the learning rate at a step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class FitOptions:
    """How long to train, and on what.

    Args:
        max_epochs: the most epochs.
        patience: stop after this many epochs without a better ``monitor``; 0: never.
        monitor: validation metric that decides about the best weights; larger is better.
        precision: ``"32-true"``; ``"bf16-mixed"`` or ``"16-mixed"`` for autocast.
        accelerator, devices, strategy: as :class:`lightning.pytorch.Trainer` takes them.
        seed: of the weights' dropout masks.
        optimizer: see :class:`OptimizerOptions`.

    Raises:
        ValueError: for a number out of range, an unknown precision, or a monitor that is no HR@k, NDCG@k or MRR@k.
    """

    max_epochs: int = 20
    patience: int = 5
    monitor: str = "NDCG@10"
    precision: Precision = "32-true"
    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    seed: int = 0
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)

    def __post_init__(self) -> None:
        if self.max_epochs < 1:
            raise ValueError(f"max_epochs must be at least 1, got {self.max_epochs}")
        if self.patience < 0:
            raise ValueError(f"patience must not be negative, got {self.patience}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        _ = self.cutoff
        if self.precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise ValueError(f"precision must be '32-true', '16-mixed' or 'bf16-mixed', got {self.precision!r}")

    @property
    def cutoff(self) -> int:
        """k of the monitored metric."""
        name, _, k = self.monitor.partition("@")
        if name not in ("HR", "NDCG", "MRR") or not k.isdecimal() or int(k) < 1:
            raise ValueError(f"monitor must be HR@k, NDCG@k or MRR@k, got {self.monitor!r}")
        return int(k)
