// levels.take and levels.put_: elements of the levels, and their gradient.
#include <torch/library.h>

#include <type_traits>
#include <unordered_map>

#include "../arguments.h"

namespace freeanchor {
namespace {

// Calls visit(i, element) for each index. Most have the anchor of the one before.
template <typename scalar_t, typename F>
void for_each(const Levels<scalar_t>& levels, const at::Tensor& index, F visit) {
  const int64_t* at = index.const_data_ptr<int64_t>();
  int64_t begin = 0, end = 0, stride = 0; // of the numbers of an anchor
  scalar_t* numbers = nullptr;
  for (int64_t i = 0; i < index.numel(); ++i) {
    if (at[i] < begin || at[i] >= end) {
      raise(0 <= at[i] && at[i] < levels.size() ? kNone : kIndex, levels.size());
      const int64_t row = at[i] / levels.depth;
      begin = row * levels.depth;
      end = begin + levels.depth;
      numbers = &levels[begin];
      stride = levels.level[levels.level_of(row % levels.anchors)].stride[4];
    }
    visit(i, numbers[(at[i] - begin) * stride]);
  }
}

struct Cpu {
  template <typename scalar_t, typename T>
  static void take(const Levels<scalar_t>& levels, const at::Tensor& index, T* out) {
    for_each(levels, index, [&](int64_t i, const scalar_t& x) { out[i] = x; });
  }

  template <typename scalar_t, typename T>
  static void put(const Levels<scalar_t>& levels, const at::Tensor& index, const T* source) {
    std::unordered_map<scalar_t*, T> sums; // of half precision, to be rounded once
    for_each(levels, index, [&](int64_t i, scalar_t& x) {
      if constexpr (std::is_same_v<scalar_t, T>) {
        x += source[i];
      } else {
        sums.try_emplace(&x, x).first->second += source[i];
      }
    });
    for (const auto& [x, sum] : sums) {
      *x = static_cast<scalar_t>(sum);
    }
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("take", take<Cpu>);
  m.impl("put_", put_<Cpu>);
}

} // namespace freeanchor
