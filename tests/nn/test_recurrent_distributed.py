"""Our modules in ``DistributedDataParallel``: two processes with halves of a batch train as one process with all of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import seqrec_fast as sf

WORLD, B, T, I, H = 2, 4, 5, 3, 6
STEPS = 3


class Model(nn.Module):
    """Every module of ours, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = sf.LSTM(I, H, 2, batch_first=True, bidirectional=True)
        self.gru = sf.GRU(2 * H, H, batch_first=True)
        self.lstm_cell = sf.LSTMCell(H, H)
        self.gru_cell = sf.GRUCell(H, H)
        self.gru_cell.weight_hh = self.gru_cell.weight_ih  # tied

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.lstm(x, lengths=lengths)
        last, _ = self.gru(output, lengths=lengths, last_only=True)
        result: Tensor = self.gru_cell(self.lstm_cell(last)[0])
        return result


def train(model: nn.Module, rows: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        x, lengths = torch.randn(B, T, I, generator=generator), torch.randint(0, T + 1, (B,), generator=generator)
        optimizer.zero_grad()
        model(x[rows], lengths[rows]).square().mean().backward()
        optimizer.step()


def take_part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=2))
    try:
        torch.manual_seed(rank)  # DDP sends the first process's parameters to the others
        model = Model()
        if rank == 0:
            torch.save(model.state_dict(), f"{folder}/start")
        parallel = nn.parallel.DistributedDataParallel(model)
        share = B // WORLD
        train(parallel, slice(rank * share, (rank + 1) * share))
        torch.save(model.state_dict(), f"{folder}/end{rank}")
    finally:
        torch.distributed.destroy_process_group()


def second_process(_: int, folder: str) -> None:
    take_part(1, folder)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    other = torch.multiprocessing.spawn(second_process, (str(tmp_path),), nprocs=1, join=False)
    take_part(0, str(tmp_path))
    while not other.join():
        pass
    ends = [torch.load(tmp_path / f"end{rank}") for rank in range(WORLD)]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    alone = Model()
    alone.load_state_dict(torch.load(tmp_path / "start"))
    train(alone, slice(None))
    torch.testing.assert_close(ends[0], alone.state_dict())
