// The levels of a feature pyramid, addressed as the one (N, R, D) tensor that they stand for.
//
// A level is (N, H, W, A, D) or (N, R_l, D) in any memory layout: N images, R_l = H * W * A anchors
// and D numbers per anchor. The element of image n, anchor j (of all levels, the first level first)
// and number d has the index (n * R + j) * D + d, as in matching.py.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

namespace freeanchor {

constexpr int kMaxLevels = 16;

template <typename scalar_t>
struct Level {
  scalar_t* data;
  int64_t first;   // index of its first anchor among those of all levels
  int64_t anchors; // H * W * A
  int64_t width, per_cell;
  int64_t stride[5]; // of n, y, x, a and d

  // The numbers of anchor `anchor` of this level in image `n`; stride[4] apart.
  C10_HOST_DEVICE scalar_t* at(int64_t n, int64_t anchor) const {
    const int64_t cell = anchor / per_cell, y = cell / width;
    return data + n * stride[0] + y * stride[1] + (cell - y * width) * stride[2] +
           (anchor - cell * per_cell) * stride[3];
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

  // The level of an anchor j < R.
  C10_HOST_DEVICE const Level<scalar_t>& level_of(int64_t j) const {
    int l = 0;
    while (j - level[l].first >= level[l].anchors) {
      ++l;
    }
    return level[l];
  }

  // The element with an index in [0, size()).
  C10_HOST_DEVICE scalar_t& operator[](int64_t index) const {
    const int64_t row = index / depth, d = index - row * depth;
    const int64_t n = row / anchors, j = row - n * anchors;
    const Level<scalar_t>& of_anchor = level_of(j);
    return of_anchor.at(n, j - of_anchor.first)[d * of_anchor.stride[4]];
  }
};

// Views the tensors of an argument as Levels, as far as memory safety needs it: ops.py has checked
// the rest, with messages for users.
template <typename scalar_t>
Levels<scalar_t> view_levels(const char* name, at::TensorList tensors) {
  TORCH_CHECK(
      0 < tensors.size() && tensors.size() <= kMaxLevels, name, " must have 1 to ", kMaxLevels,
      " levels, got ", tensors.size());
  Levels<scalar_t> levels;
  levels.images = tensors[0].size(0);
  levels.depth = tensors[0].size(-1);
  for (const at::Tensor& x : tensors) {
    TORCH_CHECK(
        3 <= x.dim() && x.dim() <= 5 && x.size(0) == levels.images && x.size(-1) == levels.depth,
        name, " must be (N, anchors, D) or (N, H, W, A, D), got ", x.sizes());
    TORCH_CHECK(
        x.scalar_type() == tensors[0].scalar_type() && x.device() == tensors[0].device(), name,
        " must have one dtype and be on one device");
    Level<scalar_t>& level = levels.level[levels.count++];
    level.data = const_cast<scalar_t*>(x.const_data_ptr<scalar_t>());
    level.first = levels.anchors;
    // Dimensions that a flattened level lacks have size 1.
    const int64_t missing = 5 - x.dim();
    int64_t sizes[5] = {x.size(0), 1, 1, 1, x.size(-1)};
    level.stride[0] = x.stride(0);
    level.stride[1] = level.stride[2] = level.stride[3] = 0;
    level.stride[4] = x.stride(-1);
    for (int64_t d = 1; d + 1 < x.dim(); ++d) {
      sizes[d + missing] = x.size(d);
      level.stride[d + missing] = x.stride(d);
    }
    level.width = sizes[2];
    level.per_cell = sizes[3];
    level.anchors = sizes[1] * sizes[2] * sizes[3];
    levels.anchors += level.anchors;
  }
  return levels;
}

} // namespace freeanchor
