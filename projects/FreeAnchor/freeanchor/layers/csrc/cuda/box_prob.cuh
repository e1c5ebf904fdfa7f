// P{a in A+} without the IoU of every prediction with every object, see matching.box_prob.
//
// A thread decodes one prediction and walks through the objects of its image, once to find the
// highest IoU with each, and once to use P. There is no list of the matches, for whose length the
// host would have to wait.
#pragma once

#include "kernel.cuh"

namespace freeanchor {

// What a thread's prediction is that of, and the predicted box.
template <typename T>
struct Predicted {
  int64_t image, anchor;
  Box<T> box;
};

// Calls visit(predicted, object, IoU) for the objects that the prediction of a thread overlaps by
// more than the threshold. For all threads of a block together.
template <typename T, typename F>
__device__ void for_each_match(const Matching<T>& matching, F visit) {
  __shared__ Box<T> boxes[kThreads];
  const int64_t per_image = num_blocks(matching.deltas.anchors), image = blockIdx.x / per_image;
  const int64_t anchor = blockIdx.x % per_image * kThreads + threadIdx.x;
  Predicted<T> at{image, anchor, {}}; // past the last anchor, a box that matches nothing
  if (anchor < matching.deltas.anchors) {
    at.box = matching.predict(image, anchor).box;
  }
  const int64_t end = matching.objects.first[image + 1];
  for (int64_t first = matching.objects.first[image]; first < end; first += kThreads) {
    const int count = static_cast<int>(end - first < kThreads ? end - first : kThreads);
    __syncthreads();
    if (threadIdx.x < count) {
      boxes[threadIdx.x] = matching.objects.boxes[first + threadIdx.x];
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const Box<T> object = boxes[i];
      // Few overlap at all, and only those need a division.
      if (overlap(object, at.box)) {
        const T iou = box_iou(object, at.box);
        if (iou > matching.threshold) {
          visit(at, first + i, iou);
        }
      }
    }
  }
}

// Positive numbers are ordered as their bits are.
__device__ inline void atomic_max(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
}
__device__ inline void atomic_max(double* address, double value) {
  atomicMax(
      reinterpret_cast<unsigned long long*>(address),
      static_cast<unsigned long long>(__double_as_longlong(value)));
}

// The highest IoU with each object.
template <typename T>
__global__ void __launch_bounds__(kThreads) highest_kernel(const Matching<T> matching, T* highest) {
  for_each_match(matching, [&](const Predicted<T>&, int64_t object, T iou) {
    atomic_max(highest + object, iou);
  });
}

// Calls visit(cell, P{a in A+}) for the cells of this thread's prediction. For all threads of a
// block together.
template <typename T, typename F>
__device__ void for_each_cell(const Matching<T>& matching, const T* highest, F visit) {
  const Objects<T>& objects = matching.objects;
  const auto prob = [&](int64_t object, T iou) {
    return (iou - matching.threshold) / (highest[object] - matching.threshold);
  };
  for_each_match(matching, [&](const Predicted<T>& at, int64_t object, T iou) {
    if (!objects.class_is_valid(object)) {
      return; // an error
    }
    // Objects of the same class share a cell: the one with the highest P, or the first of them.
    const int64_t cls = objects.classes[object], end = objects.first[at.image + 1];
    const T p = prob(object, iou);
    for (int64_t other = objects.first[at.image]; other < end; ++other) {
      if (other != object && objects.classes[other] == cls) {
        const T other_iou = box_iou(objects.boxes[other], at.box);
        const T other_p = other_iou > matching.threshold ? prob(other, other_iou) : 0;
        if (other_p > p || (other_p == p && other < object)) {
          return;
        }
      }
    }
    visit((at.image * matching.deltas.anchors + at.anchor) * objects.num_classes + cls, p);
  });
}

} // namespace freeanchor
