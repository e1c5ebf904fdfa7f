// P{a in A+} without the IoU of every prediction with every object, see matching.box_prob.
//
// A thread decodes one prediction and walks through the objects of its image, once to find the
// highest IoU with each, and once to use P. There is no list of the matches, for whose length the
// host would have to wait.
#pragma once

#include "errors.cuh"

namespace freeanchor {

template <typename scalar_t, typename T>
struct Batch {
  Levels<scalar_t> deltas;
  const Box<T>* anchors[kMaxLevels];
  ObjectList<T> objects;
  T weights[4], scale_clamp, threshold;

  C10_HOST_DEVICE int64_t blocks_per_image() const {
    return (deltas.anchors + kThreads - 1) / kThreads;
  }
  __device__ int64_t image() const {
    return blockIdx.x / blocks_per_image();
  }
  // May be past the last one.
  __device__ int64_t anchor() const {
    return blockIdx.x % blocks_per_image() * kThreads + threadIdx.x;
  }
  // The first object of an image, or of one after it.
  __device__ int64_t first_object(int64_t image) const {
    int64_t low = 0, high = objects.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (objects.images[middle] < image) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The box of this thread's prediction; one that matches nothing if there is none.
template <typename scalar_t, typename T>
__device__ Box<T> predicted_box(const Batch<scalar_t, T>& batch) {
  const int64_t anchor = batch.anchor();
  if (anchor >= batch.deltas.anchors) {
    return {};
  }
  int l = 0;
  while (anchor - batch.deltas.level[l].first >= batch.deltas.level[l].anchors) {
    ++l;
  }
  const Level<scalar_t>& level = batch.deltas.level[l];
  const scalar_t* raw = level.at(batch.image(), anchor - level.first);
  const Box<T> a = batch.anchors[l][anchor - level.first];
  const auto delta = [&](int d) {
    return static_cast<T>(raw[d * level.stride[4]]) / batch.weights[d];
  };
  const T x = decode_centre(delta(0), a.x1, a.x2);
  const T y = decode_centre(delta(1), a.y1, a.y2);
  const T half_width = decode_half(delta(2), a.x1, a.x2, batch.scale_clamp);
  const T half_height = decode_half(delta(3), a.y1, a.y2, batch.scale_clamp);
  return {x - half_width, y - half_height, x + half_width, y + half_height};
}

// Calls visit(object, IoU) for the objects [begin, end) that this thread's prediction overlaps by
// more than the threshold. For all threads of a block together.
template <typename scalar_t, typename T, typename F>
__device__ void for_each_match(
    const Batch<scalar_t, T>& batch, const Box<T>& box, int64_t begin, int64_t end, F visit) {
  __shared__ Box<T> boxes[kThreads];
  for (int64_t first = begin; first < end; first += kThreads) {
    const int count = static_cast<int>(end - first < kThreads ? end - first : kThreads);
    __syncthreads();
    if (threadIdx.x < count) {
      boxes[threadIdx.x] = batch.objects.boxes[first + threadIdx.x];
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const Box<T> object = boxes[i];
      // Few overlap at all, and only those need a division.
      if (object.x1 < box.x2 && box.x1 < object.x2 && object.y1 < box.y2 && box.y1 < object.y2) {
        const T iou = box_iou(object, box);
        if (iou > batch.threshold) {
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
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    highest_kernel(const Batch<scalar_t, T> batch, T* highest, int* any) {
  const int64_t image = batch.image();
  int matches = 0;
  for_each_match(
      batch, predicted_box(batch), batch.first_object(image), batch.first_object(image + 1),
      [&](int64_t object, T iou) {
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
template <typename scalar_t, typename T, typename F>
__device__ void
for_each_cell(const Batch<scalar_t, T>& batch, const T* highest, int64_t num_classes, F visit) {
  const int64_t image = batch.image(), begin = batch.first_object(image),
                end = batch.first_object(image + 1);
  const Box<T> box = predicted_box(batch);
  const auto prob = [&](int64_t object, T iou) {
    return (iou - batch.threshold) / (highest[object] - batch.threshold);
  };
  for_each_match(batch, box, begin, end, [&](int64_t object, T iou) {
    const int64_t cls = batch.objects.classes[object];
    if (!(0 <= cls && cls < num_classes)) {
      return; // an error
    }
    // Objects of the same class share a cell: the one with the highest P, or the first of them.
    const T p = prob(object, iou);
    for (int64_t other = begin; other < end; ++other) {
      if (other != object && batch.objects.classes[other] == cls) {
        const T other_iou = box_iou(batch.objects.boxes[other], box);
        const T other_p = other_iou > batch.threshold ? prob(other, other_iou) : 0;
        if (other_p > p || (other_p == p && other < object)) {
          return;
        }
      }
    }
    visit((image * batch.deltas.anchors + batch.anchor()) * num_classes + cls, p);
  });
}

} // namespace freeanchor
