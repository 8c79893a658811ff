"""A trained model's encode through torch.export, to a file and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqrec_fast.data import leave_one_out, synthetic, train_loader
from seqrec_fast.models import SequenceRecommender
from seqrec_fast.training import export_encoder, load_encoder, train_epoch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work on a busy machine is fastest so; the thread count is put back after every test."""
    torch.set_num_threads(1)


ITEMS = 40


def trained(encoder: str, **options: object) -> SequenceRecommender:
    torch.manual_seed(0)
    model = SequenceRecommender(ITEMS, embedding_dim=8, encoder=encoder, **options)  # type: ignore[arg-type]
    split = leave_one_out(synthetic(num_users=30, num_items=ITEMS, mean_length=8))
    train_epoch(model, train_loader(split, batch_size=10), torch.optim.Adam(model.parameters(), lr=0.05))
    return model


@pytest.mark.parametrize("encoder", ["lstm", "gru", "cnn"])
def test_the_program_encodes_any_batch_and_any_length(encoder: str, tmp_path: Path) -> None:
    model = trained(encoder, num_heads=2)
    export_encoder(model, tmp_path / "encoder.pt2")
    assert model.training  # put back
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt2"]
    encode = load_encoder(tmp_path / "encoder.pt2")
    model.eval()
    for batch, time in ((1, 1), (1, 7), (2, 3), (5, 1), (17, 23)):
        ids = torch.randint(ITEMS, (batch, time))
        lengths = torch.randint(1, time + 1, (batch,))
        with torch.no_grad():
            torch.testing.assert_close(encode(ids, lengths), model.encode(ids, lengths), rtol=1e-6, atol=1e-6)


def test_the_program_runs_without_the_models_code(tmp_path: Path) -> None:
    model = trained("lstm").eval()
    export_encoder(model, tmp_path / "encoder.pt2")
    ids, lengths = torch.randint(ITEMS, (3, 5)), torch.tensor([5, 2, 1])
    torch.save((ids, lengths, model.encode(ids, lengths).detach()), tmp_path / "case.pt")
    program = """
import sys, torch
from seqrec_fast.training import load_encoder
encode = load_encoder(sys.argv[1] + "/encoder.pt2")
ids, lengths, expected = torch.load(sys.argv[1] + "/case.pt", weights_only=True)
torch.testing.assert_close(encode(ids, lengths).detach(), expected)
assert not any(name.startswith("seqrec_fast.models") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)


def test_bad_paths(tmp_path: Path) -> None:
    model = SequenceRecommender(ITEMS, embedding_dim=8)
    with pytest.raises(ValueError, match="path must end in .pt2"):
        export_encoder(model, tmp_path / "encoder.bin")
    with pytest.raises(FileNotFoundError, match="no exported program"):
        load_encoder(tmp_path / "none.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="does not hold an exported program"):
        load_encoder(tmp_path / "broken.pt2")
