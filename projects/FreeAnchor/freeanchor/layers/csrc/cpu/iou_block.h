// The IoUs of a box with a block of others, vectorized.
#pragma once

#include "../box_iou.h"
#include "simd.h"

namespace freeanchor {

constexpr int32_t kBlock = 128;

// Writes the IoUs with get(i) for i < n, where get is FREEANCHOR_INLINE_LAMBDA. Gives whether any
// is at least `bound`.
template <typename T, typename F>
bool iou_block(const Box<T>& box, int32_t n, F get, T bound, T* iou) {
  return simd([=](auto) FREEANCHOR_INLINE_LAMBDA {
    T* __restrict out = iou;
    int any = 0;
    for (int32_t i = 0; i < n; ++i) {
      out[i] = box_iou(box, get(i));
      any |= out[i] >= bound;
    }
    return any != 0;
  });
}

} // namespace freeanchor
