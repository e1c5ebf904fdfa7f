// The bag of an object while it is searched for.
#pragma once

#include <algorithm>
#include <vector>

#include "../box_iou.h"

namespace freeanchor {

// The best k of the candidates that were offered, and some more.
template <typename T>
class Best {
 public:
  explicit Best(int64_t k) : k_(k) {
  }

  void clear() {
    candidates_.clear();
    candidates_.reserve(4 * k_ + 64);
    bound_ = 0;
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
      candidates_.push_back(candidate);
      if (size() == 4 * k_ + 64) {
        std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end());
        candidates_.resize(k_);
        bound_ = candidates_.back().iou;
      }
    }
  }

  // Raises the bound towards the k-th best IoU, by bisection: passes without branches are faster
  // than finding it exactly.
  void raise_bound() {
    T high = 1;
    for (int step = 0; step < 7 && size() >= k_; ++step) {
      const T middle = (bound_ + high) / 2;
      int32_t above = 0;
      for (const Candidate<T>& candidate : candidates_) {
        above += candidate.iou >= middle;
      }
      (above >= k_ ? bound_ : high) = middle;
    }
  }

  // Writes the indices of the best k in order.
  void write(int64_t* out) {
    raise_bound();
    const auto end = std::remove_if(
        candidates_.begin(), candidates_.end(),
        [this](const Candidate<T>& candidate) { return candidate.iou < bound_; });
    std::sort(candidates_.begin(), end);
    for (int64_t i = 0; i < k_; ++i) {
      out[i] = candidates_[i].index;
    }
  }

 private:
  int64_t k_;
  T bound_ = 0;
  std::vector<Candidate<T>> candidates_;
};

} // namespace freeanchor
