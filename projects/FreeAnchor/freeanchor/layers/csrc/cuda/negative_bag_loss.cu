// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory,
// as if P{a in A+} were 0 everywhere. The few cells where it is not are put right afterwards.
//
// Sums are in double precision and in an order that depends on the sizes only.
#include <torch/library.h>

#include "../focal.h"
#include "box_prob.cuh"

namespace freeanchor {
namespace {

// The sum over the threads of the block, in thread 0.
__device__ double block_sum(double sum) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
  }
  return sums[threadIdx.x];
}

// What is loaded and stored at a time: 16 bytes.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t element[kSize];
};

// Elements per block.
template <typename scalar_t>
constexpr int64_t kChunk = 4 * kThreads * Vector<scalar_t>::kSize;

// The loss and the gradient of a level as if P{a in A+} were 0 everywhere. `grads` is null if the
// gradient is not wanted.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) dense_kernel(
    const scalar_t* logits, scalar_t* grads, int64_t elements, T gamma, const T* grad_scale,
    double* sums) {
  const T by = *grad_scale;
  double sum = 0;
  const auto slope = [&](scalar_t logit) {
    const Term<T> term = background_term(static_cast<T>(logit), gamma, gamma == 2);
    sum += term.value;
    return static_cast<scalar_t>(term.slope * by);
  };
  const int64_t begin = blockIdx.x * kChunk<scalar_t>, left = elements - begin;
  const int size = static_cast<int>(left < kChunk<scalar_t> ? left : kChunk<scalar_t>);
  const scalar_t* x = logits + begin;
  scalar_t* y = grads ? grads + begin : nullptr;
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
  const int vectors = aligned ? size / Vector<scalar_t>::kSize : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    Vector<scalar_t> vector = reinterpret_cast<const Vector<scalar_t>*>(x)[i];
#pragma unroll
    for (scalar_t& element : vector.element) {
      element = slope(element);
    }
    if (y) {
      reinterpret_cast<Vector<scalar_t>*>(y)[i] = vector;
    }
  }
  for (int i = vectors * Vector<scalar_t>::kSize + threadIdx.x; i < size; i += kThreads) {
    const scalar_t element = slope(x[i]);
    if (y) {
      y[i] = element;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

// Puts right the sum and the gradients of the cells: a thread per prediction.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) cell_kernel(
    const Loss<scalar_t> loss, const Matching<T> matching, const T* highest, double* sums) {
  double difference = 0;
  for_each_cell(matching, highest, [&](int64_t cell, T prob) {
    const T x = static_cast<T>(loss.logits[cell]);
    const Term<T> term = matched_term(x, prob, loss.gamma);
    difference +=
        static_cast<double>(term.value) - background_term(x, loss.gamma, loss.gamma == 2).value;
    if (loss.grads.count > 0) {
      loss.grads[cell] = static_cast<scalar_t>(term.slope * *loss.grad_scale);
    }
  });
  difference = block_sum(difference);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = difference;
  }
}

struct Cuda {
  template <typename scalar_t, typename T>
  static at::Tensor
  run(const Loss<scalar_t>& loss, const Matching<T>& matching, const at::Tensor& max_iou) {
    const c10::cuda::CUDAGuard guard(max_iou.device());
    check_on_device(matching.objects, matching.anchors);
    const Levels<scalar_t>& logits = loss.logits;
    const auto chunks = [&](int l) {
      return (logits.size_of(l) + kChunk<scalar_t> - 1) / kChunk<scalar_t>;
    };
    const int64_t matching_blocks =
        matching.objects.count > 0 ? logits.images * num_blocks(logits.anchors) : 0;
    int64_t blocks = matching_blocks;
    for (int l = 0; l < logits.count; ++l) {
      blocks += chunks(l);
    }
    const at::Tensor sums = at::empty({blocks}, max_iou.options().dtype(at::kDouble));
    double* sum = sums.mutable_data_ptr<double>();
    for (int l = 0; l < logits.count; ++l) {
      launch(
          dense_kernel<scalar_t, T>, chunks(l), logits.level[l].data, loss.grads.level[l].data,
          logits.size_of(l), loss.gamma, loss.grad_scale, sum);
      sum += chunks(l);
    }
    T* highest = max_iou.mutable_data_ptr<T>();
    launch(highest_kernel<T>, matching_blocks, matching, highest);
    launch(cell_kernel<scalar_t, T>, matching_blocks, loss, matching, highest, sum);
    raise_errors();
    return sums.sum();
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("negative_bag_loss", negative_bag_loss<Cuda>);
}

} // namespace freeanchor
