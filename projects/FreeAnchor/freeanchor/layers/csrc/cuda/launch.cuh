// What every launch needs: the headers, the size of a block and the number of blocks.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

namespace freeanchor {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffff; // of a warp

// Blocks that have a thread for each item.
inline unsigned num_blocks(int64_t items) {
  return static_cast<unsigned>((items + kThreads - 1) / kThreads);
}

} // namespace freeanchor
