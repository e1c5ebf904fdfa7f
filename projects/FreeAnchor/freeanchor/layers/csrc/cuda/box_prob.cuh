// P{a in A+} without the IoU of every prediction with every object, see matching.box_prob.
//
// A thread decodes one prediction and walks through the objects of its image, once to find the
// highest IoU with each, and once to use P. There is no list of the matches, for whose length the
// host would have to wait.
#pragma once

#include "kernel.cuh"

namespace freeanchor {

template <typename T>
C10_HOST_DEVICE int64_t blocks_per_image(const Matching<T>& matching) {
  return (matching.deltas.anchors + kThreads - 1) / kThreads;
}

// The image, and the anchor of this thread's prediction, which may be past the last one.
template <typename T>
struct Place {
  int64_t image, anchor;

  __device__ explicit Place(const Matching<T>& matching)
      : image(blockIdx.x / blocks_per_image(matching)),
        anchor(blockIdx.x % blocks_per_image(matching) * kThreads + threadIdx.x) {
  }

  // The predicted box; one that matches nothing if there is none.
  __device__ Box<T> box(const Matching<T>& matching) const {
    return anchor < matching.deltas.anchors ? matching.predict(image, anchor).box : Box<T>{};
  }
};

// Calls visit(object, IoU) for the objects of an image that a thread's box overlaps by more than
// the threshold. For all threads of a block together.
template <typename T, typename F>
__device__ void
for_each_match(const Matching<T>& matching, int64_t image, const Box<T>& box, F visit) {
  __shared__ Box<T> boxes[kThreads];
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
      if (overlap(object, box)) {
        const T iou = box_iou(object, box);
        if (iou > matching.threshold) {
          visit(first + i, iou);
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

// The highest IoU with each object, and whether any prediction of a block matches one.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    highest_kernel(const Matching<T> matching, T* highest, int* any) {
  const Place<T> place(matching);
  int matches = 0;
  for_each_match(matching, place.image, place.box(matching), [&](int64_t object, T iou) {
    atomic_max(highest + object, iou);
    ++matches;
  });
  matches = __syncthreads_or(matches);
  if (threadIdx.x == 0) {
    any[blockIdx.x] = matches;
  }
}

// Calls visit(cell, P{a in A+}) for the cells of this thread's prediction. For all threads of a
// block together.
template <typename T, typename F>
__device__ void for_each_cell(const Matching<T>& matching, const T* highest, F visit) {
  const Objects<T>& objects = matching.objects;
  const Place<T> place(matching);
  const Box<T> box = place.box(matching);
  const auto prob = [&](int64_t object, T iou) {
    return (iou - matching.threshold) / (highest[object] - matching.threshold);
  };
  for_each_match(matching, place.image, box, [&](int64_t object, T iou) {
    if (!objects.class_is_valid(object)) {
      return; // an error
    }
    // Objects of the same class share a cell: the one with the highest P, or the first of them.
    const int64_t cls = objects.classes[object], end = objects.first[place.image + 1];
    const T p = prob(object, iou);
    for (int64_t other = objects.first[place.image]; other < end; ++other) {
      if (other != object && objects.classes[other] == cls) {
        const T other_iou = box_iou(objects.boxes[other], box);
        const T other_p = other_iou > matching.threshold ? prob(other, other_iou) : 0;
        if (other_p > p || (other_p == p && other < object)) {
          return;
        }
      }
    }
    visit((place.image * matching.deltas.anchors + place.anchor) * objects.num_classes + cls, p);
  });
}

} // namespace freeanchor
