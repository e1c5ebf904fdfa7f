// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../checks.h"
#include "../levels.h"
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
  z = z > 87.0f ? 87.0f : z; // NaN stays
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
// and nll = -log(1 - p). `square` says that gamma is 2.
template <bool fma, bool square>
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
    const float power =
        square ? p * p : exp_minus<fma>(gamma * ((x[i] < 0 ? -x[i] : 0) + log1p_e));
    value[i] = power * nll;
    slope[i] = power * multiply_add<fma>(gamma * not_p, nll, p) * grad_scale;
  }
}

// The sum of the values of a block.
template <bool fma>
FREEANCHOR_INLINE double background_block(
    const float* x, float* slope, int64_t n, float gamma, float grad_scale) {
  alignas(64) float value[kBlock];
  if (gamma == 2) {
    background_loop<fma, true>(x, value, slope, n, gamma, grad_scale);
  } else {
    background_loop<fma, false>(x, value, slope, n, gamma, grad_scale);
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
    double, background,
    (const float* x, float* slope, int64_t n, float gamma, float grad_scale), background_block, x,
    slope, n, gamma, grad_scale)

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
    slope[i] = power * (gamma * not_p * nll + p) * grad_scale;
  }
  return sum;
}

// Part of a level: `slope` is null if the gradient is not wanted.
template <typename scalar_t, typename compute_t>
double background_part(
    const scalar_t* x, scalar_t* slope, int64_t n, compute_t gamma, compute_t grad_scale) {
  compute_t input[kBlock], output[kBlock];
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    if constexpr (std::is_same_v<scalar_t, compute_t>) {
      sum += background(x + begin, slope ? slope + begin : output, size, gamma, grad_scale);
    } else {
      std::copy_n(x + begin, size, input);
      sum += background(input, output, size, gamma, grad_scale);
      if (slope) {
        std::copy_n(output, size, slope + begin);
      }
    }
  }
  return sum;
}

// The cells with P{a in A+} > 0 were counted as plain background: their gradients are put right,
// and the difference to the sum is returned.
template <typename scalar_t, typename compute_t>
double correct_cells(
    const Levels<scalar_t>& levels, const Levels<scalar_t>* grads, const int64_t* cells,
    const compute_t* prob, int64_t count, compute_t gamma, compute_t grad_scale) {
  double difference = 0;
  levels.for_each("cells", cells, count, [&](int64_t s, const scalar_t& logit) {
    const compute_t x = logit;
    compute_t unused;
    difference -= background(&x, &unused, 1, gamma, compute_t(0));
    const compute_t e = std::exp(-std::abs(x));
    const compute_t p = x >= 0 ? 1 / (1 + e) : e / (1 + e);
    const compute_t not_p = x >= 0 ? e / (1 + e) : 1 / (1 + e);
    const compute_t q = p * (1 - prob[s]), not_q = not_p + p * prob[s];
    const compute_t nll = q < compute_t(0.5) ? -std::log1p(-q) : -std::log(not_q);
    const compute_t power = std::pow(q, gamma);
    difference += static_cast<double>(power) * nll;
    if (grads) {
      (*grads)[cells[s]] = power * not_p * (gamma * nll + q / not_q) * grad_scale;
    }
  });
  return difference;
}

std::tuple<at::Tensor, at::Tensor> negative_bag_loss(
    at::TensorList logits, const at::Tensor& cells, const at::Tensor& prob, const at::Tensor& bag,
    double gamma, double scale, double grad_scale, at::TensorList grads) {
  check_dense(logits, grads);
  std::vector<int64_t> first_chunk;
  int64_t chunks = 0;
  for (const at::Tensor& level : logits) {
    first_chunk.push_back(chunks);
    chunks += (level.numel() + kChunk - 1) / kChunk;
  }
  const auto cells_c = cells.contiguous(), prob_c = prob.contiguous(), bag_c = bag.contiguous();
  const auto dtype = compute_dtype("logits", logits);
  TORCH_CHECK(
      prob.numel() == cells.numel() && prob.scalar_type() == dtype,
      "prob must have as many elements as cells, and the dtype of the loss");
  at::Tensor bag_logits = at::empty(bag.sizes(), logits[0].options().dtype(dtype));
  double total = 0;

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits[0].scalar_type(), "negative_bag_loss", [&] {
        using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto levels = view_levels<scalar_t>("logits", logits);
        const auto grad_levels =
            grads.empty() ? Levels<scalar_t>{} : view_levels<scalar_t>("grads", grads);
        std::vector<double> sums(chunks);
        at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
          for (int64_t chunk = begin; chunk < end; ++chunk) {
            const auto l =
                std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - 1 -
                first_chunk.begin();
            const int64_t offset = (chunk - first_chunk[l]) * kChunk;
            sums[chunk] = background_part<scalar_t, compute_t>(
                levels.level[l].data + offset,
                grads.empty() ? nullptr : grad_levels.level[l].data + offset,
                std::min(kChunk, logits[l].numel() - offset), gamma, grad_scale);
          }
        });
        for (double sum : sums) {
          total += sum;
        }
        total += correct_cells<scalar_t, compute_t>(
            levels, grads.empty() ? nullptr : &grad_levels, cells_c.const_data_ptr<int64_t>(),
            prob_c.const_data_ptr<compute_t>(), cells.numel(), gamma, grad_scale);
        compute_t* out = bag_logits.mutable_data_ptr<compute_t>();
        levels.for_each(
            "bag", bag_c.const_data_ptr<int64_t>(), bag.numel(),
            [&](int64_t i, const scalar_t& logit) { out[i] = logit; });
      });
  const at::Tensor loss = at::full({}, total * scale, bag_logits.options());
  return {loss, bag_logits};
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("negative_bag_loss", negative_bag_loss);
}

} // namespace freeanchor
