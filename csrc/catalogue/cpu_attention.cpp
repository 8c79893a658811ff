// Registration of catalogue_attention and its backward on the CPU.
#include "catalogue/cpu_softmax.h"

namespace seqrec_fast {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor> catalogue_attention(const Tensor& query, const Tensor& keys, Optional values,
                                               int64_t num_heads, double scale, Optional row_scale, Optional bias,
                                               Optional exclude, Optional exclude_crow, int64_t precision) {
  const LogitArguments arguments{"catalogue_attention", query, keys, scale, row_scale, bias, exclude, exclude_crow};
  const Softmax softmax(arguments, values, num_heads, {});
  const SoftmaxCall& all = softmax.all;
  const int64_t rows = all.num_rows;
  Tensor context = torch::stable::new_empty(query, {rows, all.value_width * num_heads});
  Tensor lse = torch::stable::new_empty(query, {rows, num_heads}, ScalarType::Float);
  std::vector<float> unused(static_cast<size_t>(2 * rows));
  SoftmaxResults results{unused.data(), unused.data() + rows};
  results.context_format = all.format;
  results.context_stride = context.stride(0), results.lse_stride = num_heads;
  const int64_t element = all.format == Format::kF32 ? 4 : 2;
  for (int64_t h = 0; h < num_heads; ++h) {
    results.lse = lse.mutable_data_ptr<float>() + h;
    results.context = static_cast<char*>(context.mutable_data_ptr()) + h * all.value_width * element;
    softmax_forward(softmax.head(h), results, true, nullptr);
  }
  return {context, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> catalogue_attention_backward(
    const Tensor& grad_context, const Tensor& grad_lse, const Tensor& context, const Tensor& lse, const Tensor& query,
    const Tensor& keys, Optional values, int64_t num_heads, double scale, Optional row_scale, Optional bias,
    Optional exclude, Optional exclude_crow, const std::vector<bool>& mask, int64_t precision) {
  const LogitArguments arguments{
      "catalogue_attention_backward", query, keys, scale, row_scale, bias, exclude, exclude_crow};
  const Softmax softmax(arguments, values, num_heads, {});
  const SoftmaxCall& all = softmax.all;
  const int64_t rows = all.num_rows, items = all.num_items, width = all.value_width;
  check_value(mask.size() == 5, "catalogue_attention_backward: output_mask must have 5 entries, got ", mask.size());
  for (const Tensor& tensor : {grad_context, context})
    check_value(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == width * num_heads &&
                    (tensor.scalar_type() == query.scalar_type() || tensor.scalar_type() == ScalarType::Float),
                "catalogue_attention_backward: context must have shape [B, d_v]");
  for (const Tensor& tensor : {grad_lse, lse})
    check_value(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == num_heads &&
                    tensor.scalar_type() == ScalarType::Float,
                "catalogue_attention_backward: lse must be float32 [B, heads]");
  const bool own = values.has_value(), wants_values = mask[2] && own;
  const bool wants_query = mask[0] || (mask[3] && row_scale);
  const auto empty = [&](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor d_keys = mask[1] ? torch::stable::new_empty(keys, {items, all.width * num_heads}) : empty(keys);
  Tensor d_values =
      wants_values ? torch::stable::new_empty(*values, {items, width * num_heads}) : empty(values ? *values : query);
  Tensor d_bias_wide = torch::stable::new_empty(query, {mask[4] ? items : 0}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(query, {wants_query ? num_heads : 0, rows, all.width}, ScalarType::Float);

  const Tensor g = wide(grad_context), made = wide(context), d_lse = wide(grad_lse), old_lse = wide(lse);
  std::vector<float> shift(static_cast<size_t>(rows)), weight(static_cast<size_t>(rows));
  const int64_t element = all.format == Format::kF32 ? 4 : 2;
  for (int64_t h = 0; h < num_heads; ++h) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * num_heads + h;
      const float level = floats(old_lse)[at];
      shift[static_cast<size_t>(r)] = level == -std::numeric_limits<float>::infinity() ? 0.0f : level;
      weight[static_cast<size_t>(r)] = floats(d_lse)[at];
    }
    SoftmaxGradient gradient;
    gradient.shift = shift.data(), gradient.weight = weight.data();
    gradient.direction = {floats(g) + h * width, width * num_heads, 1};
    gradient.context = {floats(made) + h * width, width * num_heads, 1};
    gradient.item_format = all.format;
    gradient.item_stride = all.width * num_heads, gradient.value_stride = width * num_heads;
    if (mask[1]) gradient.items = static_cast<char*>(d_keys.mutable_data_ptr()) + h * all.width * element;
    if (wants_values) gradient.values = static_cast<char*>(d_values.mutable_data_ptr()) + h * width * element;
    if (mask[4]) gradient.bias = d_bias_wide.mutable_data_ptr<float>(), gradient.add_bias = h > 0;
    gradient.query = wants_query;
    softmax_backward(softmax.head(h), gradient,
                     wants_query ? sums.mutable_data_ptr<float>() + h * rows * all.width : nullptr, nullptr);
  }

  // The query's gradient without its factor is Σᵢ ds·k_i; its product with the query is the factor's.
  Tensor d_query_wide = torch::stable::new_empty(query, {mask[0] ? rows : 0, all.width * num_heads}, ScalarType::Float);
  Tensor d_scale_wide = torch::stable::new_empty(query, {mask[3] && row_scale ? rows : 0}, ScalarType::Float);
  if (wants_query) {
    const Tensor q = wide(query), factors = row_scale ? wide(*row_scale) : q;
    const float* sum = sums.mutable_data_ptr<float>();
    for (int64_t r = 0; r < rows; ++r) {
      double factor = scale, d_scale = 0.0;
      if (row_scale) factor *= static_cast<double>(floats(factors)[r]);
      for (int64_t h = 0; h < num_heads; ++h)
        for (int64_t k = 0; k < all.width; ++k) {
          const double direction = static_cast<double>(sum[(h * rows + r) * all.width + k]);
          const int64_t at = (r * num_heads + h) * all.width + k;
          if (mask[0]) d_query_wide.mutable_data_ptr<float>()[at] = static_cast<float>(direction * factor);
          if (mask[3] && row_scale) d_scale += direction * static_cast<double>(floats(q)[at]);
        }
      if (mask[3] && row_scale) d_scale_wide.mutable_data_ptr<float>()[r] = static_cast<float>(d_scale * scale);
    }
  }
  const auto as = [](const Tensor& wide, const Tensor& like) {
    return wide.scalar_type() == like.scalar_type() ? wide : torch::stable::to(wide, like.scalar_type());
  };
  return {mask[0] ? as(d_query_wide, query) : empty(query), d_keys, d_values,
          row_scale ? as(d_scale_wide, *row_scale) : d_scale_wide, bias ? as(d_bias_wide, *bias) : d_bias_wide};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_attention", TORCH_BOX(&seqrec_fast::catalogue_attention));
  m.impl("catalogue_attention_backward", TORCH_BOX(&seqrec_fast::catalogue_attention_backward));
}
