// The levels of a feature pyramid, addressed as the one (N, R, D) tensor that they stand for.
//
// A level is (N, H, W, A, D) or (N, R_l, D) in any memory layout: N images, R_l = H * W * A anchors
// and D numbers per anchor. The element of image n, anchor j (of all levels, the first level first)
// and number d has the index (n * R + j) * D + d, as in levels.py.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <algorithm>
#include <limits>

#include "box_iou.h"

namespace freeanchor {

constexpr int kMaxLevels = 10; // four Levels are passed to a kernel of CUDA, in at most 4 KiB

template <typename scalar_t>
struct Level {
  scalar_t* data = nullptr;
  int64_t first;     // index of its first anchor among those of all levels
  int64_t stride[5]; // of n, y, x, a and d
  int32_t anchors;   // H * W * A, in 32 bits for fast divisions
  int32_t height, width, per_cell;
  bool grid; // whether it has five dimensions

  // The numbers of anchor `anchor` of this level in image `n`; stride[4] apart.
  C10_HOST_DEVICE scalar_t* at(int64_t n, int32_t anchor) const {
    const int32_t cell = anchor / per_cell, y = cell / width;
    return data + n * stride[0] + y * stride[1] + (cell - y * width) * stride[2] +
           (anchor - cell * per_cell) * stride[3];
  }

  // Of a level without gaps in memory, for one image and with D = 4.
  C10_HOST_DEVICE const Box<scalar_t>* boxes() const {
    return reinterpret_cast<const Box<scalar_t>*>(data);
  }
};

template <typename scalar_t>
struct Levels {
  int count = 0;
  int64_t images = 0, anchors = 0, depth = 0; // N, R and D
  Level<scalar_t> level[kMaxLevels];

  C10_HOST_DEVICE int64_t size() const {
    return images * anchors * depth;
  }
  // The elements of a level.
  C10_HOST_DEVICE int64_t size_of(int l) const {
    return images * level[l].anchors * depth;
  }

  const Level<scalar_t>* begin() const {
    return level;
  }
  const Level<scalar_t>* end() const {
    return level + count;
  }

  // The level of an anchor j < R.
  C10_HOST_DEVICE int level_of(int64_t j) const {
    int l = 0;
    while (j - level[l].first >= level[l].anchors) {
      ++l;
    }
    return l;
  }

  // The element with an index in [0, size()).
  C10_HOST_DEVICE scalar_t& operator[](int64_t index) const {
    const int64_t row = index / depth, d = index - row * depth;
    const int64_t n = row / anchors, j = row - n * anchors;
    const Level<scalar_t>& of_anchor = level[level_of(j)];
    return of_anchor.at(n, static_cast<int32_t>(j - of_anchor.first))[d * of_anchor.stride[4]];
  }
};

// Views the tensors of an argument as Levels, as far as memory safety needs it. Without
// `has_images` they lack the first dimension.
template <typename scalar_t>
Levels<scalar_t>
view_levels(const char* name, at::TensorList tensors, at::Device device, bool has_images = true) {
  TORCH_CHECK(
      0 < tensors.size() && tensors.size() <= kMaxLevels, name, " must have 1 to ", kMaxLevels,
      " levels, got ", tensors.size());
  Levels<scalar_t> levels;
  levels.images = has_images ? tensors[0].size(0) : 1;
  levels.depth = tensors[0].size(-1);
  for (const at::Tensor& x : tensors) {
    const int64_t missing = 5 - x.dim(), dims = x.dim() + !has_images;
    TORCH_CHECK(
        3 <= dims && dims <= 5 && (!has_images || x.size(0) == levels.images) &&
            x.size(-1) == levels.depth,
        name, " must be (N, anchors, D) or (N, H, W, A, D), got ", x.sizes());
    TORCH_CHECK(x.device() == device, name, " must be on ", device, ", got ", x.device());
    Level<scalar_t>& level = levels.level[levels.count++];
    level.data = const_cast<scalar_t*>(x.const_data_ptr<scalar_t>());
    level.first = levels.anchors;
    level.grid = dims == 5;
    int64_t sizes[5] = {levels.images, 1, 1, 1, levels.depth};
    std::fill_n(level.stride, 5, 0);
    level.stride[0] = has_images ? x.stride(0) : 0;
    for (int64_t d = has_images; d < x.dim(); ++d) {
      sizes[missing + d] = x.size(d);
      level.stride[missing + d] = x.stride(d);
    }
    const int64_t anchors = sizes[1] * sizes[2] * sizes[3];
    TORCH_CHECK(
        anchors <= std::numeric_limits<int32_t>::max(), name, " must have less than 2^31 anchors");
    level.anchors = static_cast<int32_t>(anchors);
    level.height = static_cast<int32_t>(sizes[1]);
    level.width = static_cast<int32_t>(sizes[2]);
    level.per_cell = static_cast<int32_t>(sizes[3]);
    levels.anchors += anchors;
  }
  return levels;
}

} // namespace freeanchor
