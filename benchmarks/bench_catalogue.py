"""Every catalogue operator beside its peers: ``python -m benchmarks.bench_catalogue [--operators … --only … --out FILE]``.

The cases, the peers and the bounds are told in bench_catalogue_softmax (cross-entropy and attention), bench_catalogue_topk and
bench_catalogue_rank, which can be run alone.
"""

from __future__ import annotations

from . import bench_catalogue_rank, bench_catalogue_softmax, bench_catalogue_topk
from ._catalogue import report

if __name__ == "__main__":
    report(
        {
            "catalogue_softmax": bench_catalogue_softmax.CASES,
            "catalogue_topk": bench_catalogue_topk.CASES,
            "catalogue_rank": bench_catalogue_rank.CASES,
        }
    )
