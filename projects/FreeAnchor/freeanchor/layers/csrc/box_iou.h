// Boxes (x1, y1, x2, y2): the arithmetic of matching.py, operation by operation.
//
// Bags are ordered by IoU, and ties are common, so the last bit matters: this must be compiled
// without contraction of a * b + c (see setup.py).
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>

// Loops over these are vectorized, see cpu/simd.h.
#define FREEANCHOR_INLINE C10_HOST_DEVICE inline __attribute__((always_inline))

namespace freeanchor {

template <typename T>
struct Box {
  T x1, y1, x2, y2;

  FREEANCHOR_INLINE T area() const {
    return (x2 - x1) * (y2 - y1);
  }
};

// Whether its coordinates are finite and in order.
template <typename T>
C10_HOST_DEVICE inline bool is_valid(const Box<T>& box) {
  const T width = box.x2 - box.x1, height = box.y2 - box.y1; // NaN or inf if a coordinate is
  return width >= 0 && height >= 0 && width <= std::numeric_limits<T>::max() &&
         height <= std::numeric_limits<T>::max();
}

// Whether the boxes have points in common, not only on an edge.
template <typename T>
FREEANCHOR_INLINE bool overlap(const Box<T>& a, const Box<T>& b) {
  return (a.x1 < b.x2) & (b.x1 < a.x2) & (a.y1 < b.y2) & (b.y1 < a.y2); // without a branch
}

// matching.box_iou: 0 if a coordinate is NaN or an area overflows.
template <typename T>
FREEANCHOR_INLINE T box_iou(const Box<T>& a, const Box<T>& b) {
  T width = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  T height = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  width = width > 0 ? width : 0;
  height = height > 0 ? height : 0;
  const T inter = width * height;
  const T all = a.area() + b.area() - inter;
  const T iou = inter / all;
  return (inter > 0) & (all <= std::numeric_limits<T>::max()) ? iou : 0; // without a branch
}

// Squared distance of the centres, times 4.
template <typename T>
C10_HOST_DEVICE inline T centre_distance(const Box<T>& anchor, const Box<T>& box) {
  const T x = (anchor.x1 - box.x1) + (anchor.x2 - box.x2);
  const T y = (anchor.y1 - box.y1) + (anchor.y2 - box.y2);
  return x * x + y * y;
}

// An anchor for the bag of an object, in the order of matching.iou_topk.
template <typename T>
struct Candidate {
  T iou, distance;
  int64_t index;

  C10_HOST_DEVICE bool operator<(const Candidate& other) const { // the better one first
    if (iou != other.iou) {
      return iou > other.iou;
    }
    return distance != other.distance ? distance < other.distance : index < other.index;
  }
};

} // namespace freeanchor
