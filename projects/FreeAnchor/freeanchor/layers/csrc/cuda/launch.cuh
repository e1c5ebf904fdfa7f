// What every kernel needs: the headers, the size of a block, and its launch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

namespace freeanchor {

constexpr int kThreads = 256;

// Blocks that have a thread for each item.
inline int64_t num_blocks(int64_t items) {
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

} // namespace freeanchor
