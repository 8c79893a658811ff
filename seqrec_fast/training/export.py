"""A trained model's ``encode`` as a ``torch.export`` program: no Python class of the model is needed to run it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from seqrec_fast._files import written_beside

Encoder = Callable[[Tensor, Tensor], Tensor]


class _Encode(nn.Module):
    """``encode`` as a ``forward``, which is what torch.export traces."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return cast(Tensor, self.model.encode(ids, lengths))  # type: ignore[operator]


def export_encoder(model: nn.Module, path: str | os.PathLike[str] | None = None) -> ExportedProgram:
    """Trace ``model.encode(ids [B, T], lengths [B]) -> [B, d]`` for any B ≥ 1 and T ≥ 1, dropout off.

    The program holds the public operators (``seqrec_fast::…``) and chooses their backend where it runs.

    Args:
        model: such as :class:`seqrec_fast.models.SequenceRecommender`; its mode is put back afterwards.
        path: also write the program there (``.pt2``); the file appears whole or not at all.

    Returns:
        The exported program.

    Raises:
        ValueError: when ``path`` does not end in ``.pt2``.

    Example:
        >>> from seqrec_fast.models import SequenceRecommender
        >>> model = SequenceRecommender(50, embedding_dim=8).eval()
        >>> encode = export_encoder(model).module()
        >>> ids, lengths = torch.tensor([[3, 1, 4], [1, 5, 0], [9, 0, 0]]), torch.tensor([3, 2, 1])
        >>> torch.equal(encode(ids, lengths), model.encode(ids, lengths))
        True
    """
    if path is not None and Path(path).suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {os.fspath(path)!r}")
    device = next(model.parameters()).device
    # sizes other than 0 and 1, which tracing would take for constants
    example = (torch.zeros(2, 3, dtype=torch.int64, device=device), torch.tensor([3, 2], device=device))
    batch, time = Dim("batch", min=1), Dim("time", min=1)
    was_training = model.training
    try:
        with torch.no_grad():
            program = torch.export.export(
                _Encode(model).eval(), example, dynamic_shapes={"ids": {0: batch, 1: time}, "lengths": {0: batch}}
            )
    finally:
        model.train(was_training)
    if path is not None:
        with written_beside(path) as part:
            torch.export.save(program, part)
    return program


def load_encoder(path: str | os.PathLike[str]) -> Encoder:
    """Read what :func:`export_encoder` wrote: a function of (ids [B, T], lengths [B]) that gives [B, d].

    The code of the model is not needed, nor imported. (``torch.export.load`` alone needs the operators to be there already:
    they are defined when they are first used, not by ``import seqrec_fast``.)

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no exported program.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no exported program {path}")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a broken archive
        raise ValueError(f"{path} does not hold an exported program: {str(error).splitlines()[0]}") from error
    return cast(Encoder, program.module())
