// The IoUs of a box with a block of others, vectorized.
#pragma once

#include "../box_iou.h"
#include "simd.h"

namespace freeanchor {

constexpr int32_t kBlock = 128;

// Writes the IoUs with n others. Gives whether any is at least `bound`.
template <typename T>
bool iou_block(const Box<T>& box, const Box<T>* others, int32_t n, T bound, T* iou) {
  return simd([=]() FREEANCHOR_INLINE_LAMBDA {
    T* __restrict out = iou;
    int any = 0;
    for (int32_t i = 0; i < n; ++i) {
      out[i] = box_iou(box, others[i]);
      any |= out[i] >= bound;
    }
    return any != 0;
  });
}

} // namespace freeanchor
