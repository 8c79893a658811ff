"""Tensors of another kind than a strided one: meta tensors give shapes, everything else is refused in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import seqrec_fast as sf

B, D, N, H = 3, 4, 9, 5

Tensors = dict[str, Any]


def tensors() -> Tensors:
    """One of everything, by name."""
    shapes = {"query": (B, D), "items": (N, D), "x": (B, D), "h": (B, H), "c": (B, H), "sequence": (B, 6, D)}
    weights = {
        f"{op}_{name}": (gates * H, *shape)
        for op, gates in (("lstm", 4), ("gru", 3))
        for name, shape in (("w_ih", (D,)), ("w_hh", (H,)), ("b", ()))
    }
    made = {name: torch.zeros(shape) for name, shape in (shapes | weights).items()}
    ids = {"target": torch.arange(B), "ids": torch.zeros(B, 2, dtype=torch.int64)}
    return {**made, **ids}


def lstm_weights(t: Tensors) -> list[Any]:
    return [t[f"lstm_{name}"] for name in ("w_ih", "w_hh", "b", "b")]


def gru_weights(t: Tensors) -> list[Any]:
    return [t[f"gru_{name}"] for name in ("w_ih", "w_hh", "b", "b")]


CALLS: dict[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "catalogue_rank": (lambda t: sf.catalogue_rank(t["query"], t["items"], t["target"]), ("query", "items", "target")),
    "catalogue_topk": (lambda t: sf.catalogue_topk(t["query"], t["items"], 2).values, ("query", "items")),
    "catalogue_attention": (lambda t: sf.catalogue_attention(t["query"], t["items"]), ("query", "items")),
    "catalogue_cross_entropy": (
        lambda t: sf.catalogue_cross_entropy(t["query"], t["items"], t["target"], exclude=t["ids"]),
        ("query", "items", "target"),
    ),
    "sampled": (
        lambda t: sf.catalogue_cross_entropy(t["query"], t["items"], t["target"], negatives=t["ids"]),
        ("query", "items"),
    ),
    "lstm_step": (
        lambda t: sf.lstm_step(t["x"], (t["h"], t["c"]), *lstm_weights(t))[0],
        ("x", "h", "c", "lstm_w_ih", "lstm_w_hh"),
    ),
    "gru_step": (lambda t: sf.gru_step(t["x"], t["h"], *gru_weights(t)), ("x", "h", "gru_w_ih", "gru_w_hh")),
    "lstm": (
        lambda t: sf.lstm(t["sequence"], None, lstm_weights(t), batch_first=True)[0],
        ("sequence", "lstm_w_ih", "lstm_w_hh"),
    ),
    "gru": (
        lambda t: sf.gru(t["sequence"], None, gru_weights(t), batch_first=True)[0],
        ("sequence", "gru_w_ih", "gru_w_hh"),
    ),
}
SHAPES = {"catalogue_rank": (B,), "catalogue_topk": (B, 2), "catalogue_attention": (B, D), "lstm_step": (B, H)}
SHAPES |= {"catalogue_cross_entropy": (), "sampled": (), "gru_step": (B, H), "lstm": (B, 6, H), "gru": (B, 6, H)}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_give_shapes(name: str, gradient: bool) -> None:
    call, _ = CALLS[name]
    given = {n: v.to("meta") for n, v in tensors().items()}
    leaves = [v.requires_grad_() for v in given.values() if gradient and v.is_floating_point()]
    result = call(given)
    assert result.device.type == "meta"
    assert result.shape == SHAPES[name]
    if gradient and name != "catalogue_rank":
        gradients = torch.autograd.grad(result.sum(), leaves, allow_unused=True)
        shapes = [(g.shape, g.device.type) for g in gradients if g is not None]
        assert shapes == [(v.shape, "meta") for v, g in zip(leaves, gradients, strict=True) if g is not None]
        assert shapes


@pytest.mark.parametrize("ours", [sf.LSTM, sf.GRU])
def test_modules_on_meta(ours: Any) -> None:
    with torch.device("meta"):
        module = ours(D, H, 2, batch_first=True, bidirectional=True)
        output, _ = module(torch.empty(B, 6, D), lengths=torch.empty(B, dtype=torch.int64))
        assert (output.shape, output.device.type) == ((B, 6, 2 * H), "meta")
        output.sum().backward()
        assert all(p.grad.shape == p.shape for p in module.parameters())
        forward = ours(D, H, batch_first=True).eval().requires_grad_(False)
        assert forward.step(torch.empty(B, D))[0].shape == (B, H)
        ids = torch.empty(B, 6, dtype=torch.int64)
        assert sf.lstm_embedding(ids, torch.empty(N, D), forward)[0].shape == (B, 6, H)


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([tensor, tensor])


# What becomes of a tensor, and how its message ends.
KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda t: t.to_sparse(), "(a dense tensor, got layout|layout torch.sparse_csr, got) torch.sparse_coo"),
    "nested": (nested, "a dense tensor, got a nested tensor"),
    "mkldnn": (lambda t: t.to_mkldnn(), "a dense tensor, got layout torch._mkldnn"),
    "None": (lambda t: None, "a tensor.*, got NoneType"),
    "list": (lambda t: t.tolist(), "a tensor.*, got list"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_other_kinds_are_refused(name: str, kind: str) -> None:
    call, arguments = CALLS[name]
    change, ending = KINDS[kind]
    for argument in arguments:
        if kind == "mkldnn" and argument == "target":
            continue  # there are none of integers
        given = tensors()
        given[argument] = change(given[argument])
        with pytest.raises(
            TypeError, match=rf"^{'catalogue_cross_entropy' if name == 'sampled' else name}: .* {ending}$"
        ):
            call(given)


@pytest.mark.parametrize("option", ["bias", "scale"])
def test_sparse_options_are_refused(option: str) -> None:
    value = {"bias": torch.zeros(N), "scale": torch.zeros(B)}[option]
    with pytest.raises(
        TypeError, match=f"catalogue_topk: {option} must be a dense tensor, got layout torch.sparse_coo"
    ):
        sf.catalogue_topk(torch.zeros(B, D), torch.zeros(N, D), 2, **{option: value.to_sparse()})


@pytest.mark.parametrize("ours", [sf.LSTM, sf.GRU])
def test_a_module_refuses_sparse_input(ours: Any) -> None:
    with pytest.raises(TypeError, match=f"{ours.__name__}: input must be a dense tensor, got layout torch.sparse_coo"):
        ours(D, H)(torch.zeros(6, B, D).to_sparse())


# Options of the catalogue operators.

CATALOGUE: dict[str, Callable[..., Any]] = {
    "catalogue_attention": lambda given: sf.catalogue_attention(
        given["query"], given["items"], **{n: given[n] for n in ("bias", "exclude", "scale") if n in given}
    ),
    "catalogue_topk": lambda given: sf.catalogue_topk(
        given["query"],
        given["items"],
        given.get("k", 2),
        **{n: given[n] for n in ("bias", "exclude", "scale") if n in given},
    ),
    "catalogue_rank": lambda given: (
        sf.catalogue_rank(
            given["query"],
            given["items"],
            torch.tensor([0, 1]),
            **{n: v for n, v in given.items() if n not in MATRICES},
        )
        if "target" not in given
        else sf.catalogue_rank(**given)
    ),
    "catalogue_cross_entropy": lambda given: sf.catalogue_cross_entropy(**{"target": torch.tensor([0, 1]), **given}),
}
MATRICES = ("query", "items")


def matrices() -> dict[str, Any]:
    return {"query": torch.randn(2, 4), "items": torch.randn(5, 4)}


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csc])
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_sparse_exclusion_has_one_layout(name: str, layout: torch.layout) -> None:
    exclude = torch.eye(2, 5).to_sparse(layout=layout)
    message = f"^{name}: exclude as a sparse matrix must have layout torch.sparse_csr, got {layout}$"
    with pytest.raises(TypeError, match=message):
        CATALOGUE[name](matrices() | {"exclude": exclude})
    if name == "catalogue_cross_entropy":
        with pytest.raises(TypeError, match=message.replace("exclude", "target")):
            CATALOGUE[name](matrices() | {"target": exclude})


@pytest.mark.parametrize("name", CATALOGUE)
def test_numbers_of_any_kind(name: str) -> None:
    given = matrices()
    change = {"scale": np.float32(2)}
    plain: dict[str, Any] = {"scale": 2.0}
    if name == "catalogue_topk":
        change |= {"k": np.int64(2)}
        plain |= {"k": 2}
    if name in ("catalogue_rank", "catalogue_cross_entropy"):
        change |= {"ignore_index": np.int32(1)}
        plain |= {"ignore_index": 1}
    if name == "catalogue_cross_entropy":
        change |= {"label_smoothing": np.float32(0.5)}
        plain |= {"label_smoothing": 0.5}
    torch.testing.assert_close(CATALOGUE[name](given | change), CATALOGUE[name](given | plain), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("catalogue_rank", {"ignore_index": 2**63}, ValueError, "ignore_index must fit in 64 bits, got an int of 64 bits"),
        ("catalogue_cross_entropy", {"ignore_index": -(10**400)}, ValueError, "ignore_index must fit in 64 bits, got an int of 1329 bits"),
        ("catalogue_topk", {"k": 2**63}, ValueError, "k must fit in 64 bits, got an int of 64 bits"),
        ("catalogue_attention", {"scale": 10**400}, ValueError, "scale must be within the range of a float, got a larger number"),
        ("catalogue_attention", {"scale": np.ones(2)}, TypeError, "scale must be a float or a tensor, got ndarray"),
        ("catalogue_attention", {"scale": np.bool_(True)}, TypeError, "scale must be a float or a tensor, got bool_?"),
        ("catalogue_topk", {"k": True}, TypeError, "k must be an int, got bool"),
        ("catalogue_topk", {"k": np.bool_(True)}, TypeError, "k must be an int, got bool_?"),
        ("catalogue_topk", {"k": np.float32(2)}, TypeError, "k must be an int, got float32"),
        ("catalogue_topk", {"k": torch.tensor(2)}, TypeError, "k must be an int, got Tensor"),
        ("catalogue_topk", {"k": np.array([1, 2])}, TypeError, "k must be an int, got ndarray"),
    ],
)  # fmt: skip
def test_other_numbers_are_refused(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{name}: {message}$"):
        CATALOGUE[name](matrices() | change)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """As sharded training leaves a parameter between two uses."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("option", ["query", "items", "target", "bias", "exclude", "scale", "csr"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_freed_memory_is_not_read(name: str, option: str, autocast: bool) -> None:
    options = {
        "target": torch.tensor([0, 1]),
        "bias": torch.zeros(5),
        "exclude": torch.tensor([[2], [3]]),
        "scale": torch.ones(2),
    }
    if option == "target" and name not in ("catalogue_rank", "catalogue_cross_entropy"):
        pytest.skip("has no target")
    if option == "csr":
        matrix = torch.eye(2, 5).to_sparse_csr()
        matrix.col_indices().untyped_storage().resize_(0)
        change = {"exclude": matrix}
    else:
        change = {option: freed((matrices() | options)[option])}
    argument = {"csr": "exclude", "items": "keys" if name == "catalogue_attention" else "items"}.get(option, option)
    message = f"^{name}: {argument} has no memory: its storage was freed$"
    with torch.autocast("cpu", enabled=autocast), pytest.raises(RuntimeError, match=message):
        CATALOGUE[name](matrices() | change)


def test_the_look_at_memory_breaks_no_graph() -> None:
    call = torch.compile(lambda **given: sf.catalogue_topk(k=2, **given).values, backend="eager", fullgraph=True)
    given = matrices() | {"bias": torch.zeros(5)}
    torch.testing.assert_close(call(**given), sf.catalogue_topk(k=2, **given).values)
    with FakeTensorMode():
        fake = sf.catalogue_topk(torch.empty(2, 4), torch.empty(5, 4), 2)
    assert fake.values.shape == (2, 2)


@pytest.mark.parametrize("which", range(7))
def test_a_step_refuses_tensors_whose_storage_was_freed(which: int) -> None:
    args = [torch.randn(shape) for shape in ((3, 4), (3, 5), (3, 5), (20, 4), (20, 5), (20,), (20,))]
    args[which] = freed(args[which])
    name = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")[which]
    with pytest.raises(RuntimeError, match=f"^lstm_step: {name} has no memory"):
        sf.lstm_step(args[0], (args[1], args[2]), *args[3:])


@pytest.mark.parametrize("which", range(5))
def test_a_sequence_refuses_tensors_whose_storage_was_freed(which: int) -> None:
    args = [torch.randn(shape) for shape in ((6, 3, 4), (20, 4), (20, 5), (20,), (20,))]
    args[which] = freed(args[which])
    with pytest.raises(RuntimeError, match="no memory|not allocated"):
        sf.lstm(args[0], None, args[1:])


def test_fake_tensors_outside_their_mode() -> None:
    fake = FakeTensorMode().from_tensor
    weights = [fake(torch.randn(shape)) for shape in ((20, 4), (20, 5), (20,), (20,))]
    h, c = sf.lstm_step(fake(torch.randn(3, 4)), (fake(torch.randn(3, 5)), fake(torch.randn(3, 5))), *weights)
    assert h.shape == c.shape == (3, 5)
    rank = sf.catalogue_rank(fake(torch.randn(2, 8)), fake(torch.randn(10, 8)), fake(torch.tensor([1, 2])))
    assert rank.shape == (2,)
