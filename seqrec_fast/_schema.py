"""The table of contents: the schema of every operator, once.

Each schema is defined in four namespaces. ``seqrec_fast::`` is public: it is what a compiled or exported graph holds, and it
chooses a backend when it runs. ``seqrec_fast_native::`` (C++), ``seqrec_fast_triton::`` and ``seqrec_fast_reference::`` hold the
implementations. An exported graph therefore runs on a machine that has no native code.

Shapes: B rows, T steps, I input width or number of items, H hidden units, P width of the (projected) hidden state, d width of a
query. ``precision`` is :class:`seqrec_fast._precision.Precision`.
"""

from __future__ import annotations

import torch

PUBLIC = "seqrec_fast"
BACKENDS = ("native", "triton", "reference")

# The options every catalogue operator takes; see LogitSpec in _logits.py.
_LOGITS = "float scale, Tensor? row_scale, Tensor? bias, Tensor? exclude, Tensor? exclude_crow"

_STEP_WEIGHTS = "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"

RECURRENT = {
    # x [B,I]  h [B,P]  c [B,H]  w_ih [4H,I]  w_hh [4H,P]  b [4H]  ->  h_next, c_next [B,H], gates [B,4H] ([0] unless saved)
    "lstm_step": f"(Tensor x, Tensor h, Tensor c, {_STEP_WEIGHTS}, bool save_gates, int precision)"
    " -> (Tensor h_next, Tensor c_next, Tensor gates)",
    "lstm_step_": f"(Tensor x, Tensor(a!) h, Tensor(b!) c, {_STEP_WEIGHTS}, int precision) -> ()",
    # output_mask and results: x, h, c, w_ih, w_hh, b (both biases have the same gradient); [0] where not asked for
    "lstm_step_backward": "(Tensor grad_h, Tensor grad_c, Tensor x, Tensor h, Tensor c, Tensor c_next, Tensor w_ih,"
    " Tensor w_hh, Tensor gates, bool[6] output_mask, int precision)"
    " -> (Tensor dx, Tensor dh, Tensor dc, Tensor dw_ih, Tensor dw_hh, Tensor db)",
}

CATALOGUE = {
    # query [B,d]  items [I,d]  target [B] int64  ->  [B] int64
    "catalogue_rank": f"(Tensor query, Tensor items, Tensor target, {_LOGITS}, int ignore_index) -> Tensor",
}

SCHEMAS: dict[str, str] = {**RECURRENT, **CATALOGUE}

# Only the native library has these: which compiled CPU tier runs.
NATIVE_ONLY = {"highest_cpu_tier": "() -> int", "set_cpu_tier": "(int tier) -> ()"}


def _define() -> dict[str, torch.library.Library]:
    libraries = {}
    for namespace in (PUBLIC, *(f"{PUBLIC}_{backend}" for backend in BACKENDS)):
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        libraries[namespace] = library
    for name, schema in NATIVE_ONLY.items():
        libraries[f"{PUBLIC}_native"].define(name + schema)
    return libraries


LIBRARIES = _define()
