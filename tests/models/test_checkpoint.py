"""Files: read back exactly, whole or absent, and one clear sentence for anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from seqrec_fast.models import Markov, SequenceRecommender, load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"encoder": "cnn", "attention": "additive", "tie_weights": False, "layer_norm": True, "item_bias": False}],
)
def test_read_back_exactly(options, dtype, tmp_path: Path):
    model = SequenceRecommender(30, embedding_dim=8, **options).to(dtype)
    model.save(tmp_path / "model.safetensors")
    again = SequenceRecommender.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in again.parameters())
    ids = torch.tensor([[1, 2, 3]])
    again.train().loss(ids).backward() if again.config.attention != "additive" else None
    before = model.eval().encode(ids)
    model.load_state_dict(again.state_dict())
    assert torch.equal(model.encode(ids), before)
    # The other model's not bit by bit: on some processors torch's products depend on where in memory their operands lie.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(again.eval().encode(ids), before, rtol=tolerance, atol=tolerance)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = SequenceRecommender(30, embedding_dim=8)
    model.save(path)
    before = path.read_bytes()

    def broken(tensors, part, metadata):
        Path(part).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("seqrec_fast.models._checkpoint.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        SequenceRecommender(31, embedding_dim=8).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_other_files(tmp_path: Path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="there is no model file .*file"):
        SequenceRecommender.load(path)
    path.write_text("user item\n1 2\n")
    with pytest.raises(ValueError, match="file is not a safetensors file"):
        SequenceRecommender.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="file was not written by seqrec_fast"):
        SequenceRecommender.load(path)
    Markov(3).fit([np.array([0, 1])]).save(path)
    with pytest.raises(ValueError, match="file holds a Markov, not a SequenceRecommender"):
        SequenceRecommender.load(path)
    assert isinstance(load(path), Markov)


def test_weights_that_do_not_fit(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    model = SequenceRecommender(30, embedding_dim=8)
    model.embedding = nn.Embedding(31, 8)
    model.save(path)
    with pytest.raises(ValueError, match=r"do not fit its own configuration.*embedding\.weight") as caught:
        SequenceRecommender.load(path)
    assert "\n" not in str(caught.value)
