"""``sf.LSTM`` and ``sf.GRU``: drop-in for torch.nn, and what torch lacks."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from recurrent_pairs import OURS, PAIRS
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import seqrec_fast as sf

T, B, I, H = 7, 3, 4, 5
LENGTHS = torch.tensor([2, 7, 5])


def states(module: Any, rows: int | None = B) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    lead = (count,) if rows is None else (count, rows)
    h = torch.randn(*lead, module.proj_size or module.hidden_size)
    return (h, torch.randn(*lead, module.hidden_size)) if module.mode == "LSTM" else h


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, PackedSequence):
        assert isinstance(actual, PackedSequence)
        torch.testing.assert_close(tuple(actual), tuple(expected))
    elif isinstance(expected, tuple):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "batch_first": True}, {"num_layers": 2, "bidirectional": True}]
)
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_every_form_of_input_gives_what_torch_gives(ours: Any, stock: Any, options: dict[str, Any]) -> None:
    theirs = stock(I, H, **options)
    mine = ours(I, H, **options)
    assert mine.load_state_dict(theirs.state_dict(), strict=True).missing_keys == []
    theirs.load_state_dict(mine.state_dict(), strict=True)
    batch_first = options.get("batch_first", False)
    x = torch.randn(B, T, I)
    batch = x if batch_first else x.transpose(0, 1)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    in_order = pack_sequence([x[1], x[2, :4], x[0, :4]])
    for value, rows in ((batch, B), (x[0], None), (packed, B), (in_order, B)):
        assert_same(mine(value), theirs(value))
        hx = states(mine, rows)
        assert_same(mine(value, hx), theirs(value, hx))


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_parameters_start_as_torchs(ours: Any, stock: Any) -> None:
    torch.manual_seed(1)
    mine = ours(I, H, 2, bidirectional=True)
    torch.manual_seed(1)
    theirs = stock(I, H, 2, bidirectional=True)
    assert_same(tuple(mine.state_dict().values()), tuple(theirs.state_dict().values()))
    assert list(mine.state_dict()) == list(theirs.state_dict())


def test_projection() -> None:
    theirs = nn.LSTM(I, H, 2, proj_size=3, bidirectional=True)
    mine = sf.LSTM.from_torch(theirs)
    x = torch.randn(T, B, I)
    hx = states(mine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that oneDNN has no projections
        assert_same(mine(x, hx), theirs(x, hx))
    with pytest.raises(TypeError, match="proj_size"):
        sf.GRU(I, H, proj_size=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_from_torch_shares_parameters_and_mode(ours: Any, stock: Any) -> None:
    theirs = stock(I, H, 2, batch_first=True, dropout=0.1, bias=False).eval()
    mine = ours.from_torch(theirs, zoneout=0.2)
    assert dict(mine.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert all(a is b for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert (mine.training, mine.batch_first, mine.dropout, mine.bias, mine.zoneout) == (False, True, 0.1, False, 0.2)
    with pytest.raises(TypeError, match="module must be a torch.nn"):
        ours.from_torch(nn.RNN(I, H))
    with pytest.raises(ValueError, match="layer_norm has weights that a torch module does not have"):
        ours.from_torch(theirs, layer_norm=True)


@pytest.mark.parametrize("ours", OURS)
def test_is_an_rnn_base_but_not_what_dynamo_refuses(ours: Any) -> None:
    module = ours(I, H)
    assert isinstance(module, nn.RNNBase)
    assert not isinstance(module, (nn.LSTM, nn.GRU))
    assert module.flatten_parameters() is None


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_copies_and_pickles(ours: Any, layer_norm: bool) -> None:
    module = ours(I, H, 2, bidirectional=True, layer_norm=layer_norm)
    x = torch.randn(T, B, I)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert_same(twin(x), module(x))
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert not torch.equal(twin(x)[0], module(x)[0])
    half = copy.deepcopy(module).double()
    assert half(x.double())[0].dtype == torch.float64
    assert all(w.dtype == torch.float64 for w in half.all_weights[-1])


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_replaced_tied_and_reparametrised_weights(ours: Any, stock: Any) -> None:
    module = ours(H, H, 2)
    x = torch.randn(T, B, H)
    module.weight_hh_l1 = module.weight_ih_l1  # tied
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().t().contiguous().t()[:, :])  # strided
    flat = [w.detach().clone() for cell in module.all_weights for w in cell]
    theirs = stock(H, H, 2)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), flat, strict=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(module(x), theirs(x))
        parametrizations.weight_norm(module, "weight_hh_l0")
        assert_same(module(x), theirs(x))
        module(x)[0].sum().backward()
    assert module.parametrizations.weight_hh_l0.original0.grad is not None
    called = torch.func.functional_call(ours(H, H, 2), dict(theirs.named_parameters()), (x,))
    assert_same(called, theirs(x))


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_step_by_step_equals_the_whole(ours: Any, stock: Any) -> None:
    cases = [{"num_layers": 2}, {"batch_first": True, "layer_norm": True}, {"num_layers": 2, "zoneout": 0.3}]
    cases += [{"num_layers": 2, "proj_size": 3}] if ours is sf.LSTM else []
    for options in cases:
        module = ours(I, H, **options).eval()
        x = torch.randn(B, T, I)
        expected = module(x if module.batch_first else x.transpose(0, 1))
        output = expected[0] if module.batch_first else expected[0].transpose(0, 1)
        state = None
        for t in range(T):
            y, state = module.step(x[:, t], state)
            torch.testing.assert_close(y, output[:, t])
        assert_same(state, expected[1])
        state = None
        for t in range(2):
            y, state = module.step(x[1, t], state)
        torch.testing.assert_close(y, output[1, 1])


@pytest.mark.parametrize("ours", OURS)
def test_step_refuses(ours: Any) -> None:
    with pytest.raises(ValueError, match="bidirectional layer needs the whole sequence"):
        ours(I, H, bidirectional=True).step(torch.zeros(B, I))
    with pytest.raises(ValueError, match=r"x must have shape \[B, I\] or \[I\], got 3 dimensions"):
        ours(I, H).step(torch.zeros(T, B, I))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        ours(I, H).step(torch.zeros(B, I), states(ours(I, H, 2)))


@pytest.mark.parametrize("ours", OURS)
def test_lengths_reset_and_last_only_of_packed_and_padded_agree(ours: Any) -> None:
    module = ours(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    hx, reset = states(module), torch.rand(B, T) < 0.3
    padded, final = module(x, hx, lengths=LENGTHS, reset=reset)
    from_packed, packed_final = module(packed, hx, reset=reset)
    assert_same(packed_final, final)
    repacked = pack_padded_sequence(padded, LENGTHS, enforce_sorted=False)
    torch.testing.assert_close(from_packed.data, repacked.data)
    last, _ = module(packed, hx, reset=reset, last_only=True)
    h_n = final[0] if ours is sf.LSTM else final
    torch.testing.assert_close(last, torch.cat([h_n[2], h_n[3]], dim=-1))


@pytest.mark.parametrize("ours", OURS)
def test_layer_norm_parameters(ours: Any) -> None:
    plain, module = ours(I, H, 2), ours(I, H, 2, layer_norm=True)
    extra = set(module.state_dict()) - set(plain.state_dict())
    names = {"weight_ln_ih", "weight_ln_hh"} | ({"weight_ln_c", "bias_ln_c"} if ours is sf.LSTM else set())
    assert extra == {f"{name}_l{layer}" for name in names for layer in (0, 1)}
    for name, value in module.named_parameters():
        if "_ln_" in name:
            assert torch.equal(value, torch.full_like(value, 0.0 if name.startswith("bias") else 1.0))
    flat = [w for cell in module.all_weights for w in cell]
    function = sf.lstm if ours is sf.LSTM else sf.gru
    x = torch.randn(T, B, I)
    assert_same(function(x, None, flat, num_layers=2, layer_norm=True), module(x))
    module(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad():
        module.weight_ln_hh_l1.fill_(3.0)
    module.reset_parameters()
    assert torch.equal(module.weight_ln_hh_l1, torch.ones_like(module.weight_ln_hh_l1))


@pytest.mark.parametrize("ours", OURS)
def test_noise_is_for_training_and_repeats_with_the_seed(ours: Any) -> None:
    noise = {"dropout": 0.3, "zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.3}
    module = ours(I, H, 2, **noise)
    x = torch.randn(T, B, I)
    torch.manual_seed(0)
    first, second = module(x)[0], module(x)[0]
    torch.manual_seed(0)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    only_zoneout = ours(I, H, 2, zoneout=0.2).eval()
    only_zoneout.load_state_dict(module.state_dict())
    assert torch.equal(only_zoneout(x)[0], module(x)[0])


@pytest.mark.parametrize("ours", OURS)
def test_eager_equals_compiled_with_every_mask(ours: Any) -> None:
    module = ours(I, H, 2, dropout=0.3, zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.3, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(T, B, I)
    for lengths in (LENGTHS, LENGTHS.clamp(max=3)):
        results = []
        for function in (module, compiled):
            torch.manual_seed(4)
            output, _ = function(x, lengths=lengths)
            module.zero_grad()
            output.square().sum().backward()
            results.append((output, [parameter.grad.clone() for parameter in module.parameters()]))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("ours", OURS)
def test_a_checkpointed_layer_draws_the_same_masks(ours: Any) -> None:
    module = ours(I, H, 2, dropout=0.3, zoneout=0.2)
    x = torch.randn(T, B, I, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        if checkpointed:
            output, _ = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        else:
            output, _ = module(x)
        gradients.append(torch.autograd.grad(output.sin().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("ours", OURS)
def test_autocast_takes_its_dtype_and_keeps_it_in_the_backward(ours: Any) -> None:
    module = ours(I, H)
    x = torch.randn(T, B, I)
    low = copy.deepcopy(module).bfloat16()
    expected = low(x.bfloat16())[0]
    expected.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        for value in (x, x.bfloat16()):
            output, _ = module(value)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
        output.float().square().sum().backward()
    for ours_, low_ in zip(module.parameters(), low.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad.bfloat16(), low_.grad, rtol=0, atol=0)


@pytest.mark.parametrize("ours", OURS)
def test_long_sequences(ours: Any) -> None:
    """More steps than torch's CUDA path takes (65,535)."""
    module = ours(1, 1, batch_first=True)
    with torch.no_grad():
        x = torch.randn(1, 70_000, 1)
        output, _ = module(x)
        tail, _ = module(x[:, -50:])  # the beginning is long forgotten
    assert output.shape == (1, 70_000, 1)
    torch.testing.assert_close(output[:, -5:], tail[:, -5:], rtol=1e-4, atol=1e-4)


def test_repr_tells_the_options() -> None:
    text = repr(sf.LSTM(I, H, zoneout=0.1, layer_norm=True, save_gates=False))
    assert text == "LSTM(4, 5, zoneout=0.1, layer_norm=True, save_gates=False)"
    assert repr(sf.GRU(I, H, 2, bidirectional=True)) == "GRU(4, 5, num_layers=2, bidirectional=True)"


# torch.nn's own exceptions, from both. hx of another dtype or device is torch's RuntimeError too.

BAD: list[tuple[Any, type[Exception]]] = [
    ((torch.zeros(1, T, B, I),), ValueError),
    ((torch.zeros(T, B, I + 1),), RuntimeError),
    ((torch.zeros(T, B, I, dtype=torch.float64),), ValueError),
    ((torch.zeros(T, B, I, dtype=torch.int64),), ValueError),
    ((torch.zeros(T, B, I), torch.zeros(1, B + 1, H)), RuntimeError),
    ((torch.zeros(T, B, I), torch.zeros(1, B, H + 1)), RuntimeError),
    ((torch.zeros(T, B, I), torch.zeros(1, H)), RuntimeError),
    ((torch.zeros(T, I), torch.zeros(1, 1, H)), RuntimeError),
    ((torch.zeros(T, B, I), torch.zeros(1, B, H, dtype=torch.float64)), RuntimeError),
]


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
@pytest.mark.parametrize(("args", "error"), BAD)
def test_bad_input_raises_what_torch_raises(ours: Any, stock: Any, args: Any, error: type[Exception]) -> None:
    x, *hx = args
    if hx and ours is sf.LSTM:
        hx = [(hx[0], hx[0])]
    for module in (ours(I, H), stock(I, H)):
        with pytest.raises(error):
            module(x, *hx)
    with pytest.raises(error, match=ours.__name__):
        ours(I, H)(x, *hx)


@pytest.mark.parametrize("ours", OURS)
def test_bad_options(ours: Any) -> None:
    for name in ("zoneout", "recurrent_dropout", "weight_dropout"):
        with pytest.raises(ValueError, match=rf"{name} must be a probability in \[0, 1\], got 2"):
            ours(I, H, **{name: 2})
    with pytest.raises(ValueError, match='save_gates must be "auto", True or False'):
        ours(I, H, save_gates="never")
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        ours(I, 0)
    with pytest.raises(TypeError, match="input must be a tensor or a PackedSequence, got list"):
        ours(I, H)([1.0])
    with pytest.raises(TypeError, match="hx must"):
        ours(I, H)(torch.zeros(T, B, I), "state")


def test_nan_goes_through_and_stays_in_its_row() -> None:
    module = sf.LSTM(I, H)
    x = torch.randn(T, B, I)
    x[3, 1] = float("nan")
    output, _ = module(x)
    assert output[3:, 1].isnan().all()
    assert output[:3].isfinite().all()
    assert output[:, [0, 2]].isfinite().all()
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[1, 4] = True  # a new segment begins clean
    assert module(x, reset=reset)[0][4:, 1].isfinite().all()


def test_gradients_accumulate_as_a_parameter_trains() -> None:
    """Six steps of training end where torch's end."""
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H, batch_first=True, dtype=torch.float64)
    mine = copy.deepcopy(sf.LSTM.from_torch(theirs))
    x, target = torch.randn(B, T, I, dtype=torch.float64), torch.randn(B, T, H, dtype=torch.float64)
    for module in (theirs, mine):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            loss: Tensor = (module(x)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(list(mine.parameters()), list(theirs.parameters()))
