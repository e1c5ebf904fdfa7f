// matching.take and matching.put_: elements of the levels, and their gradient.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "../checks.h"
#include "../levels.h"

namespace freeanchor {
namespace {

at::Tensor take(at::TensorList levels, const at::Tensor& index) {
  const auto dtype = compute_dtype("levels", levels);
  const at::Tensor index_c = index.contiguous();
  at::Tensor result = at::empty(index.sizes(), levels[0].options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, levels[0].scalar_type(), "take", [&] {
        using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto elements = view_levels<scalar_t>("levels", levels);
        compute_t* out = result.mutable_data_ptr<compute_t>();
        elements.for_each(
            "index", index_c.const_data_ptr<int64_t>(), index_c.numel(),
            [&](int64_t i, const scalar_t& element) { out[i] = element; });
      });
  return result;
}

void put_(
    at::TensorList levels, const at::Tensor& index, const at::Tensor& source,
    const std::optional<at::Tensor>& factor) {
  TORCH_CHECK(
      index.numel() == source.numel() && source.scalar_type() == compute_dtype("levels", levels),
      "source must have as many elements as index, and the dtype of take");
  if (factor && factor->item<double>() != 1) {
    for (const at::Tensor& level : levels) {
      level.mul_(factor->item()); // a scalar is not rounded to the dtype of the level
    }
  }
  const at::Tensor index_c = index.contiguous(), source_c = source.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, levels[0].scalar_type(), "put_", [&] {
        using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto elements = view_levels<scalar_t>("levels", levels);
        const compute_t* sources = source_c.const_data_ptr<compute_t>();
        elements.for_each(
            "index", index_c.const_data_ptr<int64_t>(), index_c.numel(),
            [&](int64_t i, scalar_t& element) { element += sources[i]; });
      });
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("take", take);
  m.impl("put_", put_);
}

} // namespace freeanchor
