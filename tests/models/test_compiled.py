"""The models inside torch.compile(fullgraph=True) and torch.export with dynamic sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from seqrec_fast.models import Blend, LSTMAttentionNet, SequenceRecommender

NUM_ITEMS = 37

VARIANTS = {
    "lstm": {"num_layers": 2},
    "gru, projected": {"encoder": "gru", "hidden_dim": 24, "num_heads": 2, "layer_norm": True},
    "cnn, bilinear": {"encoder": "cnn", "num_layers": 2, "attention": "bilinear", "tie_weights": False},
    "additive": {"attention": "additive", "residual": True},
}


def build(variant: str) -> SequenceRecommender:
    torch.manual_seed(3)
    return SequenceRecommender(NUM_ITEMS, embedding_dim=16, dropout=0.0, **VARIANTS[variant])


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()


class Encode(nn.Module):
    def __init__(self, model: SequenceRecommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.model.encode(ids, lengths)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_with_dynamic_sizes(variant, batch, tmp_path):
    model = build(variant).eval()
    sizes = {"ids": {0: Dim("batch"), 1: Dim("steps")}, "lengths": {0: Dim("batch")}}
    program = torch.export.export(Encode(model), (batch.ids, batch.lengths), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    others = torch.randint(NUM_ITEMS, (9, 13))
    for ids, lengths in (
        (batch.ids, batch.lengths),
        (others, torch.arange(1, 10)),
        (others[:3, :5], torch.tensor([5, 0, 2])),
    ):
        torch.testing.assert_close(again(ids, lengths), model.encode(ids, lengths), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_loss_and_gradients(variant, batch):
    model = build(variant)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    model.loss(*batch).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = compiled(*batch)
    loss.backward()
    torch.testing.assert_close(loss, model.loss(*batch), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="Inductor needs a C++ compiler")
def test_inductor(batch):
    model = build("lstm").eval()
    encode = torch.compile(model.encode, fullgraph=True)
    torch.testing.assert_close(
        encode(batch.ids, batch.lengths), model.encode(batch.ids, batch.lengths), rtol=1e-5, atol=1e-6
    )


def test_lstm_attention_and_blend(batch):
    nets = [LSTMAttentionNet(5, 8, 3, 2), LSTMAttentionNet(5, 12, 3, 4)]
    blend = Blend(nets, "learned", normalise="log_softmax")
    x = torch.randn(4, 7, 5)
    compiled = torch.compile(blend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, batch.lengths), blend(x, batch.lengths), rtol=1e-5, atol=1e-6)
    sizes = {"x": {0: Dim("batch"), 1: Dim("steps")}, "lengths": {0: Dim("batch")}}
    program = torch.export.export(nets[0], (x, batch.lengths), dynamic_shapes=sizes).module()
    x, lengths = torch.randn(9, 11, 5), torch.arange(1, 10)
    torch.testing.assert_close(program(x, lengths), nets[0](x, lengths), rtol=1e-5, atol=1e-6)
