// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory,
// as if P{a in A+} were 0 everywhere. The few cells where it is not are put right afterwards.
//
// Sums are in double precision and in an order that depends on the sizes only.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "../focal.h"
#include "box_prob.cuh"
#include "dense.cuh"

namespace freeanchor {
namespace {

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
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) dense_kernel(
    const Levels<scalar_t> logits, const Levels<scalar_t> grads, T gamma, const T* grad_scale,
    double* sums) {
  const T by = *grad_scale;
  double sum = 0;
  transform_chunk(logits, grads, blockIdx.x, [&](scalar_t logit) {
    const Term<T> term = background_term<true>(static_cast<T>(logit), gamma, gamma == 2);
    sum += term.value;
    return static_cast<scalar_t>(term.slope * by);
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
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) cell_kernel(
    const Batch<scalar_t, T> batch, const Levels<scalar_t> logits, const GradLevels<scalar_t> grads,
    const T* highest, const int* any, T gamma, const T* grad_scale, double* sums) {
  double difference = 0;
  if (any[blockIdx.x]) {
    for_each_cell(batch, highest, logits.depth, [&](int64_t cell, T prob) {
      const scalar_t& logit = logits[cell];
      const T x = static_cast<T>(logit);
      const Term<T> term = matched_term(x, prob, gamma);
      difference +=
          static_cast<double>(term.value) - background_term<true>(x, gamma, gamma == 2).value;
      const int l =
          static_cast<int>(&logits.level_of(cell / logits.depth % logits.anchors) - logits.level);
      if (grads.data[l]) {
        grads.data[l][&logit - logits.level[l].data] =
            static_cast<scalar_t>(term.slope * *grad_scale);
      }
    });
  }
  difference = block_sum(difference);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = difference;
  }
}

template <typename scalar_t, typename T>
void launch(
    const Batch<scalar_t, T>& batch, const Levels<scalar_t>& logits, const Levels<scalar_t>& grads,
    T gamma, const at::Tensor& scale, const at::Tensor& grad_scale, at::Tensor& loss,
    at::Tensor& max_iou) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t dense = num_chunks(logits);
  const int64_t matching =
      batch.objects.count > 0 ? batch.deltas.images * batch.blocks_per_image() : 0;
  const at::Tensor sums = at::empty({dense + matching}, scale.options().dtype(at::kDouble));
  const at::Tensor any = at::empty({matching}, scale.options().dtype(at::kInt));
  double* sum = sums.mutable_data_ptr<double>();
  const T* by = grad_scale.const_data_ptr<T>();
  if (dense > 0) {
    dense_kernel<<<dense, kThreads, 0, stream>>>(logits, grads, gamma, by, sum);
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
    cell_kernel<<<matching, kThreads, 0, stream>>>(
        batch, logits, grad_levels, highest, any.const_data_ptr<int>(), gamma, by, sum + dense);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  loss = (sums.sum() * scale).to(scale.scalar_type());
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
  at::Tensor loss;
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
        const Levels<T> anchor_levels = view_anchors<T>(anchor_tensors, /*grids=*/false);
        for (int l = 0; l < anchor_levels.count; ++l) {
          batch.anchors[l] = boxes_of(anchor_levels.level[l]);
        }
        std::copy_n(coding.begin(), 4, batch.weights);
        batch.scale_clamp = coding[4];
        batch.threshold = threshold;
        check_values<T>(batch.objects, anchor_levels, levels.depth, levels.images);
        launch<scalar_t, T>(batch, levels, grad_levels, gamma, scale, grad_scale, loss, max_iou);
      });
  raise_errors();
  return {loss, max_iou};
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("negative_bag_loss", negative_bag_loss);
}

} // namespace freeanchor
