// Bad values, which only the device sees: kernels leave a note where the host looks without
// waiting.
//
// The error is raised by the operator that finds the note, at once or with the next call. Kernels
// skip what is bad, so until then nothing is read out of bounds, and the context stays alive.
#pragma once

#include "../arguments.h"
#include "launch.cuh"

namespace freeanchor {

enum Error : int64_t { kGtBoxes = 1, kAnchors, kGrid, kClasses, kImages, kIndex };
constexpr int kErrorBits = 3; // the bits above them hold what the value must be below

// In memory of the host that all devices can write.
inline int64_t* error_note() {
  static int64_t* const note = [] {
    void* memory = nullptr;
    C10_CUDA_CHECK(
        cudaHostAlloc(&memory, sizeof(int64_t), cudaHostAllocMapped | cudaHostAllocPortable));
    return new (memory) int64_t(0);
  }();
  return note;
}

// The first one counts: later kernels may meet what follows from it.
__device__ inline void report(int64_t* note, Error error, int64_t bound = 0) {
  if (*static_cast<volatile int64_t*>(note) == 0) {
    *static_cast<volatile int64_t*>(note) = bound << kErrorBits | error;
  }
}

inline void raise_errors() {
  auto* note = static_cast<volatile int64_t*>(error_note());
  const int64_t found = *note, bound = found >> kErrorBits;
  *note = 0;
  const int64_t error = found - (bound << kErrorBits);
  TORCH_CHECK_VALUE(error != kGtBoxes, "gt_boxes", kBadBoxes);
  TORCH_CHECK_VALUE(error != kAnchors, "anchors", kBadBoxes);
  TORCH_CHECK_VALUE(error != kGrid, kBadGrid);
  TORCH_CHECK_VALUE(error != kClasses, "gt_classes", kOutOfRange, bound, ")");
  TORCH_CHECK_VALUE(error != kImages, "gt_images", kOutOfRange, bound, ")", kNeverDecrease);
  TORCH_CHECK_VALUE(error != kIndex, "index", kOutOfRange, bound, ")");
}

template <typename T>
__device__ bool in_order(T low, T high, T next_low, T next_high) {
  return double(low) + high <= double(next_low) + next_high; // twice the centres
}

// Anchor i of a grid: x is that of the row above, y that of the column to the left, and the centres
// of both move on.
template <typename T>
__device__ bool fits_grid(const Level<T>& grid, int32_t i) {
  const int32_t row_size = grid.width * grid.per_cell;
  const Box<T> box = grid.boxes()[i];
  const Box<T> above = grid.boxes()[i < row_size ? i : i - row_size];
  const Box<T> left = grid.boxes()[i % row_size < grid.per_cell ? i : i - grid.per_cell];
  return is_valid(box) && above.x1 == box.x1 && above.x2 == box.x2 && left.y1 == box.y1 &&
         left.y2 == box.y2 && in_order(above.y1, above.y2, box.y1, box.y2) &&
         in_order(left.x1, left.x2, box.x1, box.x2);
}

// A thread per object or anchor.
template <typename T>
__global__ void __launch_bounds__(kThreads) check_kernel(
    const Objects<T> objects, const Levels<T> anchors, int64_t num_classes, int64_t num_images,
    int64_t* note) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < anchors.anchors) {
    const Level<T>& level = anchors.level[anchors.level_of(i)];
    const auto in_level = static_cast<int32_t>(i - level.first);
    if (!(level.grid ? fits_grid(level, in_level) : is_valid(level.boxes()[in_level]))) {
      report(note, level.grid ? kGrid : kAnchors);
    }
  }
  if (i < objects.count) {
    if (!is_valid(objects.boxes[i])) {
      report(note, kGtBoxes);
    }
    if (objects.classes && !objects.class_is_valid(i, num_classes)) {
      report(note, kClasses, num_classes);
    }
    if (objects.images && !objects.image_is_valid(i, num_images)) {
      report(note, kImages, num_images);
    }
  }
}

template <typename T>
void check_values(
    const Objects<T>& objects, const Levels<T>& anchors, int64_t num_classes, int64_t num_images) {
  const int64_t items = std::max(objects.count, anchors.anchors);
  launch(
      check_kernel<T>, num_blocks(items), objects, anchors, num_classes, num_images, error_note());
}

} // namespace freeanchor
