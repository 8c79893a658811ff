"""``sf.gru``: against torch.nn, its checks, its gradients, graphs and transforms. What it shares with lstm is tested there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import recurrent as suite
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqrec_fast as sf
from seqrec_fast.backends.reference._calls import GRUCall

T, B, I, H = 9, 4, 5, 6
LENGTHS = torch.tensor([9, 0, 4, 1])


def stock(**options: Any) -> torch.nn.GRU:
    return torch.nn.GRU(I, H, dtype=torch.float64, **options)


def inputs(layers: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(T, B, I, dtype=torch.float64), torch.randn(layers, B, H, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_equals_torch(batch_first: bool, bias: bool, bidirectional: bool, num_layers: int) -> None:
    module = stock(num_layers=num_layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    x, hx = inputs(num_layers * (2 if bidirectional else 1))
    x = x.transpose(0, 1) if batch_first else x
    weights = list(module.parameters())
    leaves = [x.requires_grad_(), hx.requires_grad_(), *weights]
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    found = []
    for output, h_n in (module(x, hx), sf.gru(x, hx, weights, **options)):
        loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() + h_n.sin().sum()
        found.append((output, h_n, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(sf.gru(x, None, weights, **options)[0], module(x)[0])


def test_lengths_equal_packing() -> None:
    module = stock(num_layers=2, bidirectional=True)
    x, hx = inputs(4)
    lengths = LENGTHS.clamp(min=1)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, h_n = module(packed, hx)
    options = {"num_layers": 2, "bidirectional": True}
    ours = sf.gru(x, hx, list(module.parameters()), lengths=lengths, **options)
    torch.testing.assert_close(ours, (pad_packed_sequence(output, total_length=T)[0], h_n))
    packed_output, packed_h = sf.gru(packed, hx, list(module.parameters()), **options)
    torch.testing.assert_close((packed_output.data, packed_h), (output.data, h_n))


def test_reset_begins_a_new_segment() -> None:
    module = stock(bidirectional=True)
    x, hx = inputs(2)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 4] = True
    output, h_n = sf.gru(x, hx, list(module.parameters()), bidirectional=True, reset=reset)
    zero = torch.zeros_like(hx[:1])
    first, h_first = module(x[:4], torch.cat([hx[:1], zero]))
    second, h_second = module(x[4:], torch.cat([zero, hx[1:]]))
    torch.testing.assert_close(output, torch.cat([first, second]))
    torch.testing.assert_close(h_n, torch.stack([h_second[0], h_first[1]]))


def test_no_steps_and_no_rows() -> None:
    weights = list(stock().parameters())
    _, hx = inputs()
    output, h_n = sf.gru(torch.zeros(0, B, I, dtype=torch.float64), hx, weights)
    assert output.shape == (0, B, H)
    torch.testing.assert_close(h_n, hx, rtol=0, atol=0)
    output, h_n = sf.gru(torch.zeros(T, 0, I, dtype=torch.float64), None, weights)
    assert (output.shape, h_n.shape) == ((T, 0, H), (1, 0, H))


GRAPH_OPTIONS = {
    "stacked": {"num_layers": 2, "bidirectional": True},
    "noise": {"zoneout": 0.2, "recurrent_dropout": 0.2, "training": True},
    "recompute_last": {"save_gates": False, "last_only": True},
}


@pytest.mark.parametrize("name", GRAPH_OPTIONS)
def test_compiled_with_dynamic_rows_and_steps(name: str) -> None:
    options = GRAPH_OPTIONS[name]
    module = stock(num_layers=2, bidirectional=True) if name == "stacked" else stock()
    weights = list(module.parameters())

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        output: Tensor = sf.gru(x, None, weights, lengths=lengths, **options)[0]
        return output

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, rows in ((T, B), (3, 7)):
        x = torch.randn(steps, rows, I, dtype=torch.float64, requires_grad=True)
        results = []
        for function in (call, compiled):
            torch.manual_seed(2)
            value = function(x, torch.arange(rows) % (steps + 1))
            results.append((value, torch.autograd.grad(value.sin().sum(), [x, *weights])))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_exported_with_dynamic_sizes() -> None:
    module = sf.GRU(I, H, batch_first=True)
    shapes = {"input": {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("steps", min=2)}}
    program = torch.export.export(module, (torch.randn(3, 5, I),), dynamic_shapes=shapes)
    x = torch.randn(6, 11, I)
    torch.testing.assert_close(program.module()(x), module(x))


def test_gradcheck_and_double_backward() -> None:
    weights = [torch.randn_like(w).requires_grad_() for w in torch.nn.GRU(2, 3, dtype=torch.float64).parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return sf.gru(x, h, weights, lengths=torch.tensor([1, 3]))

    assert torch.autograd.gradcheck(call, (x, h, *weights), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, h, *weights))


def test_functional_transforms_agree_with_loops() -> None:
    weights = tuple(w.detach() for w in stock().parameters())
    x, _ = inputs()

    def loss(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        total: Tensor = sf.gru(x, None, weights)[0].sin().sum()
        return total

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, x[:, :, None])
    for row in range(B):
        expected = torch.func.grad(loss)(weights, x[:, row : row + 1])
        torch.testing.assert_close(tuple(g[row] for g in per_sample), expected)
    tangent = torch.randn_like(x)
    _, jvp = torch.func.jvp(lambda x: sf.gru(x, None, weights)[0], (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: sf.gru(x, None, weights)[0], x)
    torch.testing.assert_close(jvp, (jacobian * tangent).flatten(3).sum(-1))
    assert jvp.abs().max() > 0.01


def test_vmap_inside_a_compiled_function() -> None:
    members = [torch.stack([w.detach(), w.detach() * 0.5]) for w in stock().parameters()]
    x, _ = inputs()
    function = torch.vmap(lambda *w: sf.gru(x, None, w)[0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*members), function(*members))


def test_opcheck() -> None:
    for case in suite.CASES:
        if case.name in ("everything", "ragged_last_only_reverse", "recompute", "ids"):
            args = suite.raw(suite.build("gru", case))
            for argument in args:
                if isinstance(argument, Tensor) and argument.is_floating_point():
                    argument.requires_grad_()
            # Saved states beyond a length are unspecified, and only the reference makes the same of them twice.
            with sf.use_backend("auto" if GRUCall(*args).lengths is None else "reference"):
                torch.library.opcheck(torch.ops.seqrec_fast.gru.default, tuple(args))


BAD = [
    ({"input": torch.zeros(T, B, I)}, TypeError, "must have the dtype of input"),
    ({"input": torch.zeros(T, B, I + 1, dtype=torch.float64)}, ValueError, "w_ih of weights"),
    ({"hx": (torch.zeros(1, B, H),)}, TypeError, "h must be a tensor, got tuple"),
    ({"hx": torch.zeros(1, B, H + 1, dtype=torch.float64)}, ValueError, r"h of hx must have shape \[L·D, B, P\]"),
    ({"num_layers": 3}, ValueError, "weights must hold 2 or 4 tensors for each of 3 layers"),
    ({"zoneout": -0.1}, ValueError, "zoneout must be a probability"),
    ({"lengths": torch.tensor([1, 1, 2, T + 1])}, ValueError, "lengths must lie in 0…9 .*got 10 for row 3"),
    ({"reset": torch.zeros(T, B, dtype=torch.bool)}, ValueError, r"reset must have shape \[B, T\] = \(4, 9\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(T, B, I, dtype=torch.float64), "hx": None}
    with pytest.raises(error, match=message) as caught:
        sf.gru(weights=list(stock().parameters()), **(arguments | change))
    assert str(caught.value).startswith("gru: ")
