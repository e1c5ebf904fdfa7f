// matching.take and matching.put_: elements of the levels, and their gradient.
#include <torch/library.h>

#include "errors.cuh"

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

at::Tensor take(at::TensorList levels, const at::Tensor& index) {
  raise_errors();
  const auto dtype = compute_dtype("levels", levels);
  const c10::cuda::CUDAGuard guard(index.device());
  const at::Tensor index_c = index.contiguous();
  at::Tensor result = at::empty(index.sizes(), index.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "take", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    const auto elements = view_levels<scalar_t>("levels", levels, index.device());
    if (index.numel() > 0) {
      take_kernel<scalar_t, compute_t>
          <<<num_blocks(index.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              elements, index_c.const_data_ptr<int64_t>(), index.numel(),
              result.mutable_data_ptr<compute_t>(), error_note());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  raise_errors();
  return result;
}

void put_(at::TensorList levels, const at::Tensor& index, const at::Tensor& source) {
  raise_errors();
  compute_dtype("levels", levels);
  const c10::cuda::CUDAGuard guard(index.device());
  TORCH_CHECK(
      index.numel() == source.numel() && index.device() == source.device(),
      "source must have as many elements as index, and be on its device");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "put_", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    const auto elements = view_levels<scalar_t>("levels", levels, index.device());
    if (index.numel() > 0) {
      const auto [sorted, order] =
          at::sort(index.reshape(-1), /*stable=*/true, /*dim=*/0, /*descending=*/false);
      const at::Tensor source_c = source.contiguous();
      add_kernel<scalar_t, compute_t>
          <<<num_blocks(index.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              elements, sorted.template const_data_ptr<int64_t>(),
              order.template const_data_ptr<int64_t>(), index.numel(),
              source_c.const_data_ptr<compute_t>(), error_note());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  raise_errors();
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("take", take);
  m.impl("put_", put_);
}

} // namespace freeanchor
