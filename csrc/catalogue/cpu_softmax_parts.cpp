// Registration of the parts that catalogue_cross_entropy with label smoothing is made of on the CPU: the softmax with
// the scores of its targets, and the gradient of the items. The smoothing's part of the loss is linear in the items,
// and added in Python (seqrec_fast/backends/native). Without smoothing the operator is compiled as a whole:
// cpu_cross_entropy.cpp.
#include "catalogue/cpu_softmax.h"

namespace seqrec_fast {
namespace {

using Optional = std::optional<Tensor>;

ListHolder pairs_of(const LogitArguments& arguments, const Tensor& kept, const Optional& crow) {
  arguments.check();
  arguments.check_lists("target", kept, crow);
  check_value(kept.dim() == 2 || crow || kept.size(0) == arguments.query.size(0), arguments.operation,
              ": target must have one id per row");
  return ListHolder(kept, crow);
}

// shift, log_total [B], context Σ p·v [B, d] or [0], scores of the kept pairs [N] in the order given; all fp32.
std::tuple<Tensor, Tensor, Tensor, Tensor> catalogue_softmax(const Tensor& query, const Tensor& items, double scale,
                                                             Optional row_scale, Optional bias, Optional exclude,
                                                             Optional exclude_crow, const Tensor& kept,
                                                             Optional kept_crow, bool context) {
  const LogitArguments arguments{
      "catalogue_cross_entropy", query, items, scale, row_scale, bias, exclude, exclude_crow};
  const ListHolder pairs = pairs_of(arguments, kept, kept_crow);
  const Softmax softmax(arguments, {}, 1, {pairs.lists});
  const SoftmaxCall& call = softmax.all;
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(query, shape, ScalarType::Float);
  };
  Tensor shift = floats({call.num_rows}), log_total = floats({call.num_rows}), scores = floats({kept.numel()});
  Tensor weighted = context ? floats({call.num_rows, call.width}) : floats({0});
  float* score = scores.mutable_data_ptr<float>();
  std::fill(score, score + kept.numel(), -std::numeric_limits<float>::infinity());  // padding has no score
  SoftmaxResults results{shift.mutable_data_ptr<float>(), log_total.mutable_data_ptr<float>()};
  results.context = weighted.mutable_data_ptr();
  results.context_stride = call.width;
  softmax_forward(call, results, context, score);
  return {shift, log_total, weighted, scores};
}

// The gradients of items and bias of Σ_r weight_r·lse_r less kept_gradient·score of the kept pairs, and the mass
// left out ([0] with skip_mass 0). d_items in the
// items' dtype, or with `wide` in fp32; d_bias in fp32; [0] where not asked for.
std::tuple<Tensor, Tensor, Tensor> catalogue_softmax_backward(
    const Tensor& weight, const Tensor& lse, const Tensor& query, const Tensor& items, double scale, Optional row_scale,
    Optional bias, Optional exclude, Optional exclude_crow, const Tensor& kept, Optional kept_crow,
    const Tensor& kept_gradient, bool wants_items, bool wants_bias, double skip_mass, bool wide) {
  const LogitArguments arguments{
      "catalogue_cross_entropy_backward", query, items, scale, row_scale, bias, exclude, exclude_crow};
  const ListHolder pairs = pairs_of(arguments, kept, kept_crow);
  const Softmax softmax(arguments, {}, 1, {pairs.lists});
  const SoftmaxCall& call = softmax.all;
  const auto of_rows = [&](const char* name, const Tensor& tensor, int64_t size) {
    check_value(tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == ScalarType::Float,
                arguments.operation, ": ", name, " must be float32 [", size, "]");
    return torch::stable::contiguous(tensor);
  };
  const Tensor weights = of_rows("weight", weight, call.num_rows), level = of_rows("lse", lse, call.num_rows);
  const Tensor of_kept = of_rows("kept_gradient", kept_gradient, kept.numel());
  std::vector<float> shift(static_cast<size_t>(call.num_rows));
  const float* from = static_cast<const float*>(data_of(level));
  for (size_t r = 0; r < shift.size(); ++r)
    shift[r] = from[r] == -std::numeric_limits<float>::infinity() ? 0.0f : from[r];
  Tensor d_items = torch::stable::new_empty(items, {wants_items ? call.num_items : 0, call.width},
                                            wide ? ScalarType::Float : items.scalar_type());
  Tensor d_bias = torch::stable::new_empty(items, {wants_bias ? call.num_items : 0}, ScalarType::Float);
  SoftmaxGradient gradient;
  gradient.shift = shift.data(), gradient.weight = static_cast<const float*>(data_of(weights));
  gradient.kept_gradient = static_cast<const float*>(data_of(of_kept));
  if (wants_items) gradient.items = d_items.mutable_data_ptr();
  gradient.item_format = wide ? Format::kF32 : call.format;
  gradient.item_stride = call.width;
  if (wants_bias) gradient.bias = d_bias.mutable_data_ptr<float>();
  gradient.skip_mass = static_cast<float>(skip_mass);
  Tensor skipped = torch::stable::new_empty(items, {skip_mass > 0 ? call.num_rows : 0}, ScalarType::Float);
  softmax_backward(call, gradient, nullptr, skip_mass > 0 ? skipped.mutable_data_ptr<float>() : nullptr);
  return {d_items, d_bias, skipped};
}

// What the softmax of these sizes takes beside its arguments, results and lists, in bytes: the forward's, or with
// `backward` the larger of both.
int64_t catalogue_softmax_bytes(int64_t num_rows, int64_t num_items, int64_t width, int64_t value_width,
                                bool own_values, bool attention, bool backward, bool bf16, int64_t threads) {
  SoftmaxCall call;
  call.format = bf16 ? Format::kBF16 : Format::kF32;
  call.num_rows = num_rows, call.num_items = num_items, call.width = width;
  call.value_width = value_width, call.own_values = own_values;
  const int64_t forward = ForwardCut(call, true, threads).bytes();
  if (!backward) return forward;
  SoftmaxGradient gradient;
  gradient.query = attention;
  if (attention) gradient.direction.data = &call;  // there is one
  const int64_t skipped = attention ? 0 : 16 * 4 * num_rows;
  return std::max(forward, BackwardCut(call, gradient, threads).bytes() + skipped);
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CompositeExplicitAutograd, m) {
  m.impl("catalogue_softmax_bytes", TORCH_BOX(&seqrec_fast::catalogue_softmax_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_softmax", TORCH_BOX(&seqrec_fast::catalogue_softmax));
  m.impl("catalogue_softmax_backward", TORCH_BOX(&seqrec_fast::catalogue_softmax_backward));
}
