"""The options every catalogue operator shares: what a score is, and which pairs have none.

    s[r, i] = scale · row_scale[r] · (q_r · v_i) + bias[i]         −∞ where (r, i) is excluded

A :class:`LogitSpec` is built once from the public keywords ``scale``, ``bias`` and ``exclude``, with every check, and travels to
all backends as five raw arguments (``_LOGITS`` in ``_schema.py``).
"""

from __future__ import annotations

import math
import operator as operator_module
from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex, cast

import torch
from torch import Tensor

ID_DTYPES = (torch.int64, torch.int32)
OTHER_SPARSE = (torch.sparse_coo, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
PLAIN = (Tensor, torch.nn.Parameter)
NO_NUMBERS = ("bool", "bool_")  # Python's and NumPy's


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LogitSpec:
    """The options in raw form. B query rows, I items.

    Attributes:
        scale: for every row.
        row_scale: [B], multiplies ``scale``; the query's dtype, or wide under autocast.
        bias: [I], not scaled; the query's dtype, or wide under autocast.
        exclude: int32 or int64. Without ``exclude_crow``: [B, n], or [n] for every row alike, −1 is padding. With it: the column
            ids of a compressed sparse row matrix.
        exclude_crow: [B + 1], where each row's ids begin.
    """

    scale: float = 1.0
    row_scale: Tensor | None = None
    bias: Tensor | None = None
    exclude: Tensor | None = None
    exclude_crow: Tensor | None = None

    def args(self) -> tuple[float, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The five raw arguments, in the order of the schema."""
        return self.scale, self.row_scale, self.bias, self.exclude, self.exclude_crow

    def take_rows(self, rows: Tensor) -> LogitSpec:
        """The options of ``rows`` (int64, ascending) alone."""
        row_scale = None if self.row_scale is None else self.row_scale[rows]
        exclude, crow = self.exclude, self.exclude_crow
        if exclude is not None and crow is not None:
            exclude, crow = take_csr_rows(crow, rows, exclude)
        elif exclude is not None and exclude.dim() == 2:
            exclude = exclude[rows]
        return LogitSpec(self.scale, row_scale, self.bias, exclude, crow)

    @staticmethod
    def build(
        operator: str,
        query: Tensor,
        items: Tensor,
        *,
        scale: float | Tensor = 1.0,
        bias: Tensor | None = None,
        exclude: Tensor | None = None,
        float_dtypes: tuple[torch.dtype, ...] | None = None,
    ) -> LogitSpec:
        """Checks the public keywords and flattens the leading dimensions.

        Args:
            operator: for the messages.
            query: [..., d], checked by the caller.
            items: [I, d], checked by the caller.
            scale, bias, exclude: as the public functions take them.
            float_dtypes: what a tensor ``scale`` and ``bias`` may be; default: the query's dtype.

        Raises:
            TypeError: a wrong kind or dtype.
            ValueError: a wrong shape or device.
        """
        lead = query.shape[:-1]
        dtypes = float_dtypes or (query.dtype,)
        row_scale = None
        if isinstance(scale, Tensor):
            check_vector(operator, "scale", scale, query, dtypes)
            if scale.shape != lead:
                raise ValueError(
                    f"{operator}: a tensor scale must have the shape of the query's leading dimensions {tuple(lead)}, "
                    f"got {tuple(scale.shape)}"
                )
            row_scale = scale.reshape(-1)
            scale = 1.0
        else:
            scale = check_float(operator, "scale", scale, "a float or a tensor")
        if bias is not None:
            check_vector(operator, "bias", bias, query, dtypes)
            if bias.shape != items.shape[:1]:
                raise ValueError(f"{operator}: bias must have shape [I] = ({items.shape[0]},), got {tuple(bias.shape)}")
        ids, crow = _exclusion(operator, query, items, exclude)
        return LogitSpec(scale, row_scale, bias, ids, crow)


def check_int(operator: str, name: str, value: object) -> int:
    """An int, or what stands for one exactly (``__index__``), such as a NumPy scalar; no bool, no tensor.

    Raises:
        TypeError: it is something else.
        ValueError: it does not fit in 64 bits.
    """
    if isinstance(value, torch.SymInt) or (torch.compiler.is_compiling() and type(value) is int):
        return cast(int, value)  # no guard on its size
    if type(value).__name__ in NO_NUMBERS or isinstance(value, Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{operator}: {name} must be an int, got {type(value).__name__}")
    try:
        number = operator_module.index(cast(SupportsIndex, value))
    except TypeError as error:  # an array
        raise TypeError(f"{operator}: {name} must be an int, got {type(value).__name__}") from error
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{operator}: {name} must fit in 64 bits, got an int of {number.bit_length()} bits")
    return number


def check_float(operator: str, name: str, value: object, meaning: str = "a float") -> float:
    """A float, or what converts to one (``__float__``), such as an int or a NumPy scalar; no bool, no tensor.

    Raises:
        TypeError: it is something else.
        ValueError: it is beyond the range of a float.
    """
    if type(value) is float or (torch.compiler.is_compiling() and type(value) is int):
        return float(cast(float, value))
    if type(value).__name__ in NO_NUMBERS or isinstance(value, Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{operator}: {name} must be {meaning}, got {type(value).__name__}")
    try:
        return float(cast(SupportsFloat, value))
    except OverflowError as error:
        raise ValueError(f"{operator}: {name} must be within the range of a float, got a larger number") from error
    except TypeError as error:  # an array
        raise TypeError(f"{operator}: {name} must be {meaning}, got {type(value).__name__}") from error


def check_vector(operator: str, name: str, tensor: Tensor, query: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A floating tensor beside the query: kind, dtype and device.

    Raises:
        TypeError, ValueError: as the public functions document.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{operator}: {name} must have the query's dtype ({query.dtype}), got {tensor.dtype}")
    check_strided(operator, name, tensor)
    check_storage(operator, name, tensor)
    check_device(operator, name, tensor, query)


def check_strided(operator: str, name: str, tensor: Tensor) -> None:
    """Neither sparse nor nested, nor in some library's own layout."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{operator}: {name} must be a dense tensor, got {kind}")


def check_storage(operator: str, name: str, tensor: Tensor) -> None:
    """Its memory was not taken away (``untyped_storage().resize_(0)``): torch's kernels would read it all the same, and crash.

    Raises:
        RuntimeError: it was.
    """
    # Fake, functional and transformed tensors have no memory of their own to ask for, and nothing reads it.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(tensor) not in PLAIN:
        return
    if tensor.is_meta or torch._C._are_functorch_transforms_active():
        return
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise RuntimeError(f"{operator}: {name} has no memory: its storage was freed")


def check_device(operator: str, name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{operator}: {name} must be on the query's device ({query.device}), got {tensor.device}")


def check_id_tensor(operator: str, name: str, ids: object, query: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """An integer tensor of item ids: kind, dtype and device."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor of item ids, got {type(ids).__name__}")
    if ids.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{operator}: {name} must be {names}, got {ids.dtype}")
    check_strided(operator, name, ids)
    check_storage(operator, name, ids)
    check_device(operator, name, ids, query)


def csr_parts(operator: str, name: str, matrix: Tensor, query: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """(column ids, crow) of a ``torch.sparse_csr`` matrix [B, I]; its values are ignored.

    Raises:
        ValueError: another shape or device.
    """
    check_device(operator, name, matrix, query)
    rows = math.prod(query.shape[:-1])
    if tuple(matrix.shape) != (rows, num_items):
        raise ValueError(
            f"{operator}: {name} as sparse_csr must have shape [B, I] = ({rows}, {num_items}), got {tuple(matrix.shape)}"
        )
    ids, crow = matrix.col_indices(), matrix.crow_indices()
    check_storage(operator, name, ids)
    check_storage(operator, name, crow)
    if crow.shape != (rows + 1,):  # torch builds a matrix without a look at its indices
        raise ValueError(
            f"{operator}: {name} as sparse_csr must have B + 1 = {rows + 1} row pointers, got {tuple(crow.shape)}"
        )
    return ids, crow


def check_sparse_layout(operator: str, name: str, value: object) -> None:
    """Where a ``torch.sparse_csr`` matrix is taken, no other sparse one is.

    Raises:
        TypeError: it is one.
    """
    if isinstance(value, Tensor) and value.layout in OTHER_SPARSE:
        raise TypeError(f"{operator}: {name} as a sparse matrix must have layout torch.sparse_csr, got {value.layout}")


def is_csr(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.sparse_csr


def _exclusion(
    operator: str, query: Tensor, items: Tensor, exclude: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if exclude is None:
        return None, None
    if is_csr(exclude):
        return csr_parts(operator, "exclude", exclude, query, items.shape[0])
    check_sparse_layout(operator, "exclude", exclude)
    check_id_tensor(operator, "exclude", exclude, query, ID_DTYPES)
    lead = query.shape[:-1]
    if exclude.dim() == query.dim() and exclude.shape[:-1] == lead:
        if not lead:
            return exclude, None  # one row: its own list is that of every row
        return exclude.reshape(math.prod(lead), exclude.shape[-1]), None
    if exclude.dim() == 1:
        return exclude, None
    raise ValueError(
        f"{operator}: exclude must have shape [n], or [..., n] with the query's leading dimensions {tuple(lead)}, "
        f"got {tuple(exclude.shape)}"
    )


def take_csr_rows(crow: Tensor, rows: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
    """``rows`` (ascending) of compressed sparse row data: (data…, crow)."""
    lengths = crow.diff()
    kept = torch.zeros(len(lengths), dtype=torch.bool, device=crow.device)
    kept[rows] = True
    inside = torch.repeat_interleave(kept, lengths, output_size=data[0].shape[0])
    return *(d[inside] for d in data), torch.nn.functional.pad(lengths[rows].cumsum(0), (1, 0))


# Values: looked at inside the operators, on the CPU only, since a look at CUDA memory is a synchronisation.


def check_ids(operator: str, name: str, ids: Tensor, num_items: int, *, padding: bool) -> None:
    """Every id is in 0…I−1, or −1 where ``padding``.

    Raises:
        IndexError: the first id that is not, by value.
    """
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < (-1 if padding else 0) or high >= num_items:
        wrong = low if low < (-1 if padding else 0) else high
        range_ = f"0…{num_items - 1}" if num_items else "an empty catalogue, which has none"
        extra = ", or -1 for padding" if padding else ""
        raise IndexError(f"{operator}: {name} must hold item ids in {range_}{extra}, got {wrong}")


def check_crow(operator: str, name: str, ids: Tensor, crow: Tensor | None) -> None:
    """Row pointers, where there are any, cut ``ids`` into rows.

    Raises:
        ValueError: they do not rise from 0 to the number of ids.
    """
    if crow is None:
        return
    bounds = crow.new_tensor([0, ids.shape[0]])
    if not torch.equal(crow[[0, -1]], bounds) or bool((crow.diff() < 0).any()):
        raise ValueError(
            f"{operator}: {name} is not a valid sparse_csr matrix: its row pointers must rise from 0 to {ids.shape[0]}"
        )


def check_exclusion(operator: str, logits: LogitSpec, num_items: int) -> None:
    """The ids of ``exclude`` are in range.

    Raises:
        IndexError: one is not.
        ValueError: the row pointers of a sparse matrix do not cut its ids into rows.
    """
    if logits.exclude is not None and logits.exclude.device.type == "cpu":
        check_crow(operator, "exclude", logits.exclude, logits.exclude_crow)
        check_ids(operator, "exclude", logits.exclude, num_items, padding=logits.exclude_crow is None)
