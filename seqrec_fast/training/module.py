"""The model as Lightning sees it: one training step, one validation step, one optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from seqrec_fast.data import Batch, EvaluationBatch
from seqrec_fast.models._checkpoint import SavedModule

from ._loader import BatchLoader, SharedLoader
from .loop import target_ranks
from .metrics import RankMetrics
from .options import OptimizerOptions

MODEL_KEY = "seqrec_fast_model"  # where a checkpoint says which model it holds
LOSS_KEY = "seqrec_fast_loss"


class RecommenderModule(LightningModule):
    """Wraps a model with ``loss(ids, lengths, target)`` for :class:`lightning.pytorch.Trainer`.

    Logs the validation metrics by their names, ``NDCG@10`` and so on. They are sums over users that are added up over
    the processes, so they are the same on any number of devices.

    Args:
        model: the model; its ``save`` is what the best weights are written with.
        train: training batches.
        validation: evaluation batches; their ``exclude`` decides about the seen filter.
        optimizer: see :class:`OptimizerOptions`.
        ks: cut-offs of the validation metrics.
    """

    def __init__(
        self,
        model: SavedModule,
        train: BatchLoader,
        validation: BatchLoader,
        optimizer: OptimizerOptions | None = None,
        ks: tuple[int, ...] = (10,),
    ) -> None:
        super().__init__()
        self.model = model
        self.train_batches = train
        self.validation_batches = validation
        self.optimizer_options = optimizer or OptimizerOptions()
        self.ks = ks
        self._metrics: RankMetrics | None = None
        self._loss_sums: Tensor | None = None  # [2] the epoch's Σ loss·positions and Σ positions

    def train_dataloader(self) -> SharedLoader:
        trainer = self.trainer
        return SharedLoader(
            self.train_batches,
            trainer.global_rank,
            trainer.world_size,
            even=True,
            epoch=lambda: trainer.current_epoch,
        )

    def val_dataloader(self) -> SharedLoader:
        return SharedLoader(self.validation_batches, self.trainer.global_rank, self.trainer.world_size, even=False)

    def on_train_epoch_start(self) -> None:
        self._loss_sums = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.model.loss(batch.ids, batch.lengths, batch.target)  # type: ignore[operator]
        # the loss is a mean over positions, and so is that of the epoch; kept on the device, where it waits for nothing
        positions = (batch.target >= 0).sum().float()
        here = torch.stack([loss.detach().float() * positions, positions])
        self._loss_sums = here if self._loss_sums is None else self._loss_sums.to(here.device) + here
        return loss

    def mean_loss(self) -> float:
        """Mean over all positions of the epoch so far, of all processes; NaN before the first step."""
        sums = torch.zeros(2, device=self.device) if self._loss_sums is None else self._loss_sums
        if self.trainer.world_size > 1:
            sums = self.all_gather(sums).sum(0)  # type: ignore[union-attr]
        total, positions = sums.tolist()
        return float(total / positions) if positions else float("nan")

    def on_validation_epoch_start(self) -> None:
        self._metrics = None

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        if self._metrics is None:
            num_items = int(self.model.num_items)  # type: ignore[arg-type]
            self._metrics = RankMetrics(num_items, self.ks, seen_filter=batch.exclude is not None)
        self._metrics.update(target_ranks(self.model, batch))

    def on_validation_epoch_end(self) -> None:
        # a process that was dealt no batch still takes part in the sum
        metrics = self._metrics or RankMetrics(int(self.model.num_items), self.ks, seen_filter=False)  # type: ignore[arg-type]
        if self.trainer.world_size > 1:
            sums = metrics.sums.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
            metrics.sums = self.all_gather(sums).sum(0).to("cpu", torch.float64)  # type: ignore[union-attr]
        for name, value in metrics.compute().items():
            self.log(name, value, rank_zero_only=False, sync_dist=False)

    def configure_optimizers(self) -> Any:
        options = self.optimizer_options
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
        # not trainer.estimated_stepping_batches: it sets the loaders up before a checkpoint's place in them is restored
        total = len(self.train_batches) // self.trainer.world_size * (self.trainer.max_epochs or 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.rate_at(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[MODEL_KEY] = describe(self.model)
        checkpoint[LOSS_KEY] = self._loss_sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loss_sums = checkpoint[LOSS_KEY]


def describe(model: SavedModule) -> dict[str, Any]:
    """Class and configuration of a model, as a checkpoint records them."""
    return {"kind": type(model).__name__, "config": model.config_dict()}


def check_same_model(checkpoint: Mapping[str, Any], model: SavedModule, path: object) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ValueError: naming the file and the first difference.
    """
    if MODEL_KEY not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of seqrec_fast: it does not say which model it holds")
    saved, own = checkpoint[MODEL_KEY], describe(model)
    if saved["kind"] != own["kind"]:
        raise ValueError(f"{path} is the checkpoint of another model: a {saved['kind']}, not a {own['kind']}")
    for name in sorted({*saved["config"], *own["config"]}):
        there, here = saved["config"].get(name), own["config"].get(name)
        if there != here:
            raise ValueError(f"{path} is the checkpoint of another model: its {name} is {there!r}, here it is {here!r}")
