// matching.iou_topk: bags of anchors, without a matrix of objects and anchors.
//
// One block per object. Anchors that form grids are searched exactly by looking at few of them: an
// upper bound of the IoU that each shape of anchor can reach excludes most shapes, and for the
// others the k-th best IoU so far bounds the rows and columns to look at. Other anchors are
// searched exhaustively. The order of candidates is total, so threads may find them in any order.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../box_iou.h"
#include "../checks.h"
#include "../levels.h"
#include "launch.cuh"

namespace freeanchor {
namespace {

// Bounds are computed in double precision. What rounding in float32 may lift above one is looked at
// too.
constexpr double kSlack = 1e-5;
// A shape has some hundred anchors that overlap an object, which makes for small blocks.
constexpr int kSearchThreads = 128;
// Anchors that each thread looks at before the block makes room for more candidates.
constexpr int kStep = 4;
// Of the candidates; larger ones are in global memory. Every device has this much shared memory.
constexpr int64_t kMaxSharedBytes = 47 << 10;

// The best k of the candidates that the threads of a block offer. All threads must make all calls.
template <typename T>
class Best {
 public:
  // Memory of the block: room for `capacity` candidates, and their number.
  __device__ Best(Candidate<T>* candidates, int capacity, int* size, int k)
      : candidates_(candidates), capacity_(capacity), size_(size), k_(k) {
    clear();
  }

  __device__ void clear() {
    bound_ = {0, INFINITY, INT64_MAX};
    sorted_ = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
      *size_ = 0;
    }
    __syncthreads();
  }

  // Below this IoU an anchor is not among the best: the k-th best so far, 0 if there are fewer.
  __device__ T bound() const {
    return bound_.iou;
  }

  __device__ int size() const {
    __syncthreads();
    const int size = *size_;
    __syncthreads();
    return size;
  }

  // Offers `count` anchors, of which anchor_at(i, index) gives the box and the index. Those that do
  // not overlap the box only if `disjoint`.
  template <typename F>
  __device__ void offer(const Box<T>& box, int64_t count, bool disjoint, F anchor_at) {
    for (int64_t first = 0; first < count; first += kStep * kSearchThreads) {
      if (size() > capacity_ - kStep * kSearchThreads) {
        shrink();
      }
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        const int64_t i = first + step * kSearchThreads + threadIdx.x;
        if (i < count) {
          int64_t index;
          const Box<T> anchor = anchor_at(i, index);
          const T iou = box_iou(box, anchor);
          if (iou >= bound_.iou && (iou > 0 || disjoint)) {
            const Candidate<T> candidate{iou, centre_distance(anchor, box), index};
            if (candidate < bound_) {
              candidates_[atomicAdd(size_, 1)] = candidate;
            }
          }
        }
      }
    }
  }

  // Sorts the candidates, keeps the best k and so raises the bound.
  __device__ void shrink() {
    const int size = this->size();
    if (size == sorted_) {
      return;
    }
    sort(size);
    sorted_ = size < k_ ? size : k_;
    if (size >= k_) {
      bound_ = candidates_[k_ - 1];
      if (threadIdx.x == 0) {
        *size_ = k_;
      }
      __syncthreads();
    }
  }

  // After shrink().
  __device__ void write(int64_t* out) const {
    for (int i = threadIdx.x; i < k_; i += kSearchThreads) {
      out[i] = candidates_[i].index;
    }
  }

 private:
  // Bitonic, in the form in which every comparison has the better one first. The missing ones up to
  // a power of two would stay last, so that those comparisons can be left out.
  __device__ void sort(int size) {
    for (int merged = 2; merged / 2 < size; merged *= 2) {
      for (int step = merged / 2; step > 0; step /= 2) {
        for (int i = threadIdx.x;; i += kSearchThreads) {
          const int a = 2 * i - (i & (step - 1));
          const int b = a ^ (step == merged / 2 ? merged - 1 : step);
          if (a >= size) {
            break;
          }
          if (b < size && candidates_[b] < candidates_[a]) {
            const Candidate<T> better = candidates_[b];
            candidates_[b] = candidates_[a];
            candidates_[a] = better;
          }
        }
        __syncthreads();
      }
    }
  }

  Candidate<T>* candidates_;
  int capacity_;
  int* size_;
  int k_, sorted_; // sorted_: how many there were after the last shrink()
  Candidate<T> bound_;
};

template <typename T>
struct AnchorLevel {
  const T* data;
  int64_t first; // index of its first anchor among those of all levels
  int64_t height, width, per_cell;
};

template <typename T>
struct AnchorLevels {
  int count = 0;
  int64_t anchors = 0, shapes = 0;
  AnchorLevel<T> level[kMaxLevels];
};

template <typename T>
__device__ Box<T> load_box(const T* data) {
  return {data[0], data[1], data[2], data[3]};
}

// The anchors of one level and one index a: all translations of (nearly) the same box. Their x
// coordinates are read from the first row and their y coordinates from the first column.
template <typename T>
struct Shape {
  const T* corner;
  int64_t height, width, row_step, column_step, first, per_cell;

  __device__ Shape(const AnchorLevels<T>& levels, int64_t s) {
    int l = 0;
    while (s >= levels.level[l].per_cell) {
      s -= levels.level[l++].per_cell;
    }
    const AnchorLevel<T>& level = levels.level[l];
    corner = level.data + 4 * s;
    height = level.height;
    width = level.width;
    column_step = 4 * level.per_cell;
    row_step = column_step * width;
    first = level.first + s;
    per_cell = level.per_cell;
  }
};

struct Sizes {
  double min_width, max_width, min_height, max_height;

  // Upper bound of the IoU with a box.
  template <typename T>
  __device__ double bound(const Box<T>& box) const {
    const double width = double(box.x2) - box.x1, height = double(box.y2) - box.y1;
    const double inter = fmin(max_width, width) * fmin(max_height, height);
    const double area = min_width * min_height + width * height;
    return (inter < area - inter ? inter / (area - inter) : 1.0) * (1 + kSlack);
  }
};

template <typename T>
__device__ void measure_axis(
    const T* low, int64_t count, int64_t step, double& min_size, double& max_size) {
  min_size = INFINITY;
  max_size = 0;
  for (int64_t i = threadIdx.x; i < count; i += 32) {
    const T* here = low + i * step;
    min_size = fmin(min_size, double(here[2]) - here[0]);
    max_size = fmax(max_size, double(here[2]) - here[0]);
    // The centres of a grid move to the right and down.
    CUDA_KERNEL_ASSERT(
        i == 0 || !(double(here[0]) + here[2] < double(here[-step]) + here[2 - step]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    min_size = fmin(min_size, __shfl_xor_sync(kAllLanes, min_size, lanes));
    max_size = fmax(max_size, __shfl_xor_sync(kAllLanes, max_size, lanes));
  }
}

// One warp per shape.
template <typename T>
__global__ void __launch_bounds__(32) measure_kernel(const AnchorLevels<T> levels, Sizes* sizes) {
  const Shape<T> shape(levels, blockIdx.x);
  Sizes size;
  measure_axis(shape.corner, shape.width, shape.column_step, size.min_width, size.max_width);
  measure_axis(shape.corner + 1, shape.height, shape.row_step, size.min_height, size.max_height);
  if (threadIdx.x == 0) {
    const T* row = shape.corner + (shape.height - 1) * shape.row_step;
    const T* column = shape.corner + (shape.width - 1) * shape.column_step;
    const T* last = row + (shape.width - 1) * shape.column_step;
    // In a grid, x depends on the column only, and y on the row.
    CUDA_KERNEL_ASSERT(
        last[0] == column[0] && last[1] == row[1] && last[2] == column[2] && last[3] == row[3]);
    sizes[blockIdx.x] = size;
  }
}

// The positions whose centre is so near that an overlap with the box may be at least `overlap`. The
// centres are in order, so counting those below a limit finds its position.
template <typename T>
__device__ void reach(
    const T* axis, int64_t count, int64_t step, T low, T high, double max_size, double overlap,
    int64_t& begin, int64_t& end) {
  // The overlap is at most (size + box) / 2 - distance of the centres.
  const double limit = max_size + (double(high) - low) - 2 * overlap;
  begin = end = 0;
  for (int64_t first = 0; first < count; first += kSearchThreads) {
    const int64_t i = first + threadIdx.x;
    double distance = INFINITY; // of the centres, times 2
    if (i < count) {
      distance = double(axis[i * step]) + axis[i * step + 2] - (double(low) + high);
    }
    begin += __syncthreads_count(distance < -limit);
    end += __syncthreads_count(distance <= limit);
  }
}

// Offers the anchors of one shape that may be among the best.
template <typename T>
__device__ void search_shape(
    const Shape<T>& shape, const Sizes& sizes, const Box<T>& box, Best<T>& best) {
  const double width = double(box.x2) - box.x1, height = double(box.y2) - box.y1;
  const double area = sizes.min_width * sizes.min_height + width * height;
  // An IoU of at least t needs an intersection of at least t * (sum of the areas) / (1 + t).
  const double needed = best.bound() * area / (1 + best.bound()) * (1 - kSlack);
  const double widest = fmin(sizes.max_width, width), tallest = fmin(sizes.max_height, height);
  if (!(widest > 0 && tallest > 0)) {
    return;
  }
  int64_t top, bottom, left, right;
  reach(
      shape.corner + 1, shape.height, shape.row_step, box.y1, box.y2, sizes.max_height,
      needed / widest, top, bottom);
  reach(
      shape.corner, shape.width, shape.column_step, box.x1, box.x2, sizes.max_width,
      needed / tallest, left, right);
  if (top >= bottom || left >= right) {
    return;
  }
  const int64_t columns = right - left;
  best.offer(box, (bottom - top) * columns, /*disjoint=*/false, [&](int64_t i, int64_t& index) {
    const int64_t row = top + i / columns, column = left + i % columns;
    const T* x = shape.corner + column * shape.column_step;
    const T* y = shape.corner + row * shape.row_step;
    index = shape.first + (row * shape.width + column) * shape.per_cell;
    return Box<T>{x[0], y[1], x[2], y[3]};
  });
}

// Offers the anchors that overlap the box, shape by shape, the most promising first.
template <typename T>
__device__ void search_grids(
    const AnchorLevels<T>& levels, const Sizes* sizes, const Box<T>& box, Best<T>& best) {
  for (unsigned long long last = ~0ull;;) {
    // The bound of the next shape, and below it the shape: every warp finds them for itself.
    unsigned long long next = 0;
    for (int64_t s = threadIdx.x % 32; s < levels.shapes; s += 32) {
      const float bound = static_cast<float>(sizes[s].bound(box));
      const unsigned long long key =
          static_cast<unsigned long long>(__float_as_uint(bound)) << 32 | s;
      next = next < key && key < last ? key : next;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const unsigned long long other = __shfl_xor_sync(kAllLanes, next, lanes);
      next = next < other ? other : next;
    }
    const float bound = __uint_as_float(next >> 32);
    if (!(bound > 0) || bound < best.bound()) {
      return;
    }
    const int64_t s = next & 0xffffffff;
    search_shape(Shape<T>(levels, s), sizes[s], box, best);
    best.shrink();
    last = next;
  }
}

template <typename T>
__device__ void search_all(
    const AnchorLevels<T>& levels, const Box<T>& box, bool disjoint, Best<T>& best) {
  for (int l = 0; l < levels.count; ++l) {
    const AnchorLevel<T>& level = levels.level[l];
    best.offer(
        box, level.height * level.width * level.per_cell, disjoint, [&](int64_t i, int64_t& index) {
          index = level.first + i;
          return load_box(level.data + 4 * i);
        });
  }
  best.shrink();
}

// One block per object. `sizes` is null if the levels are no grids, `memory` if the candidates fit
// into shared memory.
template <typename T>
__global__ void __launch_bounds__(kSearchThreads) search_kernel(
    const AnchorLevels<T> levels, const Sizes* sizes, const T* gt_boxes, int k, int capacity,
    Candidate<T>* memory, int64_t* bags) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int size;
  const int64_t object = blockIdx.x;
  const Box<T> box = load_box(gt_boxes + 4 * object);
  Best<T> best(
      memory ? memory + object * capacity : reinterpret_cast<Candidate<T>*>(shared), capacity,
      &size, k);
  if (sizes) {
    search_grids(levels, sizes, box, best);
  } else {
    search_all(levels, box, /*disjoint=*/false, best);
  }
  int found = best.size();
  if (found < k) {
    // Anchors that do not overlap the object are many, and seldom needed: those by distance.
    best.clear();
    search_all(levels, box, /*disjoint=*/true, best);
    found = best.size();
  }
  CUDA_KERNEL_ASSERT(found == k); // else a coordinate is not finite
  best.write(bags + object * k);
}

template <typename T>
void search(
    const std::vector<at::Tensor>& anchors, const at::Tensor& gt_boxes, at::Tensor& bags) {
  AnchorLevels<T> levels;
  bool grids = true;
  for (const at::Tensor& x : anchors) {
    if (x.numel() > 0) {
      const bool grid = x.dim() == 4;
      levels.level[levels.count++] = {
          x.const_data_ptr<T>(), levels.anchors, x.size(0), grid ? x.size(1) : 1,
          grid ? x.size(2) : 1};
      levels.anchors += x.numel() / 4;
      levels.shapes += grid ? x.size(2) : 1;
      grids = grids && grid;
    }
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto bytes = gt_boxes.options().dtype(at::kByte);
  at::Tensor sizes, memory;
  if (grids) {
    sizes = at::empty({levels.shapes * static_cast<int64_t>(sizeof(Sizes))}, bytes);
    measure_kernel<T><<<levels.shapes, 32, 0, stream>>>(
        levels, static_cast<Sizes*>(sizes.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t k = bags.size(1), capacity = 2 * k + kStep * kSearchThreads;
  TORCH_CHECK_VALUE(capacity < 1 << 30, "k must be below 2^29, got ", k);
  int64_t shared_bytes = capacity * sizeof(Candidate<T>);
  if (shared_bytes > kMaxSharedBytes) {
    memory = at::empty({gt_boxes.size(0) * shared_bytes}, bytes);
    shared_bytes = 0;
  }
  search_kernel<T><<<gt_boxes.size(0), kSearchThreads, shared_bytes, stream>>>(
      levels, grids ? static_cast<const Sizes*>(sizes.const_data_ptr()) : nullptr,
      gt_boxes.const_data_ptr<T>(), k, capacity,
      memory.defined() ? static_cast<Candidate<T>*>(memory.mutable_data_ptr()) : nullptr,
      bags.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor iou_topk(at::TensorList anchors, const at::Tensor& gt_boxes, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  TORCH_CHECK(
      gt_boxes.dim() == 2 && gt_boxes.size(1) == 4, "gt_boxes must be (M, 4), got ",
      gt_boxes.sizes());
  TORCH_CHECK(
      anchors.size() <= kMaxLevels, "anchors may have ", kMaxLevels, " levels, got ",
      anchors.size());
  const c10::cuda::CUDAGuard guard(gt_boxes.device());
  check_boxes("gt_boxes", gt_boxes);
  std::vector<at::Tensor> levels;
  int64_t count = 0;
  for (const at::Tensor& level : anchors) {
    TORCH_CHECK(
        (level.dim() == 2 || level.dim() == 4) && level.size(-1) == 4 &&
            level.scalar_type() == gt_boxes.scalar_type(),
        "anchors must be (R, 4) or (H, W, A, 4), of the dtype and device of gt_boxes");
    check_device("anchors", level, gt_boxes);
    if (level.dim() == 2) {
      check_boxes("anchors", level);
    }
    levels.push_back(level.contiguous());
    count += level.numel() / 4;
  }
  at::Tensor bags =
      at::empty({gt_boxes.size(0), std::min(k, count)}, gt_boxes.options().dtype(at::kLong));
  if (bags.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES(gt_boxes.scalar_type(), "iou_topk", [&] {
      search<scalar_t>(levels, gt_boxes.contiguous(), bags);
    });
  }
  return bags;
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("iou_topk", iou_topk);
}

} // namespace freeanchor
