// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory,
// as if P{a in A+} were 0 everywhere. The few cells where it is not are put right afterwards.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "../checks.h"
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

template <bool fma>
FREEANCHOR_INLINE float multiply_add(float a, float b, float c) {
  if constexpr (fma) {
    return __builtin_fmaf(a, b, c);
  } else {
    return a * b + c;
  }
}

// exp(-z) for z >= 0, to two units in the last place. Above 87, where the result is below 2^-125,
// that of 87.
template <bool fma>
FREEANCHOR_INLINE float exp_minus(float z) {
  z = z > 87.0f ? 87.0f : z;            // NaN stays
  constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = multiply_add<fma>(z, -1.44269504f, kRound);
  const float n = shifted - kRound;
  // exp(-z) = 2^n exp(r) with |r| <= log(2) / 2; log(2) in two parts
  float r = multiply_add<fma>(n, -0.693145752f, -z);
  r = multiply_add<fma>(n, -1.42860677e-6f, r);
  // Interpolation at the Chebyshev nodes, relative error 3e-9
  float p = 1.394121298e-3f;
  p = multiply_add<fma>(p, r, 8.375210201e-3f);
  p = multiply_add<fma>(p, r, 4.166635164e-2f);
  p = multiply_add<fma>(p, r, 1.666641451e-1f);
  p = multiply_add<fma>(p, r, 0.5f);
  p = multiply_add<fma>(p, r, 1.0f);
  p = multiply_add<fma>(p, r, 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u; // 2^n: the low bits of `shifted` are those of n
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// log(1 + e) for e in [0, 1], to two units in the last place.
template <bool fma>
FREEANCHOR_INLINE float log1p_unit(float e) {
  // log(1 + e) / e interpolated at the Chebyshev nodes, relative error 5e-9
  float p = -3.176057010e-3f;
  p = multiply_add<fma>(p, e, 1.954252722e-2f);
  p = multiply_add<fma>(p, e, -5.637361275e-2f);
  p = multiply_add<fma>(p, e, 1.054362379e-1f);
  p = multiply_add<fma>(p, e, -1.526966707e-1f);
  p = multiply_add<fma>(p, e, 1.966327426e-1f);
  p = multiply_add<fma>(p, e, -2.495161626e-1f);
  p = multiply_add<fma>(p, e, 3.332971050e-1f);
  p = multiply_add<fma>(p, e, -4.999989265e-1f);
  p = multiply_add<fma>(p, e, 1.0f);
  return p * e;
}

// For each logit x: value = p^gamma * nll and slope = grad_scale * dvalue/dx, where p = sigmoid(x)
// and nll = -log(1 - p). `square` says that gamma is 2; without `grad` there are no slopes.
template <bool fma, bool square, bool grad>
FREEANCHOR_INLINE void background_loop(
    const float* __restrict x, float* __restrict value, float* __restrict slope, int64_t n,
    float gamma, float grad_scale) {
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_minus<fma>(x[i] < 0 ? -x[i] : x[i]);
    const float log1p_e = log1p_unit<fma>(e);
    const float nll = (x[i] > 0 ? x[i] : 0) + log1p_e;
    const float r = 1 / (1 + e);
    const float p = x[i] >= 0 ? r : e * r;
    const float not_p = x[i] >= 0 ? e * r : r;
    // p^gamma = exp(gamma * log(p)) with -log(p) = max(-x, 0) + log1p(e)
    const float power = square ? p * p : exp_minus<fma>(gamma * ((x[i] < 0 ? -x[i] : 0) + log1p_e));
    value[i] = power * nll;
    if constexpr (grad) {
      slope[i] = power * multiply_add<fma>(gamma * not_p, nll, p) * grad_scale;
    }
  }
}

// The sum of the values of a block. `slope` is null if the gradient is not wanted.
template <bool fma>
FREEANCHOR_INLINE double
background_block(const float* x, float* slope, int64_t n, float gamma, float grad_scale) {
  alignas(64) float value[kBlock];
  if (gamma == 2) {
    slope ? background_loop<fma, true, true>(x, value, slope, n, gamma, grad_scale)
          : background_loop<fma, true, false>(x, value, slope, n, gamma, grad_scale);
  } else {
    slope ? background_loop<fma, false, true>(x, value, slope, n, gamma, grad_scale)
          : background_loop<fma, false, false>(x, value, slope, n, gamma, grad_scale);
  }
  std::fill(value + n, value + (n + 15) / 16 * 16, 0.0f);
  double sums[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    for (int lane = 0; lane < 16; ++lane) {
      sums[lane] += value[i + lane];
    }
  }
  double sum = 0;
  for (double lane : sums) {
    sum += lane;
  }
  return sum;
}

FREEANCHOR_SIMD(
    double, background, (const float* x, float* slope, int64_t n, float gamma, float grad_scale),
    background_block, x, slope, n, gamma, grad_scale)

// The same in double precision, for tests of the gradient.
double background(const double* x, double* slope, int64_t n, double gamma, double grad_scale) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double e = std::exp(-std::abs(x[i])), log1p_e = std::log1p(e);
    const double nll = std::max(x[i], 0.0) + log1p_e;
    const double p = x[i] >= 0 ? 1 / (1 + e) : e / (1 + e);
    const double not_p = x[i] >= 0 ? e / (1 + e) : 1 / (1 + e);
    const double power = std::exp(-gamma * (std::max(-x[i], 0.0) + log1p_e));
    sum += power * nll;
    if (slope) {
      slope[i] = power * (gamma * not_p * nll + p) * grad_scale;
    }
  }
  return sum;
}

// Part of a level.
template <typename scalar_t, typename T>
double background_part(const scalar_t* x, scalar_t* slope, int64_t n, T gamma, T grad_scale) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    if constexpr (std::is_same_v<scalar_t, T>) {
      sum += background(x + begin, slope ? slope + begin : nullptr, size, gamma, grad_scale);
    } else {
      T input[kBlock], output[kBlock];
      std::copy_n(x + begin, size, input);
      sum += background(input, slope ? output : nullptr, size, gamma, grad_scale);
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
    const T x = levels[cell.index], prob = cell.prob;
    difference -= background(&x, static_cast<T*>(nullptr), 1, gamma, T(0));
    const T e = std::exp(-std::abs(x));
    const T p = x >= 0 ? 1 / (1 + e) : e / (1 + e);
    const T not_p = x >= 0 ? e / (1 + e) : 1 / (1 + e);
    const T q = p * (1 - prob), not_q = not_p + p * prob;
    const T nll = q < T(0.5) ? -std::log1p(-q) : -std::log(not_q);
    const T power = std::pow(q, gamma);
    difference += static_cast<double>(power) * nll;
    if (grads.count) {
      grads[cell.index] = power * not_p * (gamma * nll + q / not_q) * grad_scale;
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
