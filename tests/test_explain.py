"""explain(), info() and clear_cache() tell and do what they say."""

from __future__ import annotations

import json

import pytest
import torch

import seqrec_fast as sf
from seqrec_fast import _dispatch, _native
from seqrec_fast.info import info


@pytest.mark.parametrize("operator", ["lstm_step", "gru_step"])
def test_explain_names_the_backend_and_the_reasons(operator: str) -> None:
    told = sf.explain(operator, torch.randn(2, 3))
    assert told.backend == ("native" if _native.MISSING is None else "reference")
    assert told.reasons["reference"] is None
    assert told.reasons["triton"] is not None
    assert f"{operator} on cpu, float32: runs on" in str(told)
    assert told.reasons["triton"] in str(told)


def test_explain_follows_use_backend() -> None:
    with sf.use_backend("reference"):
        told = sf.explain("lstm_step", torch.randn(2, 3))
        assert told.backend == "reference"
        assert "use_backend('reference') is in force" in str(told)
    with sf.use_backend("triton"):
        assert sf.explain("lstm_step", torch.randn(2, 3)).backend is None


def test_explain_of_lstm_embedding_is_that_of_its_layer() -> None:
    told = sf.explain("lstm_embedding", torch.zeros(1, 2, dtype=torch.int64), torch.randn(5, 3), sf.GRU(3, 4))
    assert told.operator == "gru"
    assert told.backend is not None


def test_explain_refuses() -> None:
    with pytest.raises(ValueError, match="unknown operator 'lstm_stepp'; known are .*lstm_step$") as refused:
        sf.explain("lstm_stepp", torch.randn(1))
    known = str(refused.value).split("known are ")[1].split(", ")
    assert all(name in sf.__all__ for name in known)
    with pytest.raises(ValueError, match="no floating tensor"):
        sf.explain("lstm_step", torch.zeros(1, dtype=torch.int64))


def test_info_is_plain_data_and_covers_every_operator() -> None:
    facts = info()
    json.dumps(facts)
    recurrent = {"lstm", "gru", "lstm_step", "gru_step"}
    catalogue = {f"catalogue_{name}" for name in ("attention", "cross_entropy", "topk", "rank")}
    assert set(facts["operators"]) == recurrent | catalogue
    for devices in facts["operators"].values():
        assert devices["cpu"]["reference"] is None
    assert facts["cpu_tier"] == _native.CPU_TIER


def test_clear_cache_forgets_choices() -> None:
    sf.explain("lstm_step", torch.randn(2, 3))
    assert _dispatch._choose.cache_info().currsize
    sf.clear_cache()
    assert _dispatch._choose.cache_info().currsize == 0
