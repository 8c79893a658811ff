// Registration of catalogue_cross_entropy without label smoothing on the CPU.
//
//     loss_r = A_r·lse_r - Σ_p w_p·s_p          A_r = Σ_p w_p, over the row's targets p
//     a_r = dloss_r·A_r + dlse_r                dq_r = factor_r·(a_r·Σ_i p_i·v_i - dloss_r·Σ_p w_p·v_p)
#include "catalogue/cpu_softmax.h"

namespace seqrec_fast {
namespace {

using Optional = std::optional<Tensor>;

// The targets of every row, and the rows that have any.
class Targets {
 public:
  Targets(const LogitArguments& a, const Tensor& target, const Optional& weights, const Optional& crow,
          int64_t ignore_index) {
    check_value(is_64(target), a.operation, ": target must be int64");
    check_value(!weights || weights->numel() == target.numel(), a.operation,
                ": target_weights must have the shape of the targets");
    if (target.dim() == 1 && !crow) {
      take_single(a, target, ignore_index);
      return;
    }
    a.check_lists("target", target, crow);
    holder_ = ListHolder(target, crow);
    lists = holder_.lists;
    weight.assign(static_cast<size_t>(target.numel()), 0.0f);
    const Tensor given = weights ? wide(*weights) : target;
    for (int64_t r = 0; r < a.query.size(0); ++r) {
      const Range list = list_of(lists, r);
      int64_t count = 0;
      for (int64_t i = list.begin; i < list.end; ++i) count += id(i) != -1;
      if (!count) continue;
      double sum = 0.0;
      for (int64_t i = list.begin; i < list.end; ++i) {
        if (id(i) == -1) continue;
        const float w = weights ? floats(given)[i] : 1.0f / static_cast<float>(count);
        weight[static_cast<size_t>(i)] = w;
        sum += static_cast<double>(w);
      }
      rows.push_back(r);
      total.push_back(sum);
    }
  }

  int64_t id(int64_t place) const { return integer(lists.ids, lists.ids_are_64, place); }
  KeptPairs pairs(int64_t all_rows) const {
    return {lists, static_cast<int64_t>(rows.size()) == all_rows ? nullptr : &rows};
  }

  IdLists lists;
  std::vector<float> weight;  // by place in the lists
  std::vector<int64_t> rows;  // that are not ignored
  std::vector<double> total;  // A, of each of them

 private:
  void take_single(const LogitArguments& a, const Tensor& target, int64_t ignore_index) {
    check_value(target.size(0) == a.query.size(0), a.operation, ": target must have one id per row");
    const VectorView from = vector(target);
    for (int64_t r = 0; r < target.size(0); ++r) {
      const int64_t id = static_cast<const int64_t*>(from.data)[r * from.stride];
      const bool ignored = id == ignore_index;
      if (!ignored) a.check_id("target", false, id), rows.push_back(r);
      single_.push_back(ignored ? -1 : id);
      weight.push_back(ignored ? 0.0f : 1.0f);
    }
    total.assign(rows.size(), 1.0);
    lists.ids = single_.data();
    lists.width = 1;
  }

  std::vector<int64_t> single_;
  ListHolder holder_;
};

// loss, lse [B] and, with save_context, Σ p·v [B, d] (else [0]), fp32; 0 in ignored rows.
std::tuple<Tensor, Tensor, Tensor> catalogue_cross_entropy_plain(const Tensor& query, const Tensor& items,
                                                                 const Tensor& target, Optional target_weights,
                                                                 Optional target_crow, double scale, Optional row_scale,
                                                                 Optional bias, Optional exclude, Optional exclude_crow,
                                                                 int64_t ignore_index, bool save_context) {
  const LogitArguments arguments{
      "catalogue_cross_entropy", query, items, scale, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  const Targets targets(arguments, target, target_weights, target_crow, ignore_index);
  const int64_t batch = query.size(0), width = query.size(1);
  const Softmax softmax(arguments, {}, 1, targets.pairs(batch));
  const int64_t rows = softmax.all.num_rows;
  std::vector<float> shift(static_cast<size_t>(rows)), log_total(shift.size()), score(targets.weight.size());
  Tensor context = torch::stable::new_empty(query, {save_context ? batch : 0, width}, ScalarType::Float);
  const bool in_place = rows == batch;
  std::vector<float> packed(static_cast<size_t>(save_context && !in_place ? rows * width : 0));
  SoftmaxResults results{shift.data(), log_total.data()};
  results.context = in_place ? context.mutable_data_ptr<float>() : packed.data();
  results.context_stride = width;
  softmax_forward(softmax.all, results, save_context, score.data());

  Tensor loss = torch::stable::new_zeros(query, {batch}, ScalarType::Float);
  Tensor lse = torch::stable::new_zeros(query, {batch}, ScalarType::Float);
  if (!in_place && save_context) torch::stable::zero_(context);
  for (size_t n = 0; n < targets.rows.size(); ++n) {
    const int64_t row = targets.rows[n];
    const Range list = list_of(targets.lists, row);
    // Scores and shift are numbers of one scan: where a target is the only item, nothing is left of their difference.
    double linear = 0.0;
    for (int64_t i = list.begin; i < list.end; ++i) {
      const float w = targets.weight[static_cast<size_t>(i)];
      if (w != 0.0f)
        linear += static_cast<double>(w) *
                  (static_cast<double>(score[static_cast<size_t>(i)]) - static_cast<double>(shift[n]));
    }
    // A target whose score is -inf costs +inf, also where nothing else has a probability.
    const double level = std::isinf(log_total[n]) && log_total[n] < 0 ? 0.0 : static_cast<double>(log_total[n]);
    loss.mutable_data_ptr<float>()[row] = static_cast<float>(targets.total[n] * level - linear);
    lse.mutable_data_ptr<float>()[row] = shift[n] + log_total[n];
    if (save_context && !in_place)
      std::copy_n(packed.data() + static_cast<int64_t>(n) * width, width,
                  context.mutable_data_ptr<float>() + row * width);
  }
  return {loss, lse, context};
}

// Gradients of query, items, row_scale and bias, and the mass skipped [B]; [0] where the mask is false.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> catalogue_cross_entropy_plain_backward(
    const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& lse, const Tensor& context, const Tensor& query,
    const Tensor& items, const Tensor& target, Optional target_weights, Optional target_crow, double scale,
    Optional row_scale, Optional bias, Optional exclude, Optional exclude_crow, int64_t ignore_index, double skip_mass,
    const std::vector<bool>& mask) {
  const LogitArguments arguments{
      "catalogue_cross_entropy_backward", query, items, scale, row_scale, bias, exclude, exclude_crow};
  arguments.check();
  check_value(mask.size() == 4, arguments.operation, ": output_mask must have 4 entries, got ", mask.size());
  const Targets targets(arguments, target, target_weights, target_crow, ignore_index);
  const int64_t batch = query.size(0), width = query.size(1);
  const bool wants_scale = mask[2] && row_scale, wants_query = mask[0] || wants_scale;
  for (const Tensor& tensor : {grad_loss, grad_lse, lse})
    check_value(tensor.dim() == 1 && tensor.size(0) == batch && tensor.scalar_type() == ScalarType::Float,
                arguments.operation, ": loss and lse must be float32 [B]");
  check_value(!wants_query || (context.dim() == 2 && context.size(0) == batch && context.size(1) == width),
              arguments.operation, ": context must have shape [B, d]");
  const Softmax softmax(arguments, {}, 1, targets.pairs(batch));
  const SoftmaxCall& call = softmax.all;

  const size_t rows = targets.rows.size();
  const Tensor d_loss = wide(grad_loss), d_lse = wide(grad_lse), level = wide(lse);
  std::vector<float> shift(rows), weight(rows), share(targets.weight.size());
  const Tensor biases = bias ? wide(*bias) : lse;
  for (size_t n = 0; n < rows; ++n) {
    const int64_t row = targets.rows[n];
    const float here = floats(level)[row];
    shift[n] = here == -std::numeric_limits<float>::infinity() ? 0.0f : here;
    weight[n] = static_cast<float>(static_cast<double>(floats(d_loss)[row]) * targets.total[n] +
                                   static_cast<double>(floats(d_lse)[row]));
    const Range list = list_of(targets.lists, row);
    for (int64_t i = list.begin; i < list.end; ++i) {
      const int64_t id = targets.id(i);
      // A target whose score is -inf has no gradient.
      const bool dead = id == -1 || (bias && floats(biases)[id] == -std::numeric_limits<float>::infinity());
      share[static_cast<size_t>(i)] = dead ? 0.0f : floats(d_loss)[row] * targets.weight[static_cast<size_t>(i)];
    }
  }

  const auto empty = [&](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor d_items = mask[1] ? torch::stable::new_empty(items, {call.num_items, width}) : empty(items);
  Tensor d_bias = torch::stable::new_empty(items, {mask[3] ? call.num_items : 0}, ScalarType::Float);
  Tensor skipped = torch::stable::new_zeros(query, {batch}, ScalarType::Float);
  if (mask[1] || mask[3]) {
    SoftmaxGradient gradient;
    gradient.shift = shift.data(), gradient.weight = weight.data(), gradient.kept_gradient = share.data();
    if (mask[1]) gradient.items = d_items.mutable_data_ptr();
    gradient.item_format = call.format, gradient.item_stride = width;
    if (mask[3]) gradient.bias = d_bias.mutable_data_ptr<float>();
    gradient.skip_mass = static_cast<float>(skip_mass);
    std::vector<float> left_out(rows, 0.0f);
    softmax_backward(call, gradient, nullptr, skip_mass > 0 ? left_out.data() : nullptr);
    for (size_t n = 0; n < rows; ++n) skipped.mutable_data_ptr<float>()[targets.rows[n]] = left_out[n];
  }

  Tensor d_query = torch::stable::new_zeros(query, {wants_query ? batch : 0, width}, ScalarType::Float);
  Tensor d_scale = torch::stable::new_zeros(query, {wants_scale ? batch : 0}, ScalarType::Float);
  if (wants_query) {
    const Tensor q = wide(query), factors = row_scale ? wide(*row_scale) : lse, made = wide(context);
    const SoftmaxKernels& kernel = SEQREC_CHOSEN_TABLE(softmax_kernels);
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(width, 1));
    torch::stable::parallel_for(0, static_cast<int64_t>(rows), grain, [&](int64_t begin, int64_t end) {
      std::vector<float> vector(static_cast<size_t>(width));
      for (int64_t n = begin; n < end; ++n) {
        const int64_t row = targets.rows[static_cast<size_t>(n)];
        float* direction = d_query.mutable_data_ptr<float>() + row * width;
        for (int64_t k = 0; k < width; ++k)
          direction[k] = weight[static_cast<size_t>(n)] * floats(made)[row * width + k];
        const Range list = list_of(targets.lists, row);
        for (int64_t i = list.begin; i < list.end; ++i) {
          if (share[static_cast<size_t>(i)] == 0.0f) continue;
          kernel.read_item(call, targets.id(i), vector.data());
          for (int64_t k = 0; k < width; ++k)
            direction[k] -= share[static_cast<size_t>(i)] * vector[static_cast<size_t>(k)];
        }
        double factor = scale, sum = 0.0;
        if (row_scale) factor *= static_cast<double>(floats(factors)[row]);
        for (int64_t k = 0; k < width; ++k) {
          sum += static_cast<double>(direction[k]) * static_cast<double>(floats(q)[row * width + k]);
          direction[k] = static_cast<float>(static_cast<double>(direction[k]) * factor);
        }
        if (wants_scale) d_scale.mutable_data_ptr<float>()[row] = static_cast<float>(sum * scale);
      }
    });
  }
  const auto as = [](const Tensor& found, const Tensor& like) {
    return found.scalar_type() == like.scalar_type() ? found : torch::stable::to(found, like.scalar_type());
  };
  return {mask[0] ? as(d_query, query) : empty(query), d_items, row_scale ? as(d_scale, *row_scale) : d_scale,
          bias ? as(d_bias, *bias) : d_bias, skipped};
}

}  // namespace
}  // namespace seqrec_fast

STABLE_TORCH_LIBRARY_IMPL(seqrec_fast_native, CPU, m) {
  m.impl("catalogue_cross_entropy_plain", TORCH_BOX(&seqrec_fast::catalogue_cross_entropy_plain));
  m.impl("catalogue_cross_entropy_plain_backward", TORCH_BOX(&seqrec_fast::catalogue_cross_entropy_plain_backward));
}
