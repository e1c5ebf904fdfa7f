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
  explicit Best(int64_t k) : k_(k), candidates_(4 * k + 64), ious_(candidates_.size()) {
  }

  void clear() {
    size_ = 0;
    bound_ = highest_ = 0;
  }

  int64_t size() const {
    return size_;
  }

  // Below this IoU an anchor is not among the best.
  T bound() const {
    return bound_;
  }

  __attribute__((always_inline)) void offer(const Candidate<T>& candidate) {
    if (candidate.iou >= bound_ && candidate.distance >= 0) { // NaN cannot be ordered
      candidates_[size_] = candidate;
      ious_[size_] = candidate.iou;
      highest_ = std::max(highest_, candidate.iou);
      if (++size_ == static_cast<int64_t>(candidates_.size())) {
        shrink();
      }
    }
  }

  // Raises the bound towards the k-th best IoU, by bisection: passes without branches are faster
  // than finding it exactly.
  void raise_bound() {
    if (size_ < k_) {
      return;
    }
    T high = highest_;
    for (int step = 0; step < 6; ++step) {
      const T middle = (bound_ + high) / 2;
      int32_t above = 0;
      for (int64_t i = 0; i < size_; ++i) {
        above += ious_[i] >= middle;
      }
      (above >= k_ ? bound_ : high) = middle;
    }
  }

  // Writes the indices of the best k in order.
  void write(int64_t* out) {
    raise_bound();
    const auto end = std::remove_if(
        candidates_.begin(), candidates_.begin() + size_,
        [this](const Candidate<T>& candidate) { return candidate.iou < bound_; });
    std::sort(candidates_.begin(), end);
    for (int64_t i = 0; i < k_; ++i) {
      out[i] = candidates_[i].index;
    }
  }

 private:
  void shrink() {
    const auto begin = candidates_.begin();
    std::nth_element(begin, begin + (k_ - 1), begin + size_);
    size_ = k_;
    bound_ = candidates_[k_ - 1].iou;
    for (int64_t i = 0; i < k_; ++i) {
      ious_[i] = candidates_[i].iou;
    }
  }

  int64_t k_, size_ = 0;
  T bound_ = 0, highest_ = 0;
  std::vector<Candidate<T>> candidates_;
  std::vector<T> ious_; // those of the candidates, side by side
};

} // namespace freeanchor
