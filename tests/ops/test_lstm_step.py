"""lstm_step: meaning, gradients, transforms, tracing and messages. Each backend against fp64 is in tests/conformance."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

import seqrec_fast as sf

NAMES = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")


def make(rows: int = 3, width: int = 5, hidden: int = 4, projected: int | None = None, **kind: object) -> list[Tensor]:
    projected = hidden if projected is None else projected
    sizes = [(rows, width), (rows, projected), (rows, hidden), (4 * hidden, width), (4 * hidden, projected)]
    return [torch.randn(size, **kind) for size in [*sizes, (4 * hidden,), (4 * hidden,)]]  # type: ignore[call-overload]


def step(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return sf.lstm_step(x, (h, c), *weights)  # type: ignore[arg-type]


def torch_step(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.aten.lstm_cell(x, [h, c], *weights)
    return result


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(bias: bool) -> None:
    tensors = make(dtype=torch.float64)[: 7 if bias else 5]
    for mine, theirs in zip(step(*tensors), torch_step(*tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_projected_state() -> None:
    x, h, c, w_ih, w_hh, b_ih, b_hh = make(projected=2, dtype=torch.float64)
    z = x @ w_ih.T + b_ih + h @ w_hh.T + b_hh
    i, f, g, o = z.chunk(4, 1)
    c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
    mine = step(x, h, c, w_ih, w_hh, b_ih, b_hh)
    torch.testing.assert_close(mine[0], o.sigmoid() * c_next.tanh())
    torch.testing.assert_close(mine[1], c_next)


def test_unbatched() -> None:
    x, h, c, *weights = make(rows=1)
    for mine, batched in zip(step(x[0], h[0], c[0], *weights), step(x, h, c, *weights), strict=True):
        assert mine.equal(batched[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_inplace_writes_the_state(backend: str) -> None:
    x, h, c, *weights = make()
    with torch.no_grad(), sf.use_backend(backend):
        expected = step(x, h, c, *weights)
        state = sf.lstm_step(x, (h, c), *weights, inplace=True)  # type: ignore[arg-type]
    assert state[0] is h
    assert state[1] is c
    assert h.equal(expected[0])
    assert c.equal(expected[1])


def test_inplace_unbatched() -> None:
    x, h, c, *weights = make(rows=1)
    with torch.no_grad():
        expected = step(x, h, c, *weights)
        sf.lstm_step(x[0], (h[0], c[0]), *weights, inplace=True)  # type: ignore[arg-type]
    assert h.equal(expected[0])
    assert c.equal(expected[1])


@pytest.mark.parametrize(
    "wanted", [(True,) * 7, (False, False, False, True, False, False, True), (True,) + (False,) * 6]
)
def test_gradcheck(wanted: tuple[bool, ...]) -> None:
    tensors = [t.requires_grad_(w) for t, w in zip(make(dtype=torch.float64), wanted, strict=True)]
    assert torch.autograd.gradcheck(step, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(step, tensors)


def test_one_of_the_outputs_unused() -> None:
    tensors = [t.requires_grad_() for t in make(dtype=torch.float64)]
    for output in (0, 1):
        mine = torch.autograd.grad(step(*tensors)[output].sum(), tensors)
        theirs = torch.autograd.grad(torch_step(*tensors)[output].sum(), tensors, allow_unused=True)
        for m, t in zip(mine, theirs, strict=True):
            torch.testing.assert_close(m, torch.zeros_like(m) if t is None else t)


def test_no_gates_are_kept_without_gradient() -> None:
    tensors = make()
    assert torch.ops.seqrec_fast.lstm_step(*tensors, False, 0)[2].numel() == 0
    assert torch.ops.seqrec_fast.lstm_step(*tensors, True, 0)[2].shape == (3, 16)


def test_opcheck() -> None:
    tensors = [t.requires_grad_() for t in make()]
    torch.library.opcheck(torch.ops.seqrec_fast.lstm_step.default, (*tensors, True, 0))
    plain = make()
    torch.library.opcheck(torch.ops.seqrec_fast.lstm_step_.default, (*plain, 0))
    h, c, gates = torch.ops.seqrec_fast.lstm_step(*plain, True, 0)
    arguments = (h, c, *plain[:3], c, *plain[3:5], gates, [True, False, True, True, False, True], 0)
    torch.library.opcheck(torch.ops.seqrec_fast.lstm_step_backward.default, arguments)


def test_compile_fullgraph_dynamic() -> None:
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        tensors = [t.requires_grad_() for t in make(rows, dtype=torch.float64)]
        mine, eager = compiled(*tensors), step(*tensors)
        for m, e in zip(mine, eager, strict=True):
            assert m.equal(e)
        g_mine = torch.autograd.grad(sum(m.sum() for m in mine), tensors)
        g_eager = torch.autograd.grad(sum(e.sum() for e in eager), tensors)
        for m, e in zip(g_mine, g_eager, strict=True):
            assert m.equal(e)


def test_compiled_graph_follows_the_precision_switch() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(node.args[-1] for node in graph.graph.nodes if "lstm_step" in str(node.target))
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    tensors = make()
    for name in ("highest", "high"):
        torch.set_float32_matmul_precision(name)
        compiled(*tensors)
    assert seen == [0, 1]


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(make()[3:])

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return step(x, h, c, *self.weights)


def test_export_with_dynamic_rows() -> None:
    module, rows = Module(), torch.export.Dim("rows")
    program = torch.export.export(module, tuple(make()[:3]), dynamic_shapes=({0: rows},) * 3)
    (target,) = {n.target for n in program.graph.nodes if n.op == "call_function"} - {operator.getitem}
    assert target is torch.ops.seqrec_fast.lstm_step.default
    other = make(11)[:3]
    for mine, eager in zip(program.module()(*other), module(*other), strict=True):
        assert mine.equal(eager)


def test_vmap_and_per_sample_gradients() -> None:
    x, h, c, *weights = make(dtype=torch.float64)
    mapped = torch.func.vmap(lambda x, h, c: step(x, h, c, *weights))(x, h, c)
    for mine, batched in zip(mapped, step(x, h, c, *weights), strict=True):
        torch.testing.assert_close(mine, batched)

    def loss(w_ih: Tensor, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return step(x, h, c, w_ih, *weights[1:])[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weights[0], x, h, c)
    for row in range(3):
        alone = weights[0].clone().requires_grad_()
        loss(alone, x[row], h[row], c[row]).backward()
        torch.testing.assert_close(per_sample[row], alone.grad)


def test_vmap_over_weights() -> None:
    x, h, c, *weights = make(dtype=torch.float64)
    stacked = torch.stack([weights[0], 2 * weights[0]])
    mapped = torch.func.vmap(lambda w: step(x, h, c, w, *weights[1:])[0])(stacked)
    torch.testing.assert_close(mapped[1], step(x, h, c, 2 * weights[0], *weights[1:])[0])


BAD_SHAPES = {
    "x": (torch.zeros(2, 5), r"c must have shape \[B, H\] = \(2, 4\), got \(3, 4\)"),
    "h": (torch.zeros(3, 3), r"h must have shape \[B, P\] = \(3, 4\), got \(3, 3\)"),
    "c": (torch.zeros(3, 5), r"c must have shape \[B, H\] = \(3, 4\), got \(3, 5\)"),
    "w_ih": (torch.zeros(16, 6), r"w_ih must have shape \[4H, I\] = \(16, 5\), got \(16, 6\)"),
    "w_hh": (torch.zeros(12, 4), r"w_hh must have shape \[4H, P\] = \(16, 4\), got \(12, 4\)"),
    "b_ih": (torch.zeros(4), r"b_ih must have shape \[4H\] = \(16,\), got \(4,\)"),
    "b_hh": (torch.zeros(16, 1), r"b_hh must have shape \[4H\] = \(16,\), got \(16, 1\)"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_shape(name: str, backend: str) -> None:
    tensors = dict(zip(NAMES, make(), strict=True))
    tensors[name], message = BAD_SHAPES[name]
    with sf.use_backend(backend), pytest.raises(ValueError, match=f"lstm_step: {message}"):
        step(*tensors.values())


@pytest.mark.parametrize("name", NAMES[1:])
def test_wrong_dtype(name: str) -> None:
    tensors = dict(zip(NAMES, make(), strict=True))
    tensors[name] = tensors[name].double()
    with pytest.raises(
        TypeError, match=rf"lstm_step: {name} must have the dtype of x \(torch.float32\), got torch.float64"
    ):
        step(*tensors.values())


@pytest.mark.parametrize("name", NAMES[1:])
def test_wrong_device(name: str) -> None:
    tensors = dict(zip(NAMES, make(), strict=True))
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=rf"lstm_step: {name} must be on the device of x \(cpu\), got meta"):
        step(*tensors.values())


def test_integer_input() -> None:
    _, *rest = make()
    with pytest.raises(TypeError, match="lstm_step: x must be float16, bfloat16, float32 or float64, got torch.int64"):
        step(torch.zeros(3, 5, dtype=torch.int64), *rest)


def test_something_that_is_no_tensor() -> None:
    tensors = make()
    with pytest.raises(TypeError, match="lstm_step: w_ih must be a tensor, got list"):
        sf.lstm_step(tensors[0], (tensors[1], tensors[2]), [1.0], tensors[4])  # type: ignore[arg-type]


def test_three_dimensional_input() -> None:
    tensors = make()
    with pytest.raises(ValueError, match=r"lstm_step: x must have shape \[B, I\] or \[I\], got \(3, 1, 5\)"):
        step(tensors[0][:, None], *tensors[1:])


def test_inplace_with_gradient_is_refused_and_writes_nothing() -> None:
    x, h, c, *weights = make()
    before = h.clone()
    with pytest.raises(ValueError, match="inplace=True has no gradient"):
        sf.lstm_step(x, (h, c), weights[0].requires_grad_(), *weights[1:], inplace=True)
    assert h.equal(before)


def test_inplace_needs_one_width() -> None:
    x, h, c, *weights = make(projected=2)
    with torch.no_grad(), pytest.raises(ValueError, match="inplace needs h and c of one width, got 2 and 4"):
        sf.lstm_step(x, (h, c), *weights, inplace=True)  # type: ignore[arg-type]


def test_weights_changed_before_the_backward_are_an_error() -> None:
    tensors = [t.requires_grad_() for t in make()]
    h, _ = step(*tensors)
    with torch.no_grad():
        tensors[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
