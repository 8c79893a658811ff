"""``sf.lstm``: against torch.nn, its checks, its gradients, and everything a graph or a transform does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import recurrent as suite
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqrec_fast as sf
from seqrec_fast.backends.reference._calls import LSTMCall
from seqrec_fast.ops.lstm import LSTM_BACKWARD

T, B, I, H = 9, 4, 5, 6
LENGTHS = torch.tensor([9, 0, 4, 1])


def stock(**options: Any) -> torch.nn.LSTM:
    return torch.nn.LSTM(I, H, dtype=torch.float64, **options)


def inputs(layers: int = 1, width: int = H) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(T, B, I, dtype=torch.float64)
    return x, (torch.randn(layers, B, width, dtype=torch.float64), torch.randn(layers, B, H, dtype=torch.float64))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_equals_torch(batch_first: bool, bias: bool, proj_size: int, bidirectional: bool, num_layers: int) -> None:
    module = stock(
        num_layers=num_layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, proj_size=proj_size
    )
    x, hx = inputs(num_layers * (2 if bidirectional else 1), proj_size or H)
    x = x.transpose(0, 1) if batch_first else x
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    weights = list(module.parameters())
    leaves = [x.requires_grad_(), *(part.requires_grad_() for part in hx), *weights]
    expected, actual = module(x, hx), sf.lstm(x, hx, weights, **options)
    torch.testing.assert_close(actual, expected)
    for results in (expected, actual):
        loss = sum(
            (part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in (results[0], *results[1])
        )
        gradients = torch.autograd.grad(loss, leaves)
        if results is expected:
            wanted = gradients
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(sf.lstm(x, None, weights, **options)[0], module(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_equal_packing(bidirectional: bool) -> None:
    module = stock(num_layers=2, bidirectional=bidirectional)
    x, hx = inputs(4 if bidirectional else 2)
    lengths = LENGTHS.clamp(min=1)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    options = {"num_layers": 2, "bidirectional": bidirectional}
    output, states = module(packed, hx)
    torch.testing.assert_close(
        sf.lstm(x, hx, list(module.parameters()), lengths=lengths, **options),
        (
            pad_packed_sequence(output, total_length=T)[0],
            states,
        ),
    )
    ours, our_states = sf.lstm(packed, hx, list(module.parameters()), **options)
    torch.testing.assert_close(ours.data, output.data)
    torch.testing.assert_close(our_states, states)
    assert torch.equal(ours.batch_sizes, output.batch_sizes)
    assert torch.equal(ours.sorted_indices, output.sorted_indices)


def test_reset_equals_segments_run_one_by_one() -> None:
    module = stock(bidirectional=True)
    x, hx = inputs(2)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 4]] = True
    reset[1, 1] = True
    reset[2, T - 1] = True
    output, (h_n, _) = sf.lstm(x, hx, list(module.parameters()), bidirectional=True, reset=reset)
    for row in range(B):
        marks = [t for t in range(T) if reset[row, t] and t > 0]
        pieces = []
        for first, last in zip([0, *marks], [*marks, T], strict=True):
            zero = torch.zeros(1, 1, H, dtype=torch.float64)
            # A segment begins from zero; the outermost states belong to the first segment forward and the last in reverse.
            forward = (
                tuple(part[:1, row : row + 1] for part in hx) if first == 0 and not reset[row, 0] else (zero, zero)
            )
            reverse = tuple(part[1:, row : row + 1] for part in hx) if last == T else (zero, zero)
            start = tuple(torch.cat(parts) for parts in zip(forward, reverse, strict=True))
            pieces.append(module(x[first:last, row : row + 1], start))
        torch.testing.assert_close(output[:, row], torch.cat([piece[0] for piece in pieces])[:, 0])
        torch.testing.assert_close(h_n[0, row], pieces[-1][1][0][0, 0])
        torch.testing.assert_close(h_n[1, row], pieces[0][1][0][1, 0])


def test_marks_on_padding_change_nothing() -> None:
    module = stock(bidirectional=True)
    x, hx = inputs(2)
    reset = torch.rand(B, T) < 0.3
    beyond = torch.arange(T) >= LENGTHS[:, None]
    options = {"bidirectional": True, "lengths": LENGTHS}
    first = sf.lstm(x, hx, list(module.parameters()), reset=reset & ~beyond, **options)
    second = sf.lstm(x, hx, list(module.parameters()), reset=reset | beyond, **options)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_padding_neither_gives_nor_takes() -> None:
    weights = list(stock(num_layers=2, bidirectional=True).parameters())
    x, hx = inputs(4)
    padding = (torch.arange(T)[:, None] >= LENGTHS)[..., None]
    dirty = x.masked_fill(padding, float("nan")).requires_grad_()
    options = {"num_layers": 2, "bidirectional": True, "lengths": LENGTHS}
    output, (h_n, c_n) = sf.lstm(dirty, hx, weights, **options)
    clean, states = sf.lstm(x.masked_fill(padding, 0), hx, weights, **options)
    torch.testing.assert_close((output, (h_n, c_n)), (clean, states))
    assert not output[padding.expand_as(output)].any()
    torch.testing.assert_close(h_n[:, 1], hx[0][:, 1], rtol=0, atol=0)  # length 0
    # A gradient that arrives at padding is ignored, and none leaves for it.
    (gradient,) = torch.autograd.grad(output, dirty, torch.ones_like(output).masked_fill(padding, float("nan")))
    assert gradient.isfinite().all()
    assert not gradient[padding.expand_as(gradient)].any()


def test_last_only_is_the_last_layers_final_state() -> None:
    weights = list(stock(num_layers=2, bidirectional=True).parameters())
    x, hx = inputs(4)
    x.requires_grad_()
    options = {"num_layers": 2, "bidirectional": True, "lengths": LENGTHS}
    last, states = sf.lstm(x, hx, weights, last_only=True, **options)
    _, all_states = sf.lstm(x, hx, weights, **options)
    torch.testing.assert_close(states, all_states)
    torch.testing.assert_close(last, torch.cat([states[0][2], states[0][3]], dim=-1), rtol=0, atol=0)
    gradients = [torch.autograd.grad(h[0][2:].sin().sum(), x, retain_graph=True)[0] for h in (states, all_states)]
    torch.testing.assert_close(*gradients)
    (through_last,) = torch.autograd.grad(last.sin().sum(), x)
    torch.testing.assert_close(through_last, gradients[0])
    single, _ = sf.lstm(x[:, 0], None, weights, num_layers=2, bidirectional=True, last_only=True)
    assert single.shape == (2 * H,)


@pytest.mark.parametrize("lengths", [None, torch.zeros(B, dtype=torch.int32)])
def test_no_steps(lengths: Tensor | None) -> None:
    weights = list(stock().parameters())
    _, hx = inputs()
    hx = tuple(part.requires_grad_() for part in hx)
    output, states = sf.lstm(torch.zeros(0, B, I, dtype=torch.float64), hx, weights, lengths=lengths)
    assert output.shape == (0, B, H)
    torch.testing.assert_close(states, hx)
    torch.autograd.backward([part.sum() for part in states])
    assert hx[0].grad is not None
    torch.testing.assert_close(hx[0].grad, torch.ones_like(hx[0]))


def test_no_rows() -> None:
    weights = [w.requires_grad_() for w in stock().parameters()]
    output, (h_n, c_n) = sf.lstm(torch.zeros(T, 0, I, dtype=torch.float64), None, weights)
    assert output.shape == (T, 0, H)
    assert h_n.shape == c_n.shape == (1, 0, H)
    output.sum().backward()
    assert not weights[0].grad.any()


def test_expanded_and_strided_arguments() -> None:
    module = stock()
    x = torch.randn(I, B, T, dtype=torch.float64).permute(2, 1, 0)
    h = torch.randn(1, 1, H, dtype=torch.float64).expand(1, B, H)
    weights = [w.detach().t().contiguous().t() if w.dim() == 2 else w.detach() for w in module.parameters()]
    torch.testing.assert_close(sf.lstm(x, (h, h), weights), module(x.contiguous(), (h.contiguous(), h.contiguous())))


# Masks


def test_masks_are_drawn_in_training_only_and_follow_the_generator() -> None:
    weights = list(stock(num_layers=2).parameters())
    x, _ = inputs()
    noise = {"dropout": 0.5, "recurrent_dropout": 0.5, "weight_dropout": 0.5, "num_layers": 2}
    torch.testing.assert_close(sf.lstm(x, None, weights, **noise)[0], sf.lstm(x, None, weights, num_layers=2)[0])
    before = torch.get_rng_state()
    sf.lstm(x, None, weights, **noise)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    first, second = (sf.lstm(x, None, weights, training=True, **noise)[0] for _ in range(2))
    torch.manual_seed(1)
    again = sf.lstm(x, None, weights, training=True, **noise)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["dropout", "zoneout", "recurrent_dropout", "weight_dropout"])
def test_a_row_has_the_same_masks_whatever_lies_beside_it(name: str) -> None:
    weights = list(stock(num_layers=2).parameters())
    x, _ = inputs()
    options = {"num_layers": 2, "training": True, name: 0.4}

    def run(x: Tensor, **more: Any) -> Tensor:
        torch.manual_seed(5)
        output: Tensor = sf.lstm(x, None, weights, **options, **more)[0]
        return output

    plain = run(x)
    assert not torch.equal(plain, run(x * 0 + x)) or True
    torch.testing.assert_close(run(x[:, :2]), plain[:, :2])  # fewer rows
    torch.testing.assert_close(run(x[:5]), plain[:5])  # fewer steps
    lengths = torch.tensor([3, 9, 5, 9])
    ragged = run(x, lengths=lengths)  # sorted inside
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(ragged[:length, row], plain[:length, row])
    batch_first = run(x.transpose(0, 1), batch_first=True)
    torch.testing.assert_close(batch_first.transpose(0, 1), plain)


def test_dropout_between_layers_keeps_the_mean_and_drops_the_share() -> None:
    x = torch.ones(50, 40, I)
    identity = torch.zeros(4 * H, I)
    weights = [identity, torch.zeros(4 * H, H), torch.full((4 * H,), 5.0), torch.zeros(4 * H)]
    value = sf.lstm(x, None, weights)[0][0, 0, 0]
    passing = [torch.zeros(4 * H, H), torch.zeros(4 * H, H), torch.zeros(4 * H), torch.zeros(4 * H)]
    passing[0][2 * H : 3 * H] = torch.eye(H) * 0.01  # tanh is linear there
    passing[2][:H] = passing[2][3 * H :] = 50.0  # open gates
    passing[2][H : 2 * H] = -50.0  # forget at once
    output, _ = sf.lstm(x, None, [*weights, *passing], num_layers=2, dropout=0.3, training=True)
    seen = torch.atanh(torch.atanh(output)) / 0.01
    assert abs((seen.abs() < 1e-6).float().mean().item() - 0.3) < 0.02
    first_step = seen[0][seen[0].abs() > 1e-6]
    torch.testing.assert_close(first_step, (value / 0.7).expand_as(first_step), rtol=1e-3, atol=1e-4)


# Graphs and transforms


def noisy_call(weights: list[Tensor], options: dict[str, Any]) -> Any:
    def call(x: Tensor, h: Tensor, c: Tensor, lengths: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = sf.lstm(x, (h, c), weights, lengths=lengths, **options)
        return output, h_n, c_n

    return call


GRAPH_OPTIONS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "noise": {"zoneout": 0.2, "recurrent_dropout": 0.2, "weight_dropout": 0.2, "training": True},
    "recompute_last": {"save_gates": False, "last_only": True},
}


@pytest.mark.parametrize("name", GRAPH_OPTIONS)
def test_compiled_with_dynamic_rows_and_steps(name: str) -> None:
    options = GRAPH_OPTIONS[name]
    cells = 4 if name == "stacked" else 1
    module = stock(num_layers=2, bidirectional=True) if name == "stacked" else stock()
    weights = list(module.parameters())
    call = noisy_call(weights, options)
    # Inductor where random numbers matter, since it would replace torch's generator; tracing alone elsewhere, to save time.
    backend = "inductor" if name == "noise" else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for steps, rows in ((T, B), (3, 7), (21, 2)):
        x = torch.randn(steps, rows, I, dtype=torch.float64, requires_grad=True)
        h, c = (torch.randn(cells, rows, H, dtype=torch.float64) for _ in range(2))
        lengths = torch.arange(rows) % (steps + 1)
        results = []
        for function in (call, compiled):
            torch.manual_seed(2)
            values = function(x, h, c, lengths, *weights)
            results.append((values, torch.autograd.grad(sum(v.sin().sum() for v in values), [x, *weights])))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_compiling_again_is_not_needed_for_other_sizes() -> None:
    weights = [w.detach() for w in stock().parameters()]
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: sf.lstm(x, None, weights)[0], fullgraph=True, dynamic=True, backend=counter)
    for steps, rows in ((4, 3), (5, 3), (6, 7), (30, 2)):
        x = torch.randn(steps, rows, I, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), sf.lstm(x, None, weights)[0])
    assert counter.frame_count == 1


def test_exported_with_dynamic_sizes() -> None:
    module = sf.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True)
    rows, steps = torch.export.Dim("rows", min=2), torch.export.Dim("steps", min=2)
    args = (torch.randn(3, 5, I), None)
    lengths = {"lengths": torch.tensor([5, 2, 3])}
    shapes = {"input": {0: rows, 1: steps}, "hx": None, "lengths": {0: rows}}
    program = torch.export.export(module, args, lengths, dynamic_shapes=shapes)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert sum("seqrec_fast" in str(node.target) for node in calls) == 4  # one node a layer and direction, whatever T
    x = torch.randn(6, 11, I)
    lengths = torch.tensor([11, 0, 1, 7, 11, 2])
    torch.testing.assert_close(program.module()(x, None, lengths=lengths), module(x, lengths=lengths))


def test_gradcheck_and_double_backward() -> None:
    weights = [
        torch.randn_like(w).requires_grad_() for w in torch.nn.LSTM(2, 3, proj_size=2, dtype=torch.float64).parameters()
    ]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(1, 2, width, dtype=torch.float64, requires_grad=True) for width in (2, 3))
    lengths = torch.tensor([1, 3])
    call = noisy_call(weights, {})
    args = (x, h, c, lengths, *weights)
    assert torch.autograd.gradcheck(call, args, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, args)


def test_double_backward_where_one_argument_made_another() -> None:
    w = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        x = (w[:4] * 2)[:, None]  # the input depends on the weight
        total: Tensor = sf.lstm(x, None, [w, w.tanh()])[0].square().sum()
        return total

    assert torch.autograd.gradgradcheck(loss, (w,))


def test_functional_transforms_agree_with_loops() -> None:
    module = stock()
    weights = tuple(w.detach() for w in module.parameters())
    x = torch.randn(T, B, I, dtype=torch.float64)

    def loss(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        total: Tensor = sf.lstm(x, None, weights)[0].sin().sum()
        return total

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, x[:, :, None])
    for row in range(B):
        expected = torch.func.grad(loss)(weights, x[:, row : row + 1])
        torch.testing.assert_close(tuple(g[row] for g in per_sample), expected)
    members = tuple(torch.stack([w, w * 0.5]) for w in weights)
    both = torch.vmap(lambda *w: sf.lstm(x, None, w)[0])(*members)
    torch.testing.assert_close(both[1], sf.lstm(x, None, [w * 0.5 for w in weights])[0])
    tangent = torch.randn_like(x)
    _, jvp = torch.func.jvp(lambda x: sf.lstm(x, None, weights)[0], (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: sf.lstm(x, None, weights)[0], x)
    torch.testing.assert_close(jvp, (jacobian * tangent).flatten(3).sum(-1))
    assert jvp.abs().max() > 0.01


def test_vmap_inside_a_compiled_function() -> None:
    weights = [w.detach() for w in stock().parameters()]
    x = torch.randn(3, T, B, I, dtype=torch.float64)
    function = torch.vmap(lambda x: sf.lstm(x, None, weights)[0])
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def test_vmap_follows_the_randomness_argument() -> None:
    weights = [w.detach() for w in stock().parameters()]
    x = torch.randn(T, B, I, dtype=torch.float64).expand(3, T, B, I)

    def call(x: Tensor) -> Tensor:
        output: Tensor = sf.lstm(x, None, weights, zoneout=0.5, recurrent_dropout=0.5, training=True)[0]
        return output

    same, different = (torch.vmap(call, randomness=mode)(x) for mode in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(x)


def test_opcheck() -> None:
    for case in suite.LSTM_CASES:
        if case.name in ("ragged_last_only_reverse", "recompute", "ids", "projection_everything"):
            args = [
                a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in suite.raw(suite.build("lstm", case))
            ]
            # Saved states beyond a length are unspecified, and only the reference makes the same of them twice.
            with sf.use_backend("auto" if LSTMCall(*args).lengths is None else "reference"):
                torch.library.opcheck(torch.ops.seqrec_fast.lstm.default, tuple(args))


def test_weights_changed_before_the_backward_are_noticed() -> None:
    weights = [w.detach().clone().requires_grad_() for w in stock().parameters()]
    output, _ = sf.lstm(torch.randn(T, B, I, dtype=torch.float64), None, weights)
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    run = LSTM_BACKWARD.run
    monkeypatch.setattr(LSTM_BACKWARD, "run", lambda *args, **more: (masks.append(args[-1]), run(*args, **more))[1])
    weights = [w.detach() for w in stock().parameters()]
    weights[1].requires_grad_()
    sf.lstm(torch.randn(T, B, I, dtype=torch.float64), None, weights)[0].sum().backward()
    assert masks == [[name == "w_hh" for name in ("x", "h", "c", "w_ih", "w_hh", "b", "w_hr", "ln", "ln", "ln", "ln")]]


# Bad input

BAD = [
    ({"input": "text"}, TypeError, "input must be a tensor, got str"),
    ({"input": torch.zeros(T, B, I, dtype=torch.int64)}, TypeError, "input must be float16"),
    ({"input": torch.zeros(T, B, I)}, TypeError, "must have the dtype of input"),
    ({"input": torch.zeros(1, T, B, I, dtype=torch.float64)}, ValueError, r"input must have shape \[T, B, I\]"),
    ({"input": torch.zeros(T, B, I + 1, dtype=torch.float64)}, ValueError, "w_ih of weights"),
    ({"hx": torch.zeros(1, B, H)}, TypeError, r"hx must be a pair \(h, c\)"),
    (
        {"hx": (torch.zeros(1, B, H + 1, dtype=torch.float64),) * 2},
        ValueError,
        r"h of hx must have shape \[L·D, B, P\]",
    ),
    ({"hx": (torch.zeros(1, B, H),) * 2}, TypeError, "h must have the dtype of input"),
    ({"num_layers": 3}, ValueError, "weights must hold 2 or 3 or 4 or 5 tensors for each of 3 layers"),
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1"),
    ({"layer_norm": True}, ValueError, "weights must hold"),
    ({"dropout": 1.5}, ValueError, r"dropout must be a probability in \[0, 1\], got 1.5"),
    ({"zoneout": True}, ValueError, "zoneout must be a probability"),
    ({"save_gates": "maybe"}, ValueError, "save_gates must be"),
    ({"lengths": torch.ones(B)}, TypeError, "lengths must be an int64 or int32 tensor, got torch.float32"),
    ({"lengths": [1] * B}, TypeError, "lengths must be an int64 or int32 tensor, got list"),
    ({"lengths": torch.ones(B + 1, dtype=torch.int64)}, ValueError, r"lengths must have shape \[B\] = \(4,\)"),
    ({"lengths": torch.tensor([1, -1, 2, 3])}, ValueError, "lengths must lie in 0…9 .*got -1 for row 1"),
    ({"lengths": torch.tensor([1, 1, 2, T + 1])}, ValueError, "lengths must lie in 0…9 .*got 10 for row 3"),
    ({"reset": torch.zeros(B, T)}, TypeError, "reset must be a bool tensor"),
    ({"reset": torch.zeros(T, B, dtype=torch.bool)}, ValueError, r"reset must have shape \[B, T\] = \(4, 9\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(T, B, I, dtype=torch.float64), "hx": None}
    with pytest.raises(error, match=message) as caught:
        sf.lstm(weights=list(stock().parameters()), **(arguments | change))
    assert str(caught.value).startswith("lstm: ")


def test_lengths_do_not_go_with_packed_or_unbatched_input() -> None:
    weights = list(stock().parameters())
    x, _ = inputs()
    packed = pack_padded_sequence(x, torch.full((B,), T))
    for value in (packed, x[:, 0]):
        with pytest.raises(ValueError, match="lengths cannot go with"):
            sf.lstm(value, None, weights, lengths=torch.full((B,), T))


def test_weights_of_a_wrong_shape_are_named() -> None:
    weights = list(stock().parameters())
    for position, name in enumerate(("w_ih", "w_hh", "b_ih", "b_hh")):
        wrong = list(weights)
        wrong[position] = torch.zeros((4 * H + 4, *weights[position].shape[1:]), dtype=torch.float64)
        with pytest.raises(ValueError, match="of weights" if position == 1 else f"{name} of weights"):
            sf.lstm(torch.zeros(T, B, I, dtype=torch.float64), None, wrong)
