// matching.take and matching.put_: elements of the levels, and their gradient.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../levels.h"

namespace freeanchor {
namespace {

constexpr int64_t kGrain = 1 << 15; // elements per task

// Calls visit(i, element) for each index in order. Most indices follow their predecessor within the
// numbers of an anchor, which takes no division.
template <typename scalar_t, typename F>
void for_each(const Levels<scalar_t>& levels, const int64_t* indices, int64_t count, F visit) {
  scalar_t* element = nullptr;
  int64_t next = -1, end = -1, step = 0; // of the numbers of the last anchor
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = indices[i];
    if (index == next && index < end) {
      element += step;
    } else {
      TORCH_CHECK_VALUE(
          0 <= index && index < levels.size(), "index", kOutOfRange, levels.size(), ")");
      element = &levels[index];
      step = levels.level_of(index / levels.depth % levels.anchors).stride[4];
      end = (index / levels.depth + 1) * levels.depth;
    }
    next = index + 1;
    visit(i, *element);
  }
}

at::Tensor take(at::TensorList levels, const at::Tensor& index) {
  const auto dtype = compute_dtype("levels", levels);
  const at::Tensor index_c = index.contiguous();
  at::Tensor result = at::empty(index.sizes(), levels[0].options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "take", [&] {
    auto* out = result.mutable_data_ptr<compute_type<scalar_t>>();
    for_each(
        view_levels<scalar_t>("levels", levels), index_c.const_data_ptr<int64_t>(), index_c.numel(),
        [&](int64_t i, const scalar_t& element) { out[i] = element; });
  });
  return result;
}

// Level by level, in float32 or better: float16 may not hold the factor.
template <typename scalar_t, typename T>
void multiply(at::TensorList levels, T factor) {
  for (const at::Tensor& level : levels) {
    if (!level.is_non_overlapping_and_dense()) {
      level.copy_(level.to(c10::CppTypeToScalarType<T>::value).mul_(factor));
      continue;
    }
    scalar_t* data = level.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, level.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        data[i] = static_cast<scalar_t>(static_cast<T>(data[i]) * factor);
      }
    });
  }
}

template <typename scalar_t, typename T>
void add(const Levels<scalar_t>& levels, const at::Tensor& index, const T* source) {
  const int64_t* indices = index.const_data_ptr<int64_t>();
  if constexpr (std::is_same_v<scalar_t, T>) {
    for_each(levels, indices, index.numel(), [&](int64_t i, T& element) { element += source[i]; });
  } else {
    // The sources of an element are added before it is rounded, so they must be side by side.
    const auto [sorted, order] = at::sort(index.reshape(-1), /*stable=*/true, 0, false);
    const int64_t *first = sorted.template const_data_ptr<int64_t>(),
                  *from = order.template const_data_ptr<int64_t>();
    T sum = 0;
    for_each(levels, first, index.numel(), [&](int64_t i, scalar_t& element) {
      sum = (i > 0 && first[i - 1] == first[i] ? sum : static_cast<T>(element)) + source[from[i]];
      element = static_cast<scalar_t>(sum);
    });
  }
}

void put_(
    at::TensorList levels, const at::Tensor& index, const at::Tensor& source,
    const std::optional<at::Tensor>& factor) {
  const auto dtype = compute_dtype("levels", levels);
  TORCH_CHECK(
      index.numel() == source.numel() && source.scalar_type() == dtype,
      "source must have as many elements as index, and the dtype of take");
  const at::Tensor index_c = index.contiguous(), source_c = source.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "put_", [&] {
    using compute_t = compute_type<scalar_t>;
    const auto elements = view_levels<scalar_t>("levels", levels);
    if (const auto by = factor ? factor->item<compute_t>() : compute_t(1); by != 1) {
      multiply<scalar_t, compute_t>(levels, by);
    }
    add<scalar_t, compute_t>(elements, index_c, source_c.const_data_ptr<compute_t>());
  });
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("take", take);
  m.impl("put_", put_);
}

} // namespace freeanchor
