// What every kernel needs: a launch, and bad values, which only the device sees: kernels leave a
// note where the host looks without waiting.
//
// The error is raised by the operator that finds the note, at once or with the next call. Kernels
// skip what is bad, so until then nothing is read out of bounds, and the context stays alive.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include "../arguments.h"

namespace freeanchor {

constexpr int kThreads = 256;

// Blocks that have a thread for each item.
C10_HOST_DEVICE inline int64_t num_blocks(int64_t items) {
  return (items + kThreads - 1) / kThreads;
}

// Does nothing for no blocks, which CUDA refuses.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t blocks, const Arguments&... arguments) {
  if (blocks > 0) {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

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
  raise(found - (bound << kErrorBits), bound);
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
         left.y2 == box.y2 && double(above.y1) + above.y2 <= double(box.y1) + box.y2 &&
         double(left.x1) + left.x2 <= double(box.x1) + box.x2;
}

// A thread per object or anchor.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const Objects<T> objects, const Levels<T> anchors, int64_t* note) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < anchors.anchors) {
    const Level<T>& level = anchors.level[anchors.level_of(i)];
    const auto in_level = static_cast<int32_t>(i - level.first);
    if (!(level.grid ? fits_grid(level, in_level) : is_valid(level.boxes()[in_level]))) {
      report(note, level.grid ? kGrid : kAnchors);
    }
  }
  const Error error = i < objects.count ? objects.error(i) : kNone;
  if (error != kNone) {
    report(note, error, objects.bound(error));
  }
}

template <typename T>
void check_on_device(const Objects<T>& objects, const Levels<T>& anchors) {
  const int64_t items = std::max(objects.count, anchors.anchors);
  launch(check_kernel<T>, num_blocks(items), objects, anchors, error_note());
}

} // namespace freeanchor
