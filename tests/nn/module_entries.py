"""torch's own descriptions of its recurrent modules (``ModuleInfo``), with the classes of ours that stand in for them."""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import seqrec_fast as sf


def _common_modules() -> types.ModuleType:
    """``torch.testing._internal.common_modules``, without what importing it changes for other tests of this process."""
    # Needed there as the base class of torch's own test cases alone, which are not used here.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    missing = sys.modules.setdefault("expecttest", stand_in) is stand_in
    frozen = torch.backends.flags_frozen()
    from torch.testing._internal import common_modules

    if missing:
        del sys.modules["expecttest"]
    if not frozen:  # the import forbids to set torch.backends' switches
        torch.backends.__allow_nonbracketed_mutation_flag = True  # type: ignore[attr-defined]
    return common_modules


common_modules = _common_modules()
OURS = {nn.LSTM: sf.LSTM, nn.GRU: sf.GRU, nn.LSTMCell: sf.LSTMCell, nn.GRUCell: sf.GRUCell}
INFOS = {info.module_cls: info for info in common_modules.module_db if info.module_cls in OURS}


@dataclass(frozen=True)
class Sample:
    """One way to make and call a module, from an entry of torch's."""

    stock: type[nn.Module]
    constructor: Any  # .args and .kwargs
    forward: Any  # the same; None where making it is already an error
    reference: Callable[..., Any] | None
    dtype: torch.dtype
    training: bool

    @property
    def args(self) -> tuple[Any, ...]:
        assert not self.forward.kwargs  # no entry has any, so that no test needs to pass them on
        return tuple(self.forward.args)

    def make(self, **more: Any) -> Any:
        """Our module."""
        return self._make(OURS[self.stock], **more)

    def make_stock(self, **more: Any) -> Any:
        return self._make(self.stock, **more)

    def _make(self, module_class: Any, **more: Any) -> Any:
        keywords = {"dtype": self.dtype, **self.constructor.kwargs, **more}
        return module_class(*self.constructor.args, **keywords).train(self.training)


def samples(stock: type[nn.Module], dtype: torch.dtype = torch.float64, training: bool = True) -> Iterator[Sample]:
    """The entry's inputs, packed sequences among them where it has some."""
    info = INFOS[stock]
    options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    for each in info.module_inputs_func(info, with_packed_sequence=True, **options):
        yield Sample(stock, each.constructor_input, each.forward_input, each.reference_fn, dtype, training)


def numbers(value: Any) -> list[Tensor]:
    """The floating tensors within arguments or results."""
    leaves = (leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(value))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def gradients(results: Any, leaves: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    """Of a loss that weighs every element of the results differently."""
    weighed = [
        (part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in numbers(results)
    ]
    return torch.autograd.grad(torch.stack(weighed).sum(), leaves, **options)
