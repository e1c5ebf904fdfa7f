// matching.take and matching.put_: elements of the levels, and their gradient.
#include <torch/library.h>

#include "../arguments.h"

namespace freeanchor {
namespace {

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
    auto* out = result.mutable_data_ptr<at::opmath_type<scalar_t>>();
    for_each(
        view_levels<scalar_t>("levels", levels, index.device()), index_c.const_data_ptr<int64_t>(),
        index_c.numel(), [&](int64_t i, const scalar_t& element) { out[i] = element; });
  });
  return result;
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

void put_(at::TensorList levels, const at::Tensor& index, const at::Tensor& source) {
  compute_dtype("levels", levels);
  TORCH_CHECK(index.numel() == source.numel(), "source must have as many elements as index");
  const at::Tensor index_c = index.contiguous(), source_c = source.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "put_", [&] {
    add(view_levels<scalar_t>("levels", levels, index.device()), index_c,
        source_c.const_data_ptr<at::opmath_type<scalar_t>>());
  });
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("take", take);
  m.impl("put_", put_);
}

} // namespace freeanchor
