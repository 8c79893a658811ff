"""Weights that are not plain contiguous parameters of their own: values and gradients are torch's formula's, and nobody is warned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recurrent_pairs import loss
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqrec_fast as sf

T, B, H = 6, 3, 5
CLASSES = {"LSTM": (sf.LSTM, nn.LSTM), "GRU": (sf.GRU, nn.GRU)}
CLASSES |= {"LSTMCell": (sf.LSTMCell, nn.LSTMCell), "GRUCell": (sf.GRUCell, nn.GRUCell)}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def names(module: nn.Module) -> list[str]:
    """One weight of the input and one of the state, of the last layer."""
    return ["weight_ih_l1", "weight_hh_l1"] if isinstance(module, nn.RNNBase) else ["weight_ih", "weight_hh"]


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


# What is done to our module. Every one leaves the values that `getattr` finds as the weights to compute with.


def tie(module: Any) -> None:
    first, second = names(module)
    setattr(module, second, getattr(module, first))


def tie_biases(module: Any) -> None:
    for name in list(module._parameters):
        if name.startswith("bias_hh"):
            setattr(module, name, getattr(module, name.replace("hh", "ih")))


def expand(module: Any) -> None:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach()[:1].expand(parameter.shape)))


def transpose(module: Any) -> None:
    for name in names(module):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().t().contiguous().t()))


def interleave(module: Any) -> None:
    for name, parameter in list(module.named_parameters()):
        wide = torch.stack([parameter.detach(), torch.full_like(parameter, torch.nan)], dim=-1)
        setattr(module, name, nn.Parameter(wide[..., 0]))


def share_storage(module: Any) -> None:
    """All parameters are views of one flat tensor, at odd offsets."""
    flat = torch.cat([torch.zeros(1), *(parameter.detach().flatten() for parameter in module.parameters())])
    start = 1
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(flat[start : start + parameter.numel()].view(parameter.shape)))
        start += parameter.numel()


def spectral_norm(module: Any) -> None:
    for name in names(module):
        parametrizations.spectral_norm(module, name)
    module.eval()  # otherwise each look at a weight is another step of its power iteration


def weight_norm(module: Any) -> None:
    for name in names(module):
        parametrizations.weight_norm(module, name)


def parametrize_twice(module: Any) -> None:
    for name in names(module):
        parametrize.register_parametrization(module, name, Halved())
        parametrize.register_parametrization(module, name, Halved())


def parametrize_bias(module: Any) -> None:
    parametrize.register_parametrization(module, names(module)[0].replace("weight", "bias"), Halved())


def old_weight_norm(module: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it announces its own end
        nn.utils.weight_norm(module, names(module)[1])


def old_spectral_norm(module: Any) -> None:
    nn.utils.spectral_norm(module.eval(), names(module)[1])


def pruned(module: Any) -> None:
    prune.random_unstructured(module, names(module)[1], amount=0.4)


def frozen(module: Any) -> None:
    for parameter in list(module.parameters())[::2]:
        parameter.requires_grad_(False)


CHANGES: list[Callable[[Any], None]] = [tie, tie_biases, expand, transpose, interleave, share_storage, spectral_norm]
CHANGES += [weight_norm, parametrize_twice, parametrize_bias, old_weight_norm, old_spectral_norm, pruned, frozen]


@pytest.mark.parametrize("change", CHANGES)
def made(
    name: str, change: Callable[[Any], None], dtype: torch.dtype = torch.float32
) -> tuple[Any, Callable[[], Any], Tensor]:
    """Our module, changed; torch's results for the weights as they are when it is asked; an input."""
    ours, stock = CLASSES[name]
    layers = (2,) if issubclass(ours, nn.RNNBase) else ()
    module, theirs = ours(H, H, *layers, dtype=dtype), stock(H, H, *layers, dtype=dtype)
    x = torch.randn(*((T, B, H) if layers else (B, H)), dtype=dtype)
    keys = list(module.state_dict())
    change(module)

    def expected() -> Any:
        return torch.func.functional_call(theirs, {key: getattr(module, key) for key in keys}, (x,))

    return module, expected, x


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CLASSES)
def test_values_and_gradients(name: str, change: Callable[[Any], None]) -> None:
    module, torchs, x = made(name, change, torch.float64)  # a spectral norm's gradient is inexact in fp32
    results = module(x)  # first, since hooks of the old style set their weights here
    expected = torchs()
    torch.testing.assert_close(results, expected)
    leaves = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # The old hooks' weights are one graph for both.
    found = [torch.autograd.grad(loss(each), leaves, retain_graph=True) for each in (results, expected)]
    torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    "change", [c for c in CHANGES if c is not expand]
)  # no optimizer can write to expanded weights
@pytest.mark.parametrize("name", CLASSES)
def test_a_training_step_is_followed(name: str, change: Callable[[Any], None]) -> None:
    """Nothing of the former weights is kept, not even by calls that need no gradient."""
    module, torchs, x = made(name, change)
    with torch.no_grad():
        before = loss(module(x))
    loss(module(x)).backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    with torch.no_grad():
        after = module(x)
        torch.testing.assert_close(after, torchs())
    assert abs(loss(after) - before) > 0.1


@pytest.mark.parametrize("change", [tie, spectral_norm, weight_norm, parametrize_twice, parametrize_bias])
@pytest.mark.parametrize("name", CLASSES)
def test_copies_after_a_conversion(name: str, change: Callable[[Any], None]) -> None:
    """torch's own layers keep a computed weight with its graph then, which cannot be copied."""
    module, torchs, x = made(name, change)
    module.double()
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(x.double()), module(x.double()), rtol=0, atol=0)
    module.float()
    torch.testing.assert_close(twin.float()(x), torchs())
