// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory,
// as if P{a in A+} were 0 everywhere. The few cells where it is not are put right afterwards.
//
// Sums are in double precision and in an order that depends on the sizes only.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "box_prob.cuh"
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
    const Levels<scalar_t> logits, const Levels<scalar_t> grads, T gamma, const T* grad_scale,
    double* sums) {
  const T by = *grad_scale;
  double sum = 0;
  transform_chunk(logits, grads, blockIdx.x, [&](scalar_t logit) {
    const Background<T> b(static_cast<T>(logit));
    const T p_gamma = power<square>(b.p, gamma);
    sum += p_gamma * b.nll;
    return static_cast<scalar_t>(p_gamma * std::fma(gamma * b.not_p, b.nll, b.p) * by);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

// Where the gradients of a level begin, which lie as its logits do.
template <typename scalar_t>
struct GradLevels {
  scalar_t* data[kMaxLevels];
};

// Puts right the sum and the gradients of the cells: a thread per prediction.
template <bool square, typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) cell_kernel(
    const Batch<scalar_t, T> batch, const Levels<scalar_t> logits, const GradLevels<scalar_t> grads,
    const T* highest, const int* any, T gamma, const T* grad_scale, double* sums) {
  double difference = 0;
  if (any[blockIdx.x]) {
    for_each_cell(batch, highest, logits.depth, [&](int64_t cell, T prob) {
      const scalar_t& logit = logits[cell];
      const Background<T> b(static_cast<T>(logit));
      const T q = b.p * (1 - prob), not_q = b.not_p + b.p * prob;
      const T nll = q < T(0.5) ? -std::log1p(-q) : -std::log(not_q);
      const T q_gamma = power<square>(q, gamma);
      // The terms are rounded as that of the dense sum, so that it cancels.
      const T wanted = q_gamma * nll, counted = power<square>(b.p, gamma) * b.nll;
      difference += static_cast<double>(wanted) - counted;
      const int l =
          static_cast<int>(&logits.level_of(cell / logits.depth % logits.anchors) - logits.level);
      if (grads.data[l]) {
        const T slope = q_gamma * b.not_p * (gamma * nll + q / not_q);
        grads.data[l][&logit - logits.level[l].data] = static_cast<scalar_t>(slope * *grad_scale);
      }
    });
  }
  difference = block_sum(difference);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = difference;
  }
}

// One block.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* sums, int64_t count, const T* scale, T* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) {
    sum += sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *loss = static_cast<T>(sum * *scale);
  }
}

template <bool square, typename scalar_t, typename T>
void launch(
    const Batch<scalar_t, T>& batch, const Levels<scalar_t>& logits, const Levels<scalar_t>& grads,
    T gamma, const at::Tensor& scale, const at::Tensor& grad_scale, at::Tensor& loss,
    at::Tensor& max_iou) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t dense = num_chunks(logits);
  const int64_t matching =
      batch.objects.count > 0 ? batch.deltas.images * batch.blocks_per_image() : 0;
  const at::Tensor sums = at::empty({dense + matching}, loss.options().dtype(at::kDouble));
  const at::Tensor any = at::empty({matching}, loss.options().dtype(at::kInt));
  double* sum = sums.mutable_data_ptr<double>();
  const T* by = grad_scale.const_data_ptr<T>();
  if (dense > 0) {
    dense_kernel<square><<<dense, kThreads, 0, stream>>>(logits, grads, gamma, by, sum);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (matching > 0) {
    T* highest = max_iou.mutable_data_ptr<T>();
    highest_kernel<<<matching, kThreads, 0, stream>>>(batch, highest, any.mutable_data_ptr<int>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    GradLevels<scalar_t> grad_levels{};
    for (int l = 0; l < grads.count; ++l) {
      grad_levels.data[l] = grads.level[l].data;
    }
    cell_kernel<square><<<matching, kThreads, 0, stream>>>(
        batch, logits, grad_levels, highest, any.const_data_ptr<int>(), gamma, by, sum + dense);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  finish_kernel<<<1, kFinishThreads, 0, stream>>>(
      sum, sums.numel(), scale.const_data_ptr<T>(), loss.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> negative_bag_loss(
    at::TensorList logits, at::TensorList deltas, at::TensorList anchors,
    const at::Tensor& gt_boxes, const at::Tensor& gt_classes, const at::Tensor& gt_images,
    at::ArrayRef<double> coding, double threshold, double gamma, const at::Tensor& scale,
    const at::Tensor& grad_scale, at::TensorList grads) {
  raise_errors();
  const std::vector<at::Tensor> anchor_tensors = check_negative_bag_loss(
      logits, deltas, anchors, gt_boxes, gt_classes, gt_images, coding, scale, grad_scale, grads);
  const c10::cuda::CUDAGuard guard(logits[0].device());
  const at::Tensor boxes = gt_boxes.contiguous(), classes = gt_classes.contiguous(),
                   images = gt_images.contiguous();
  at::Tensor loss = at::empty({}, scale.options());
  at::Tensor max_iou = at::zeros({boxes.size(0)}, boxes.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits[0].scalar_type(), "negative_bag_loss", [&] {
        using T = compute_type<scalar_t>;
        const auto levels = view_levels<scalar_t>("logits", logits);
        const auto grad_levels =
            grads.empty() ? Levels<scalar_t>{} : view_levels<scalar_t>("grads", grads);
        Batch<scalar_t, T> batch;
        batch.deltas = view_levels<scalar_t>("deltas", deltas);
        batch.objects = {
            reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>()),
            classes.const_data_ptr<int64_t>(), images.const_data_ptr<int64_t>(), boxes.size(0)};
        const AnchorLevels<T> anchor_levels(anchor_tensors, /*grids=*/false);
        for (int l = 0; l < anchor_levels.count; ++l) {
          batch.anchors[l] = anchor_levels.level[l].data;
        }
        std::copy_n(coding.begin(), 4, batch.weights);
        batch.scale_clamp = coding[4];
        batch.threshold = threshold;
        check_values<T>(batch.objects, anchor_levels, levels.depth, levels.images);
        const auto run = gamma == 2 ? launch<true, scalar_t, T> : launch<false, scalar_t, T>;
        run(batch, levels, grad_levels, gamma, scale, grad_scale, loss, max_iou);
      });
  raise_errors();
  return {loss, max_iou};
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("negative_bag_loss", negative_bag_loss);
}

} // namespace freeanchor
