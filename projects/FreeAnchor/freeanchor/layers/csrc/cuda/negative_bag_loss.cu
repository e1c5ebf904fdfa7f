// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory.
//
// Sums are in double precision and in an order that depends on the sizes only.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../checks.h"
#include "dense.cuh"

namespace freeanchor {
namespace {

constexpr int kFinishThreads = 1024;

// log(1 + e) for e in [0, 1]: the polynomial of cpu/negative_bag_loss.cpp. The function of CUDA
// takes any e and has twice as many instructions, which would bound the speed, not the memory.
__device__ float log1p_unit(float e) {
  float p = -3.176057010e-3f;
  p = std::fma(p, e, 1.954252722e-2f);
  p = std::fma(p, e, -5.637361275e-2f);
  p = std::fma(p, e, 1.054362379e-1f);
  p = std::fma(p, e, -1.526966707e-1f);
  p = std::fma(p, e, 1.966327426e-1f);
  p = std::fma(p, e, -2.495161626e-1f);
  p = std::fma(p, e, 3.332971050e-1f);
  p = std::fma(p, e, -4.999989265e-1f);
  p = std::fma(p, e, 1.0f);
  return p * e;
}
__device__ double log1p_unit(double e) {
  return std::log1p(e);
}

// 1 / x for x in [1, 2], to one unit in the last place.
__device__ float reciprocal(float x) {
  return __fdividef(1, x);
}
__device__ double reciprocal(double x) {
  return 1 / x;
}

// p = sigmoid(x), 1 - p and -log(1 - p) without cancellation.
template <typename T>
struct Background {
  T p, not_p, nll;

  __device__ explicit Background(T x) {
    const T e = std::exp(-std::abs(x)), r = reciprocal(1 + e);
    p = x >= 0 ? r : e * r;
    not_p = x >= 0 ? e * r : r;
    nll = (x > 0 ? x : 0) + log1p_unit(e);
  }
};

// `square` says that gamma is 2.
template <bool square, typename T>
__device__ T power(T base, T gamma) {
  return square ? base * base : std::pow(base, gamma);
}

// The sum over the threads of the block, in thread 0.
__device__ double block_sum(double sum) {
  __shared__ double sums[32];
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_down_sync(kAllLanes, sum, lanes);
  }
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / 32; ++warp) {
      sum += sums[warp];
    }
  }
  return sum;
}

// The loss and the gradient as if P{a in A+} were 0 everywhere: a block per chunk of the logits.
template <bool square, typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) dense_kernel(
    const Levels<scalar_t> logits, const Levels<scalar_t> grads, T gamma, T grad_scale,
    double* sums) {
  double sum = 0;
  transform_chunk(logits, grads, blockIdx.x, [&](scalar_t logit) {
    const Background<T> b(static_cast<T>(logit));
    const T p_gamma = power<square>(b.p, gamma);
    sum += p_gamma * b.nll;
    return static_cast<scalar_t>(
        p_gamma * std::fma(gamma * b.not_p, b.nll, b.p) * grad_scale);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

// Puts right the sum and the gradients of the cells, and gathers the bags.
template <bool square, typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) sparse_kernel(
    const Levels<scalar_t> logits, const Levels<scalar_t> grads, const int64_t* cells,
    const T* prob, int64_t num_cells, const int64_t* bag, int64_t num_bag, T gamma, T grad_scale,
    double* sums, T* bag_logits) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < num_bag) {
    CUDA_KERNEL_ASSERT(0 <= bag[i] && bag[i] < logits.size());
    bag_logits[i] = static_cast<T>(logits[bag[i]]);
  }
  double difference = 0;
  if (i < num_cells) {
    CUDA_KERNEL_ASSERT(0 <= cells[i] && cells[i] < logits.size());
    const Background<T> b(static_cast<T>(logits[cells[i]]));
    const T q = b.p * (1 - prob[i]), not_q = b.not_p + b.p * prob[i];
    const T nll = q < T(0.5) ? -std::log1p(-q) : -std::log(not_q);
    const T q_gamma = power<square>(q, gamma);
    // The terms are rounded as that of the dense sum, so that it cancels.
    const T wanted = q_gamma * nll, counted = power<square>(b.p, gamma) * b.nll;
    difference = static_cast<double>(wanted) - counted;
    if (grads.count > 0) {
      grads[cells[i]] =
          static_cast<scalar_t>(q_gamma * b.not_p * (gamma * nll + q / not_q) * grad_scale);
    }
  }
  difference = block_sum(difference);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = difference;
  }
}

// One block.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* sums, int64_t count, double scale, T* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) {
    sum += sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *loss = static_cast<T>(sum * scale);
  }
}

template <bool square, typename scalar_t, typename T>
void launch(
    const Levels<scalar_t>& logits, const Levels<scalar_t>& grads, const at::Tensor& cells,
    const at::Tensor& prob, const at::Tensor& bag, T gamma, double scale, T grad_scale,
    at::Tensor& loss, at::Tensor& bag_logits) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t dense = num_chunks(logits);
  const int64_t sparse = num_blocks(std::max(cells.numel(), bag.numel()));
  const at::Tensor sums = at::empty({dense + sparse}, loss.options().dtype(at::kDouble));
  double* sum = sums.mutable_data_ptr<double>();
  if (dense > 0) {
    dense_kernel<square><<<dense, kThreads, 0, stream>>>(logits, grads, gamma, grad_scale, sum);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (sparse > 0) {
    sparse_kernel<square><<<sparse, kThreads, 0, stream>>>(
        logits, grads, cells.const_data_ptr<int64_t>(), prob.const_data_ptr<T>(), cells.numel(),
        bag.const_data_ptr<int64_t>(), bag.numel(), gamma, grad_scale, sum + dense,
        bag_logits.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  finish_kernel<<<1, kFinishThreads, 0, stream>>>(
      sum, sums.numel(), scale, loss.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> negative_bag_loss(
    at::TensorList logits, const at::Tensor& cells, const at::Tensor& prob, const at::Tensor& bag,
    double gamma, double scale, double grad_scale, at::TensorList grads) {
  const auto dtype = compute_dtype("logits", logits);
  const c10::cuda::CUDAGuard guard(logits[0].device());
  check_device("cells", cells, logits[0]);
  check_device("prob", prob, logits[0]);
  check_device("bag", bag, logits[0]);
  check_dense(logits, grads);
  TORCH_CHECK(
      prob.numel() == cells.numel() && prob.scalar_type() == dtype,
      "prob must have as many elements as cells, and the dtype of the loss");
  at::Tensor loss = at::empty({}, logits[0].options().dtype(dtype));
  at::Tensor bag_logits = at::empty(bag.sizes(), loss.options());
  const at::Tensor cells_c = cells.contiguous(), prob_c = prob.contiguous(),
                   bag_c = bag.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits[0].scalar_type(), "negative_bag_loss", [&] {
        using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto levels = view_levels<scalar_t>("logits", logits);
        const auto grad_levels =
            grads.empty() ? Levels<scalar_t>{} : view_levels<scalar_t>("grads", grads);
        const auto run = gamma == 2 ? launch<true, scalar_t, compute_t>
                                    : launch<false, scalar_t, compute_t>;
        run(levels, grad_levels, cells_c, prob_c, bag_c, gamma, scale, grad_scale, loss,
            bag_logits);
      });
  return {loss, bag_logits};
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("negative_bag_loss", negative_bag_loss);
}

} // namespace freeanchor
