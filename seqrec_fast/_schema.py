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

_LSTM_TENSORS = (
    "Tensor x, Tensor h, Tensor c, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr,"
    " Tensor? ln_ih, Tensor? ln_hh, Tensor? ln_c, Tensor? ln_c_bias"
)
_GRU_TENSORS = "Tensor x, Tensor h, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? ln_ih, Tensor? ln_hh"
# One layer in one direction; what each means is told in backends/reference/_calls.py.
_SEQUENCE_OPTIONS = (
    "Tensor? ids, Tensor? lengths, Tensor? reset, Tensor? seed, bool batch_first, bool reverse, bool last_only, int save,"
    " float zoneout, float recurrent_dropout, int stream, int precision"
)

RECURRENT = {
    # x [B,I]  h [B,P]  c [B,H]  w_ih [4H,I]  w_hh [4H,P]  b [4H]  ->  h_next, c_next [B,H], gates [B,4H] ([0] unless saved)
    "lstm_step": f"(Tensor x, Tensor h, Tensor c, {_STEP_WEIGHTS}, bool save_gates, int precision)"
    " -> (Tensor h_next, Tensor c_next, Tensor gates)",
    "lstm_step_": f"(Tensor x, Tensor(a!) h, Tensor(b!) c, {_STEP_WEIGHTS}, int precision) -> ()",
    # output_mask and results: x, h, c, w_ih, w_hh, b (both biases have the same gradient); [0] where not asked for
    "lstm_step_backward": "(Tensor grad_h, Tensor grad_c, Tensor x, Tensor h, Tensor c, Tensor c_next, Tensor w_ih,"
    " Tensor w_hh, Tensor gates, bool[6] output_mask, int precision)"
    " -> (Tensor dx, Tensor dh, Tensor dc, Tensor dw_ih, Tensor dw_hh, Tensor db)",
    # x [B,I]  h [B,H]  w_ih [3H,I]  w_hh [3H,H]  b [3H]  ->  h_next [B,H], gates [B,4H]: r, z, n, W_hn·h + b_hn
    "gru_step": f"(Tensor x, Tensor h, {_STEP_WEIGHTS}, bool save_gates, int precision) -> (Tensor h_next, Tensor gates)",
    "gru_step_": f"(Tensor x, Tensor(a!) h, {_STEP_WEIGHTS}, int precision) -> ()",
    # output_mask and results: x, h, w_ih, w_hh, b_ih, b_hh; [0] where not asked for
    "gru_step_backward": "(Tensor grad_h, Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor gates, bool[6] output_mask,"
    " int precision) -> (Tensor dx, Tensor dh, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)",
    # x [T,B,I] or [B,T,I], or a table [N,I] with ids  ->  output as x, h_n [B,P], c_n [B,H], and for the backward the cell
    # states [T,B,H] (fp32 for 16-bit x) and gates [T,B,4H] at their place in the batch, padding unspecified; [0] if not saved
    "lstm": f"({_LSTM_TENSORS}, {_SEQUENCE_OPTIONS})"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates)",
    # output_mask and results: x, h, c, w_ih, w_hh, b (both biases), w_hr, ln_ih, ln_hh, ln_c, ln_c_bias; [0] where not asked for
    "lstm_backward": f"(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {_LSTM_TENSORS}, {_SEQUENCE_OPTIONS},"
    " Tensor output, Tensor cells, Tensor gates, bool[11] output_mask) -> (Tensor dx, Tensor dh, Tensor dc, Tensor dw_ih,"
    " Tensor dw_hh, Tensor db, Tensor dw_hr, Tensor dln_ih, Tensor dln_hh, Tensor dln_c, Tensor dln_c_bias)",
    # gates [T,B,4H]: r, z, n, W_hn·h + b_hn
    "gru": f"({_GRU_TENSORS}, {_SEQUENCE_OPTIONS}) -> (Tensor output, Tensor h_n, Tensor gates)",
    # output_mask and results: x, h, w_ih, w_hh, b_ih, b_hh, ln_ih, ln_hh; [0] where not asked for
    "gru_backward": f"(Tensor? grad_output, Tensor? grad_h_n, {_GRU_TENSORS}, {_SEQUENCE_OPTIONS},"
    " Tensor output, Tensor gates, bool[8] output_mask) -> (Tensor dx, Tensor dh, Tensor dw_ih, Tensor dw_hh, Tensor db_ih,"
    " Tensor db_hh, Tensor dln_ih, Tensor dln_hh)",
    # a seed for the dropout masks from torch's generator of that device: int64 scalar
    "draw_seed": "(Device device) -> Tensor",
    # x [T,B,U] or [B,T,U]  ->  x/(1 − p), 0 where (seed, row, step, unit, stream) says so; its own gradient
    "keyed_dropout": "(Tensor x, Tensor seed, int stream, float p, bool batch_first) -> Tensor",
}

# Targets of cross-entropy: [B] int64; or [B,P] padded with -1, or ids and where each row's begin (crow [B+1]), with weights.
_TARGETS = "Tensor target, Tensor? target_weights, Tensor? target_crow"
_LOSS = "int ignore_index, float label_smoothing, Tensor? smoothing_prior"

CATALOGUE = {
    # query [B,d]  items [I,d]  target [B] int64  ->  [B] int64
    "catalogue_rank": f"(Tensor query, Tensor items, Tensor target, {_LOGITS}, int ignore_index) -> Tensor",
    # ->  values [B,k] fp32 (fp64), indices [B,k] int64
    "catalogue_topk": f"(Tensor query, Tensor items, SymInt k, {_LOGITS}) -> (Tensor values, Tensor indices)",
    # output_mask and results, here and below: query, items, row_scale, bias; [0] where not asked for
    "catalogue_topk_backward": "(Tensor grad_values, Tensor indices, Tensor query, Tensor items, float scale,"
    " Tensor? row_scale, Tensor? bias, bool[4] output_mask)"
    " -> (Tensor dquery, Tensor ditems, Tensor drow_scale, Tensor dbias)",
    # query [B,d]  keys [I,d]  values [I,d_v] (None: keys)  ->  context [B,d_v], lse [B,heads] fp32 (fp64)
    "catalogue_attention": f"(Tensor query, Tensor keys, Tensor? values, SymInt num_heads, {_LOGITS}, int precision)"
    " -> (Tensor context, Tensor lse)",
    # without values, dkeys holds both roles of the keys and dvalues is [0]
    "catalogue_attention_backward": "(Tensor grad_context, Tensor grad_lse, Tensor context, Tensor lse, Tensor query,"
    f" Tensor keys, Tensor? values, SymInt num_heads, {_LOGITS}, bool[5] output_mask, int precision)"
    " -> (Tensor dquery, Tensor dkeys, Tensor dvalues, Tensor drow_scale, Tensor dbias)",
    # ->  loss, lse [B] fp32 (fp64); with save_context: context [B,d] (sum of p v), and with smoothing mean_vectors [B,d] (sum of
    # u v), else [0]. sparse_grad, skip_mass and skipped ([B], written by the backward) concern the gradient alone.
    "catalogue_cross_entropy": f"(Tensor query, Tensor items, {_TARGETS}, {_LOGITS}, {_LOSS}, float skip_mass,"
    " Tensor? skipped, bool sparse_grad, bool save_context, int precision)"
    " -> (Tensor loss, Tensor lse, Tensor context, Tensor mean_vectors)",
    "catalogue_cross_entropy_backward": "(Tensor grad_loss, Tensor grad_lse, Tensor lse, Tensor context,"
    f" Tensor mean_vectors, Tensor query, Tensor items, {_TARGETS}, {_LOGITS}, {_LOSS}, float skip_mass,"
    " bool[4] output_mask, int precision)"
    " -> (Tensor dquery, Tensor ditems, Tensor drow_scale, Tensor dbias, Tensor skipped)",
    # negatives [n] for every row, or [B,n], -1 is padding; negatives_log_q of their shape  ->  loss, lse [B] fp32 (fp64)
    "catalogue_sampled_cross_entropy": f"(Tensor query, Tensor items, {_TARGETS}, Tensor negatives,"
    f" Tensor? negatives_log_q, {_LOGITS}, {_LOSS}, bool sparse_grad, int precision) -> (Tensor loss, Tensor lse)",
    # the gradients of items and bias by touched item: ids [m] (-1: none), drows [m,d], dcoefficients [m]; targets come first
    "catalogue_sampled_cross_entropy_backward": "(Tensor grad_loss, Tensor grad_lse, Tensor query, Tensor items,"
    f" {_TARGETS}, Tensor negatives, Tensor? negatives_log_q, {_LOGITS}, {_LOSS}, bool[4] output_mask, int precision)"
    " -> (Tensor dquery, Tensor ids, Tensor drows, Tensor drow_scale, Tensor dcoefficients)",
}

SCHEMAS: dict[str, str] = {**RECURRENT, **CATALOGUE}

# Two draws are two draws: no pass may merge or recompute them.
_TAGS = {"draw_seed": (torch.Tag.nondeterministic_seeded,)}

# Only the native library has these.
NATIVE_ONLY = {
    # which compiled CPU tier runs
    "highest_cpu_tier": "() -> int",
    "set_cpu_tier": "(int tier) -> ()",
    # items [I,d]  ->  codes [I, d rounded up to 32] int8, facts [3,I] fp32: scale, norm of the error, norm of the item
    "catalogue_pack_int8": "(Tensor items) -> (Tensor codes, Tensor facts)",
    # catalogue_topk whose first pass reads the packed copy of the items
    "catalogue_topk_packed": f"(Tensor query, Tensor items, Tensor codes, Tensor facts, int k, {_LOGITS})"
    " -> (Tensor values, Tensor indices)",
    # catalogue_cross_entropy without smoothing
    "catalogue_cross_entropy_plain": f"(Tensor query, Tensor items, {_TARGETS}, {_LOGITS}, int ignore_index,"
    " bool save_context) -> (Tensor loss, Tensor lse, Tensor context)",
    "catalogue_cross_entropy_plain_backward": "(Tensor grad_loss, Tensor grad_lse, Tensor lse, Tensor context,"
    f" Tensor query, Tensor items, {_TARGETS}, {_LOGITS}, int ignore_index, float skip_mass, bool[4] output_mask)"
    " -> (Tensor dquery, Tensor ditems, Tensor drow_scale, Tensor dbias, Tensor skipped)",
    # What it is made of with smoothing (backends/native/catalogue_cross_entropy.py). kept: targets as above, which no
    # exclusion touches  ->  shift, log_total [B], context [B,d] ([0] unless asked for), kept scores [N], all fp32
    "catalogue_softmax": f"(Tensor query, Tensor items, {_LOGITS}, Tensor kept, Tensor? kept_crow, bool context)"
    " -> (Tensor shift, Tensor log_total, Tensor context, Tensor kept_scores)",
    # of the sum of weight·lse less kept_gradient·score  ->  ditems (fp32 if wide), dbias fp32, skipped [B] fp32; [0] where not
    # asked for
    "catalogue_softmax_backward": f"(Tensor weight, Tensor lse, Tensor query, Tensor items, {_LOGITS}, Tensor kept,"
    " Tensor? kept_crow, Tensor kept_gradient, bool wants_items, bool wants_bias, float skip_mass, bool wide)"
    " -> (Tensor ditems, Tensor dbias, Tensor skipped)",
    # memory that the two, or with `attention` catalogue_attention and its backward, take beside arguments and results
    "catalogue_softmax_bytes": "(int num_rows, int num_items, int width, int value_width, bool own_values, bool attention,"
    " bool backward, bool bf16, int threads) -> int",
}


def _define() -> dict[str, torch.library.Library]:
    libraries = {}
    for namespace in (PUBLIC, *(f"{PUBLIC}_{backend}" for backend in BACKENDS)):
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *_TAGS.get(name, ())))
        libraries[namespace] = library
    for name, schema in NATIVE_ONLY.items():
        libraries[f"{PUBLIC}_native"].define(name + schema)
    return libraries


LIBRARIES = _define()
