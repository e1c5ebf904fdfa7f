// matching.take and matching.put_: elements of the levels, and their gradient.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "dense.cuh"
#include "errors.cuh"

namespace freeanchor {
namespace {

// Blocks that scale the levels. Few, because mostly the factor is 1 and all that they do is start.
constexpr int64_t kScaleBlocks = 2048;

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

// Multiplies levels without gaps by a number that only the device knows.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const Levels<scalar_t> levels, int64_t chunks, const T* factor) {
  const T by = *factor;
  if (by == 1) {
    return;
  }
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    transform_chunk(levels, levels, chunk, [by](scalar_t x) {
      return static_cast<scalar_t>(static_cast<T>(x) * by);
    });
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
  const c10::cuda::CUDAGuard guard(levels[0].device());
  check_like("index", index, levels[0].options().dtype(at::kLong));
  const at::Tensor index_c = index.contiguous();
  at::Tensor result = at::empty(index.sizes(), levels[0].options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "take", [&] {
    using compute_t = compute_type<scalar_t>;
    const auto elements = view_levels<scalar_t>("levels", levels);
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

template <typename scalar_t, typename T>
void multiply(at::TensorList levels, const Levels<scalar_t>& elements, const at::Tensor& factor) {
  const bool dense = std::all_of(levels.begin(), levels.end(), [](const at::Tensor& x) {
    return x.is_non_overlapping_and_dense();
  });
  if (!dense) {
    for (const at::Tensor& level : levels) {
      level.copy_(level.to(factor.scalar_type()) * factor);
    }
  } else if (const int64_t chunks = num_chunks(elements)) {
    const auto blocks = static_cast<unsigned>(std::min(chunks, kScaleBlocks));
    scale_kernel<scalar_t, T><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        elements, chunks, factor.const_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void put_(
    at::TensorList levels, const at::Tensor& index, const at::Tensor& source,
    const std::optional<at::Tensor>& factor) {
  raise_errors();
  const auto dtype = compute_dtype("levels", levels);
  const c10::cuda::CUDAGuard guard(levels[0].device());
  check_like("index", index, levels[0].options().dtype(at::kLong));
  check_like("source", source, levels[0].options().dtype(dtype));
  TORCH_CHECK(index.numel() == source.numel(), "source must have as many elements as index");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "put_", [&] {
    using compute_t = compute_type<scalar_t>;
    const auto elements = view_levels<scalar_t>("levels", levels);
    if (factor) {
      multiply<scalar_t, compute_t>(levels, elements, factor->to(source.options()));
    }
    if (index.numel() > 0) {
      const auto [sorted, order] =
          at::sort(index.reshape(-1), /*stable=*/true, /*dim=*/0, /*descending=*/false);
      const at::Tensor source_c = source.contiguous();
      const auto stream = c10::cuda::getCurrentCUDAStream();
      add_kernel<scalar_t, compute_t><<<num_blocks(index.numel()), kThreads, 0, stream>>>(
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
