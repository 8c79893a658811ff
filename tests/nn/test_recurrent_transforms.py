"""Graphs and functional transforms of whole modules, cells included: compiled, exported, mapped, differentiated forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_pairs import loss as total
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import seqrec_fast as sf

T, B, I, H = 5, 3, 4, 6
MODULES = {
    "LSTM": (sf.LSTM, nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM_projected": (sf.LSTM, nn.LSTM, {"proj_size": 3}),
    "GRU": (sf.GRU, nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "LSTMCell": (sf.LSTMCell, nn.LSTMCell, {}),
    "GRUCell": (sf.GRUCell, nn.GRUCell, {}),
}


def made(name: str) -> tuple[Any, Any, Tensor]:
    """Our module, torch's with the same weights, and a batch [B, I] or [T, B, I]; fp64."""
    ours, stock, options = MODULES[name]
    mine, theirs = ours(I, H, **options, dtype=torch.float64), stock(I, H, **options, dtype=torch.float64)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs, batch(mine)


def batch(module: Any, steps: int = T, rows: int = B) -> Tensor:
    lead = (steps,) if isinstance(module, nn.RNNBase) else ()
    return torch.randn(*lead, rows, I, dtype=torch.float64)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_forward_and_backward(name: str) -> None:
    module, _, _ = made(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, rows in ((T, B), (9, 4)):
        x = batch(module, steps, rows).requires_grad_()
        leaves = [x, *module.parameters()]
        found = [(r, torch.autograd.grad(total(r), leaves)) for r in (compiled(x), module(x))]
        torch.testing.assert_close(*found)


def test_compiled_by_inductor() -> None:
    """Among operations that it fuses."""
    module, _, x = made("GRU")

    def call(x: Tensor) -> Tensor:
        return total(module(x * 2))

    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(*(torch.autograd.grad(c(x), list(module.parameters())) for c in (compiled, call)))


@pytest.mark.parametrize("name", MODULES)
def test_exported_with_dynamic_sizes(name: str) -> None:
    """One graph for every B and T, as small for a long example as for a short one."""
    module, _, _ = made(name)
    sequence = isinstance(module, nn.RNNBase)
    names = ("steps", "rows") if sequence else ("rows",)
    shapes = ({place: torch.export.Dim(each, min=2) for place, each in enumerate(names)},)
    sizes = []
    for steps in (3, 40):
        program = torch.export.export(module, (batch(module, steps),), dynamic_shapes=shapes)
        sizes.append(len(program.graph.nodes))
        for other in (2, 17):
            x = batch(module, other, other)
            torch.testing.assert_close(program.module()(x), module(x))
    assert sizes[0] == sizes[1]


def stacked(results: list[Any]) -> Any:
    return tree_map(lambda *parts: torch.stack(parts), *results)


@pytest.mark.parametrize("name", MODULES)
def test_vmap_over_inputs_and_weights(name: str) -> None:
    members = [made(name)[0] for _ in range(3)]
    weights, buffers = stack_module_state(members)
    template = members[0]

    def call(weights: Any, x: Tensor) -> Any:
        return functional_call(template, (weights, buffers), (x,))

    x = torch.stack([batch(template) for _ in members])
    for dims, inputs in ((None, [x[0]] * 3), (0, x)):
        mapped = vmap(call, in_dims=(0, dims))(weights, x[0] if dims is None else x)
        expected = [member(value) for member, value in zip(members, inputs, strict=True)]
        torch.testing.assert_close(mapped, stacked(expected))
    torch.testing.assert_close(vmap(template)(x), stacked([template(value) for value in x]))


@pytest.mark.parametrize("name", MODULES)
def test_per_sample_gradients(name: str) -> None:
    module, theirs, x = made(name)
    weights = {key: value.detach() for key, value in module.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return total(functional_call(module, weights, (row,)))  # unbatched

    found = vmap(grad(loss), in_dims=(None, -2))(weights, x)
    for number in range(B):
        expected = torch.autograd.grad(total(theirs(x[..., number, :])), list(theirs.parameters()))
        torch.testing.assert_close([value[number] for value in found.values()], list(expected))


@pytest.mark.parametrize("name", MODULES)
def test_forward_mode(name: str) -> None:
    """Tangents of the input and of every weight, by functorch and by dual numbers, against torch's own modules."""
    module, theirs, x = made(name)
    primal = ({key: value.detach() for key, value in module.named_parameters()}, x)
    tangent = tree_map(torch.randn_like, primal)
    found = [
        jvp(lambda w, x, m=each: tree_leaves(functional_call(m, w, (x,))), primal, tangent) for each in (module, theirs)
    ]
    torch.testing.assert_close(*found)
    with forward_ad.dual_level():
        weights = {key: forward_ad.make_dual(value, tangent[0][key]) for key, value in primal[0].items()}
        results = functional_call(module, weights, (forward_ad.make_dual(x, tangent[1]),))
        tangents = [forward_ad.unpack_dual(part).tangent for part in tree_leaves(results)]
    torch.testing.assert_close(tangents, found[1][1])


@pytest.mark.parametrize("name", MODULES)
def test_hessian(name: str) -> None:
    """Forward mode over reverse mode."""
    module, theirs, x = made(name)
    torch.testing.assert_close(*(hessian(lambda x, m=each: total(m(x)))(x[..., :1, :]) for each in (module, theirs)))


@pytest.mark.parametrize("name", MODULES)
def test_weights_changed_before_the_backward_are_noticed(name: str) -> None:
    module, _, x = made(name)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            continue  # no gradient is made of a bias's value
        result = total(module(x.requires_grad_()))
        with torch.no_grad():
            parameter.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


@pytest.mark.parametrize("name", ["LSTM", "LSTM_projected", "GRU"])
def test_packed_sequences(name: str) -> None:
    """Transforms of the weights and of the data of a packed batch in no order, which torch's own modules refuse."""
    module, _, x = made(name)
    lengths = torch.tensor([2, T, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    weights = {key: value.detach() for key, value in module.named_parameters()}

    def call(weights: dict[str, Tensor], data: Tensor) -> Any:
        output, state = functional_call(module, weights, (PackedSequence(data, *packed[1:]),))
        return output.data, state

    def loss(weights: dict[str, Tensor], data: Tensor) -> Tensor:
        return total(call(weights, data))

    data = packed.data.detach().requires_grad_()
    expected = torch.autograd.grad(total(call(dict(module.named_parameters()), data)), [*module.parameters(), data])
    found = grad(loss, argnums=(0, 1))(weights, packed.data)
    torch.testing.assert_close(tree_leaves(found), list(expected))
    many = torch.stack([packed.data, packed.data * 2])
    for number, of_one in enumerate(zip(*tree_leaves(vmap(grad(loss), in_dims=(None, 0))(weights, many)), strict=True)):
        torch.testing.assert_close(list(of_one), tree_leaves(grad(loss)(weights, many[number])))
    tangent = torch.randn_like(packed.data)
    slope = jvp(lambda data: loss(weights, data), (packed.data,), (tangent,))[1]
    torch.testing.assert_close(slope, (expected[-1] * tangent).sum())
    with forward_ad.dual_level():
        dual = loss(weights, forward_ad.make_dual(packed.data, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
