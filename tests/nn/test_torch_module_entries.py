"""What torch asks of its own recurrent modules, asked of ours: its ``ModuleInfo`` entries with our classes put in.

Not asked: in-place forms and several devices, which no recurrent module has.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from module_entries import INFOS, OURS, Sample, common_modules, gradients, numbers, samples
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_utils import gradcheck, gradgradcheck
from torch.utils._pytree import tree_map

CLASSES = [pytest.param(stock, id=stock.__name__) for stock in OURS]
MODES = [
    pytest.param(stock, training, id=f"{stock.__name__}-{'train' if training else 'eval'}")
    for stock in OURS
    for training in ((True, False) if INFOS[stock].train_and_eval_differ else (True,))
]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in INFOS[nn.LSTM].dtypes]

pytestmark = pytest.mark.filterwarnings("ignore:.*LSTM with projections:UserWarning")  # torch's own class, of oneDNN


def assert_same(actual: Any, expected: Any, **tolerances: float) -> None:
    torch.testing.assert_close(numbers(actual), numbers(expected), **tolerances)
    assert [part.dtype for part in numbers(actual)] == [part.dtype for part in numbers(expected)]


def with_weights_of(module: Any, other: Any) -> Any:
    keys = module.load_state_dict(other.state_dict(), strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    return module


def test_every_entry_is_here() -> None:
    assert INFOS.keys() == OURS.keys()
    assert {stock.__name__: len(list(samples(stock))) for stock in OURS} == {
        "LSTM": 32,
        "GRU": 32,
        "LSTMCell": 2,
        "GRUCell": 2,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stock", "training"), MODES)
def test_forward_and_gradients(stock: Any, training: bool, dtype: torch.dtype) -> None:
    """torch's values and gradients with torch's weights, exchanged both ways, and what the entry itself refers to."""
    for sample in samples(stock, dtype, training):
        theirs = sample.make_stock()
        mine = with_weights_of(sample.make(), theirs)
        with_weights_of(theirs, mine)
        results = [module(*sample.args) for module in (mine, theirs)]
        assert_same(*results)
        leaves = [*numbers(sample.args), *mine.parameters()]
        expected = gradients(results[1], [*numbers(sample.args), *theirs.parameters()])
        # Those that are to be differentiated again take another path, which second derivatives alone would not find wrong.
        for create_graph in (True, False):
            assert_same(gradients(results[0], leaves, retain_graph=True, create_graph=create_graph), expected)
        if sample.reference is not None and not isinstance(sample.args[0], PackedSequence):
            assert_same(results[0], sample.reference(mine, *copy.deepcopy(detached(sample.args))))


def detached(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


@pytest.mark.parametrize("stock", CLASSES)
def test_device_and_dtype_of_the_parameters(stock: Any) -> None:
    for sample in samples(stock):
        plain = sample.make(dtype=None)
        assert {(p.device.type, p.dtype) for p in plain.parameters()} == {("cpu", torch.get_default_dtype())}
        for device, dtype in (("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float16)):
            module = sample.make(device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
            assert [p.shape for p in module.parameters()] == [p.shape for p in plain.parameters()]


@pytest.mark.parametrize("stock", CLASSES)
def test_memory_made_later(stock: Any) -> None:
    """Modules without numbers yet: skipped initialisation, or made on meta and given memory or tensors afterwards."""
    for sample in samples(stock):
        module = sample.make()
        expected = module(*sample.args)
        keywords = {**sample.constructor.kwargs, "dtype": sample.dtype}
        skipped = nn.utils.skip_init(OURS[stock], *sample.constructor.args, **keywords, device="cpu")
        emptied, assigned = sample.make(device="meta"), sample.make(device="meta")
        identities = [id(parameter) for parameter in assigned.parameters()]
        emptied = emptied.to_empty(device="cpu")
        for late in (skipped, emptied):
            assert_same(with_weights_of(late, module)(*sample.args), expected)
        assigned.load_state_dict(module.state_dict(), strict=True, assign=True)
        assert identities != [id(parameter) for parameter in assigned.parameters()]
        assert_same(assigned(*sample.args), expected)


@pytest.mark.parametrize(("stock", "training"), MODES)
def test_copies(stock: Any, training: bool) -> None:
    for sample in samples(stock, training=training):
        module = sample.make()
        expected = module(*sample.args)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twins = (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(file, weights_only=False))
        for twin in twins:
            assert twin.training is training
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}
            assert_same(twin(*sample.args), expected, rtol=0, atol=0)


@pytest.mark.parametrize("stock", CLASSES)
def test_text(stock: Any) -> None:
    for sample in samples(stock):
        assert repr(sample.make()) == str(sample.make()) == repr(sample.make_stock())


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second of twice as many."""
    wide = torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], dim=-1)
    view = wide[..., 0].requires_grad_(tensor.requires_grad)
    assert tensor.numel() == 1 or not view.is_contiguous()
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stock", "training"), MODES)
def test_strided_inputs_weights_and_gradients(stock: Any, training: bool, dtype: torch.dtype) -> None:
    for sample in samples(stock, dtype, training):
        if isinstance(sample.args[0], PackedSequence):
            continue  # its data are contiguous by construction
        module = sample.make()
        expected = module(*sample.args)
        incoming = [torch.randn_like(part) for part in numbers(expected)]
        wanted = torch.autograd.grad(numbers(expected), [*numbers(sample.args), *module.parameters()], incoming)
        args = tree_map(lambda leaf: strided(leaf) if isinstance(leaf, Tensor) else leaf, sample.args)
        for weights_too in (False, True):
            if weights_too:
                for name, parameter in module.named_parameters():
                    setattr(module, name, nn.Parameter(strided(parameter)))
            results = numbers(module(*args))
            assert_same(results, expected)
            found = torch.autograd.grad(results, [*numbers(args), *module.parameters()], [strided(g) for g in incoming])
            assert_same(found, wanted)


def differentiable(sample: Sample) -> tuple[Any, tuple[Tensor, ...]]:
    """A function of the sample's tensors and parameters, and those; gradcheck nudges both in place."""
    module = sample.make()
    leaves = (*numbers(sample.args), *module.parameters())

    def call(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(numbers(module(*sample.args)))

    return call, leaves


def gradient_options(stock: Any) -> dict[str, Any]:
    return {"nondet_tol": INFOS[stock].gradcheck_nondet_tol, "fast_mode": INFOS[stock].gradcheck_fast_mode}


@pytest.mark.parametrize(("stock", "training"), MODES)
def test_first_derivatives(stock: Any, training: bool) -> None:
    for sample in samples(stock, training=training):
        assert gradcheck(*differentiable(sample), **gradient_options(stock))


@pytest.mark.parametrize(("stock", "training"), MODES)
def test_second_derivatives(stock: Any, training: bool) -> None:
    assert INFOS[stock].supports_gradgrad
    # One in five, others in each mode, since one takes up to a second. They meet each value of each option: those come in powers of 2.
    few = list(samples(stock, training=training))[0 if training else 2 :: 5]
    for sample in few:
        assert gradgradcheck(*differentiable(sample), **gradient_options(stock))


@contextlib.contextmanager
def conversions_swap(swap: bool) -> Iterator[None]:
    """Whether ``module.to`` exchanges whole parameters. Not on while a state is loaded, which torch's own layers then refuse."""
    former = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(former)


@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
@pytest.mark.parametrize("stock", CLASSES)
def test_conversions(stock: Any, swap: bool) -> None:
    """To another dtype and back, and to another layout of 4-D tensors, of which there are none."""
    for sample in samples(stock, torch.float32):
        args = detached(sample.args)
        module = sample.make()
        with torch.no_grad():  # as with torch's modules, a graph that holds the parameters forbids to swap them
            expected = module(*args)
        numbers(module(*args))[0].sum().backward()
        identities = [id(parameter) for parameter in module.parameters()]
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            other = copy.deepcopy(module)
            with conversions_swap(swap):
                other.to(dtype)
            theirs = with_weights_of(sample.make_stock(dtype=dtype), other)
            if not isinstance(args[0], PackedSequence):
                changed = tree_map(lambda leaf, d=dtype: leaf.to(d) if isinstance(leaf, Tensor) else leaf, args)
                # torch rounds to 16 bits at every operation, ours at every step.
                tolerance = 8 * torch.finfo(dtype).eps
                assert_same(other(*changed), theirs(*changed), rtol=tolerance, atol=tolerance)
        with conversions_swap(swap):
            module.double().to(memory_format=torch.channels_last).float()
        assert identities == [id(parameter) for parameter in module.parameters()]
        assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
        assert_same(module(*args), expected, rtol=0, atol=0)


ERRORS = [
    pytest.param(stock, error, id=f"{stock.__name__}-{number}")
    for stock, info in INFOS.items()
    for number, error in enumerate(
        info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    )
]


@pytest.mark.parametrize(("stock", "error"), ERRORS)
def test_errors(stock: Any, error: Any) -> None:
    """torch's types and, so that who reads or matches them is served alike, torch's words."""
    wrong = error.module_error_input
    make = lambda: OURS[stock](*wrong.constructor_input.args, **wrong.constructor_input.kwargs)  # noqa: E731
    if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            make()
        return
    module = make()
    with pytest.raises(error.error_type, match=error.error_regex):
        module(*wrong.forward_input.args, **wrong.forward_input.kwargs)
