// The bag of an object while it is searched for.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../box_iou.h"

namespace freeanchor {

// The best k of the candidates that were offered, and some more.
template <typename T>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {
    candidates_.reserve(4 * k + 64);
  }

  // Begins a bag of anchors with at least this IoU.
  void clear(T bound) {
    bound_ = bound;
    candidates_.clear();
    counts_.fill(0);
  }

  int64_t size() const {
    return candidates_.size();
  }

  // Below this IoU an anchor is not among the best.
  T bound() const {
    return bound_;
  }

  __attribute__((always_inline)) void offer(const Candidate<T>& candidate) {
    if (candidate.iou >= bound_ && candidate.distance >= 0) { // NaN cannot be ordered
      ++counts_[static_cast<int>(candidate.iou * kBins)];
      candidates_.push_back(candidate);
      if (candidates_.size() == candidates_.capacity()) {
        shrink();
      }
    }
  }

  // Raises the bound to the lower end of the bin that the k-th best IoU is in.
  void raise_bound() {
    int bin = kBins + 1;
    for (int64_t above = 0; bin > 0 && above < k_;) {
      above += counts_[--bin];
    }
    bound_ = std::max(bound_, T(bin) / kBins);
  }

  // Writes the indices of the best k in order.
  void write(int64_t* out) {
    raise_bound();
    const auto below = [this](const Candidate<T>& candidate) { return candidate.iou < bound_; };
    const auto end = std::remove_if(candidates_.begin(), candidates_.end(), below);
    std::sort(candidates_.begin(), end);
    for (int64_t i = 0; i < k_; ++i) {
      out[i] = candidates_[i].index;
    }
  }

 private:
  static constexpr int kBins = 256; // a power of two, so that their ends are exact

  void shrink() {
    std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end());
    candidates_.resize(k_);
    bound_ = candidates_[k_ - 1].iou;
  }

  int64_t k_;
  T bound_ = 0;
  std::vector<Candidate<T>> candidates_;
  std::array<int64_t, kBins + 1>
      counts_; // of what was offered, by its IoU, which may round to above 1
};

} // namespace freeanchor
