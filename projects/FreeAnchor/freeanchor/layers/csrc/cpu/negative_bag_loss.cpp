// losses.negative_bag_loss: value and gradient in one pass over the logits, as they lie in memory,
// as if P{a in A+} were 0 everywhere. The few cells where it is not are put right afterwards.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../arguments.h"
#include "../focal.h"
#include "box_prob.h"
#include "simd.h"

namespace freeanchor {
namespace {

// Elements per task, whose sums are added in order: the result does not depend on the number of
// threads.
constexpr int64_t kChunk = 1 << 15;
// Elements that are computed and then summed: their values stay in the first level cache.
constexpr int64_t kSummed = 1024;

// The values and slopes of a block. `square` says that gamma is 2.
template <bool square, typename scalar_t, typename T>
FREEANCHOR_INLINE void background_loop(
    const scalar_t* __restrict x, T* __restrict value, scalar_t* __restrict slope, int64_t n,
    T gamma, T grad_scale) {
  for (int64_t i = 0; i < n; ++i) {
    const Term<T> term = background_term(static_cast<T>(x[i]), gamma, square);
    value[i] = term.value;
    slope[i] = static_cast<scalar_t>(term.slope * grad_scale);
  }
}

// The sum over part of a level. `grads` is null if the gradient is not wanted.
template <typename scalar_t, typename T>
double background_part(const scalar_t* x, scalar_t* grads, int64_t n, T gamma, T grad_scale) {
  return simd([=]() FREEANCHOR_INLINE_LAMBDA {
    alignas(64) T value[kSummed];
    scalar_t unwanted[kSummed];
    double sums[16] = {};
    for (int64_t begin = 0; begin < n; begin += kSummed) {
      const int64_t size = std::min(kSummed, n - begin);
      scalar_t* slope = grads ? grads + begin : unwanted;
      gamma == 2 ? background_loop<true>(x + begin, value, slope, size, gamma, grad_scale)
                 : background_loop<false>(x + begin, value, slope, size, gamma, grad_scale);
      std::fill(value + size, value + (size + 15) / 16 * 16, T(0));
      for (int64_t i = 0; i < size; i += 16) {
        for (int lane = 0; lane < 16; ++lane) {
          sums[lane] += value[i + lane];
        }
      }
    }
    return std::accumulate(sums, sums + 16, 0.0);
  });
}

// The sum over all levels, and the gradient.
template <typename scalar_t, typename T>
double background_sum(const Loss<scalar_t>& loss, T grad_scale) {
  const Levels<scalar_t>& logits = loss.logits;
  std::vector<std::pair<int, int64_t>> chunks; // the level, and where it begins there
  for (int l = 0; l < logits.count; ++l) {
    for (int64_t begin = 0; begin < logits.size_of(l); begin += kChunk) {
      chunks.emplace_back(l, begin);
    }
  }
  std::vector<double> sums(chunks.size());
  at::parallel_for(0, sums.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [l, begin] = chunks[i];
      scalar_t* grads = loss.grads.level[l].data;
      sums[i] = background_part(
          logits.level[l].data + begin, grads ? grads + begin : nullptr,
          std::min(kChunk, logits.size_of(l) - begin), loss.gamma, grad_scale);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The cells were counted as plain background: puts their gradients right, and gives the difference
// to the sum.
template <typename scalar_t, typename T>
double correct_cells(const Loss<scalar_t>& loss, const std::vector<Cell<T>>& cells, T grad_scale) {
  double difference = 0;
  for (const Cell<T>& cell : cells) {
    const scalar_t& x = loss.logits[cell.index];
    const Term<T> term = matched_term(static_cast<T>(x), cell.prob, loss.gamma);
    difference += term.value - background_part<scalar_t, T>(&x, nullptr, 1, loss.gamma, 0);
    if (loss.grads.count) {
      loss.grads[cell.index] = term.slope * grad_scale;
    }
  }
  return difference;
}

struct Cpu {
  template <typename scalar_t, typename T>
  static at::Tensor
  run(const Loss<scalar_t>& loss, const Matching<T>& matching, const at::Tensor& max_iou) {
    check_on_host(matching.objects, matching.anchors);
    const auto cells = box_prob(matching, max_iou.mutable_data_ptr<T>());
    const T grad_scale = *loss.grad_scale;
    const double sum = background_sum(loss, grad_scale);
    return at::scalar_tensor(sum + correct_cells(loss, cells, grad_scale), at::kDouble);
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("negative_bag_loss", negative_bag_loss<Cpu>);
}

} // namespace freeanchor
