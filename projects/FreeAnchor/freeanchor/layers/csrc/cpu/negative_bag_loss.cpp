// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory,
// as if P{a in A+} were 0 everywhere. The few cells where it is not are put right afterwards.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../focal.h"
#include "../levels.h"
#include "box_prob.h"
#include "simd.h"

namespace freeanchor {
namespace {

// Elements per task, whose sums are added in order: the result does not depend on the number of
// threads.
constexpr int64_t kChunk = 1 << 15;
// Elements that are converted, computed and summed at a time: they stay in the first level cache.
constexpr int64_t kBlock = 1024;

// The values and slopes of a block. `square` says that gamma is 2; without `grad` there are no
// slopes.
template <bool fma, bool square, bool grad, typename T>
FREEANCHOR_INLINE void background_loop(
    const T* __restrict x, T* __restrict value, T* __restrict slope, int64_t n, T gamma,
    T grad_scale) {
  for (int64_t i = 0; i < n; ++i) {
    const Term<T> term = background_term<fma>(x[i], gamma, square);
    value[i] = term.value;
    if constexpr (grad) {
      slope[i] = term.slope * grad_scale;
    }
  }
}

// The sum of the values of a block. `slope` is null if the gradient is not wanted.
template <typename T>
double background_block(const T* x, T* slope, int64_t n, T gamma, T grad_scale) {
  return simd([=](auto fma) FREEANCHOR_INLINE_LAMBDA {
    alignas(64) T value[kBlock];
    if (gamma == 2) {
      slope ? background_loop<fma, true, true>(x, value, slope, n, gamma, grad_scale)
            : background_loop<fma, true, false>(x, value, slope, n, gamma, grad_scale);
    } else {
      slope ? background_loop<fma, false, true>(x, value, slope, n, gamma, grad_scale)
            : background_loop<fma, false, false>(x, value, slope, n, gamma, grad_scale);
    }
    std::fill(value + n, value + (n + 15) / 16 * 16, T(0));
    double sums[16] = {};
    for (int64_t i = 0; i < n; i += 16) {
      for (int lane = 0; lane < 16; ++lane) {
        sums[lane] += value[i + lane];
      }
    }
    return std::accumulate(sums, sums + 16, 0.0);
  });
}

// Part of a level.
template <typename scalar_t, typename T>
double background_part(const scalar_t* x, scalar_t* slope, int64_t n, T gamma, T grad_scale) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    if constexpr (std::is_same_v<scalar_t, T>) {
      sum += background_block(x + begin, slope ? slope + begin : nullptr, size, gamma, grad_scale);
    } else {
      T input[kBlock], output[kBlock];
      std::copy_n(x + begin, size, input);
      sum += background_block(input, slope ? output : nullptr, size, gamma, grad_scale);
      if (slope) {
        std::copy_n(output, size, slope + begin);
      }
    }
  }
  return sum;
}

// The sum over all levels, and the gradient if there are levels for it.
template <typename scalar_t, typename T>
double background_sum(
    at::TensorList logits, const Levels<scalar_t>& levels, const Levels<scalar_t>& grads, T gamma,
    T grad_scale) {
  std::vector<int64_t> first_chunk{0}; // of each level, and where the last one ends
  for (const at::Tensor& level : logits) {
    first_chunk.push_back(first_chunk.back() + (level.numel() + kChunk - 1) / kChunk);
  }
  std::vector<double> sums(first_chunk.back());
  at::parallel_for(0, sums.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const auto above = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk);
      const int64_t l = above - first_chunk.begin() - 1;
      const int64_t offset = (chunk - first_chunk[l]) * kChunk;
      sums[chunk] = background_part<scalar_t, T>(
          levels.level[l].data + offset, grads.count ? grads.level[l].data + offset : nullptr,
          std::min(kChunk, logits[l].numel() - offset), gamma, grad_scale);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The cells were counted as plain background: puts their gradients right, and gives the difference
// to the sum.
template <typename scalar_t, typename T>
double correct_cells(
    const Levels<scalar_t>& levels, const Levels<scalar_t>& grads,
    const std::vector<Cell<T>>& cells, T gamma, T grad_scale) {
  double difference = 0;
  for (const Cell<T>& cell : cells) {
    const T x = levels[cell.index];
    const Term<T> term = matched_term(x, cell.prob, gamma);
    difference += term.value - background_block<T>(&x, nullptr, 1, gamma, 0);
    if (grads.count) {
      grads[cell.index] = term.slope * grad_scale;
    }
  }
  return difference;
}

template <typename T>
void check_values(
    const std::vector<at::Tensor>& anchors, const at::Tensor& gt_boxes, const int64_t* classes,
    const int64_t* images, int64_t num_classes, int64_t num_images) {
  check_boxes<T>("gt_boxes", gt_boxes);
  bool class_valid = true, image_valid = true;
  for (int64_t i = 0; i < gt_boxes.size(0); ++i) {
    class_valid &= 0 <= classes[i] && classes[i] < num_classes;
    image_valid &= (i > 0 ? images[i - 1] : 0) <= images[i] && images[i] < num_images;
  }
  TORCH_CHECK_VALUE(class_valid, "gt_classes", kOutOfRange, num_classes, ")");
  TORCH_CHECK_VALUE(image_valid, "gt_images", kOutOfRange, num_images, ")", kNeverDecrease);
  for (const at::Tensor& level : anchors) {
    check_boxes<T>("anchors", level);
  }
}

std::tuple<at::Tensor, at::Tensor> negative_bag_loss(
    at::TensorList logits, at::TensorList deltas, at::TensorList anchors,
    const at::Tensor& gt_boxes, const at::Tensor& gt_classes, const at::Tensor& gt_images,
    at::ArrayRef<double> coding, double threshold, double gamma, const at::Tensor& scale,
    const at::Tensor& grad_scale, at::TensorList grads) {
  const std::vector<at::Tensor> anchor_levels = check_negative_bag_loss(
      logits, deltas, anchors, gt_boxes, gt_classes, gt_images, coding, scale, grad_scale, grads);
  const at::Tensor boxes = gt_boxes.contiguous(), classes_c = gt_classes.contiguous(),
                   images_c = gt_images.contiguous();
  const auto *classes = classes_c.const_data_ptr<int64_t>(),
             *images = images_c.const_data_ptr<int64_t>();
  at::Tensor max_iou = at::empty({boxes.size(0)}, boxes.options());
  double total = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits[0].scalar_type(), "negative_bag_loss", [&] {
        using T = compute_type<scalar_t>;
        const auto levels = view_levels<scalar_t>("logits", logits);
        const auto grad_levels =
            grads.empty() ? Levels<scalar_t>{} : view_levels<scalar_t>("grads", grads);
        check_values<T>(anchor_levels, boxes, classes, images, levels.depth, levels.images);
        const auto cells = box_prob<scalar_t, T>(
            deltas, anchor_levels, boxes, classes, images, levels.depth, coding, threshold,
            max_iou.mutable_data_ptr<T>());
        const T by = grad_scale.item<T>();
        total = background_sum<scalar_t, T>(logits, levels, grad_levels, gamma, by);
        total += correct_cells<scalar_t, T>(levels, grad_levels, cells, gamma, by);
      });
  return {at::full({}, total * scale.item<double>(), scale.options()), max_iou};
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("negative_bag_loss", negative_bag_loss);
}

} // namespace freeanchor
