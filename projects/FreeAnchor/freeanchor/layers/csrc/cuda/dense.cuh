// Elementwise passes over levels without gaps, as they lie in memory.
#pragma once

#include "../levels.h"
#include "launch.cuh"

namespace freeanchor {

// What is loaded and stored at a time: 16 bytes.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t element[kSize];
};

// Elements that a block works through at a time: a chunk is part of one level.
template <typename scalar_t>
constexpr int64_t kChunk = 4 * kThreads * Vector<scalar_t>::kSize;

template <typename scalar_t>
C10_HOST_DEVICE int64_t num_elements(const Levels<scalar_t>& levels, int l) {
  return levels.images * levels.level[l].anchors * levels.depth;
}

template <typename scalar_t>
C10_HOST_DEVICE int64_t num_chunks(const Levels<scalar_t>& levels, int l) {
  return (num_elements(levels, l) + kChunk<scalar_t> - 1) / kChunk<scalar_t>;
}

template <typename scalar_t>
int64_t num_chunks(const Levels<scalar_t>& levels) {
  int64_t chunks = 0;
  for (int l = 0; l < levels.count; ++l) {
    chunks += num_chunks(levels, l);
  }
  return chunks;
}

// Writes f(x) to `out` for each element x of a chunk of `in`. The two have the same memory layout,
// or may be the same; without levels in `out` nothing is written.
template <typename scalar_t, typename F>
__device__ void
transform_chunk(const Levels<scalar_t>& in, const Levels<scalar_t>& out, int64_t chunk, F f) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  int l = 0;
  while (chunk >= num_chunks(in, l)) {
    chunk -= num_chunks(in, l++);
  }
  const int64_t begin = chunk * kChunk<scalar_t>, left = num_elements(in, l) - begin;
  const int size = static_cast<int>(left < kChunk<scalar_t> ? left : kChunk<scalar_t>);
  const scalar_t* x = in.level[l].data + begin;
  scalar_t* y = out.count > 0 ? out.level[l].data + begin : nullptr;
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
  const int vectors = aligned ? size / kSize : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    Vector<scalar_t> vector = reinterpret_cast<const Vector<scalar_t>*>(x)[i];
#pragma unroll
    for (scalar_t& element : vector.element) {
      element = f(element);
    }
    if (y) {
      reinterpret_cast<Vector<scalar_t>*>(y)[i] = vector;
    }
  }
  for (int i = vectors * kSize + threadIdx.x; i < size; i += kThreads) {
    const scalar_t element = f(x[i]);
    if (y) {
      y[i] = element;
    }
  }
}

} // namespace freeanchor
