// levels.take and levels.put_: elements of the levels, and their gradient.
#include <torch/library.h>

#include "kernel.cuh"

namespace freeanchor {
namespace {

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) take_kernel(
    const Levels<scalar_t> levels, const int64_t* index, int64_t count, T* out, int64_t* note) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) {
    return;
  }
  const bool valid = 0 <= index[i] && index[i] < levels.size();
  out[i] = valid ? static_cast<T>(levels[index[i]]) : 0;
  if (!valid) {
    report(note, kIndex, levels.size());
  }
}

// Adds the sources of equal indices, which are next to each other in `index`, in their order.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) add_kernel(
    const Levels<scalar_t> levels, const int64_t* index, const int64_t* order, int64_t count,
    const T* source, int64_t* note) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count || (i > 0 && index[i - 1] == index[i])) {
    return;
  }
  if (!(0 <= index[i] && index[i] < levels.size())) {
    report(note, kIndex, levels.size());
    return;
  }
  scalar_t& element = levels[index[i]];
  T sum = static_cast<T>(element);
  for (int64_t same = i; same < count && index[same] == index[i]; ++same) {
    sum += source[order[same]];
  }
  element = static_cast<scalar_t>(sum);
}

struct Cuda {
  template <typename scalar_t, typename T>
  static void take(const Levels<scalar_t>& levels, const at::Tensor& index, T* out) {
    const c10::cuda::CUDAGuard guard(index.device());
    launch(
        take_kernel<scalar_t, T>, num_blocks(index.numel()), levels,
        index.const_data_ptr<int64_t>(), index.numel(), out, error_note());
    raise_errors();
  }

  template <typename scalar_t, typename T>
  static void put(const Levels<scalar_t>& levels, const at::Tensor& index, const T* source) {
    const c10::cuda::CUDAGuard guard(index.device());
    const auto [sorted, order] =
        at::sort(index.reshape(-1), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    launch(
        add_kernel<scalar_t, T>, num_blocks(index.numel()), levels,
        sorted.template const_data_ptr<int64_t>(), order.template const_data_ptr<int64_t>(),
        index.numel(), source, error_note());
    raise_errors();
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("take", take<Cuda>);
  m.impl("put_", put_<Cuda>);
}

} // namespace freeanchor
