// matching.iou_topk: bags of anchors, without a matrix of objects and anchors.
//
// Anchors that form grids are searched exactly by looking at few of them: an upper bound of the IoU
// that each shape of anchor can reach excludes most shapes, and for the others the k-th best IoU so
// far bounds the rows and columns to look at. Other anchors are searched exhaustively, in blocks.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../box_iou.h"
#include "../checks.h"
#include "simd.h"

namespace freeanchor {
namespace {

// Bounds are computed in double precision. What rounding in float32 may lift above one is looked at
// too.
constexpr double kSlack = 1e-5;
// Anchors whose IoU is computed at a time in the exhaustive search, and objects that share a pass
// over the anchors.
constexpr int64_t kBlock = 256;
constexpr int64_t kObjects = 32;

// The best k of the candidates that were offered, and some more.
template <typename T>
class Best {
 public:
  explicit Best(int64_t k) : k_(k), candidates_(4 * k + 64), ious_(candidates_.size()) {}

  void clear() {
    size_ = 0;
    bound_ = highest_ = 0;
  }

  int64_t size() const {
    return size_;
  }

  // Below this IoU an anchor is not among the best.
  T bound() const {
    return bound_;
  }

  FREEANCHOR_INLINE void offer(const Candidate<T>& candidate) {
    if (candidate.iou >= bound_ && candidate.distance >= 0) { // NaN cannot be ordered
      candidates_[size_] = candidate;
      ious_[size_] = candidate.iou;
      highest_ = std::max(highest_, candidate.iou);
      if (++size_ == static_cast<int64_t>(candidates_.size())) {
        shrink();
      }
    }
  }

  // Raises the bound towards the k-th best IoU, by bisection: passes without branches are faster
  // than finding it exactly.
  void raise_bound() {
    if (size_ < k_) {
      return;
    }
    T high = highest_;
    for (int step = 0; step < 6; ++step) {
      const T middle = (bound_ + high) / 2;
      int32_t above = 0;
      for (int64_t i = 0; i < size_; ++i) {
        above += ious_[i] >= middle;
      }
      (above >= k_ ? bound_ : high) = middle;
    }
  }

  // Writes the indices of the best k in order.
  void write(int64_t* out) {
    raise_bound();
    const auto end = std::remove_if(
        candidates_.begin(), candidates_.begin() + size_,
        [this](const Candidate<T>& candidate) { return candidate.iou < bound_; });
    std::sort(candidates_.begin(), end);
    for (int64_t i = 0; i < k_; ++i) {
      out[i] = candidates_[i].index;
    }
  }

 private:
  void shrink() {
    const auto begin = candidates_.begin();
    std::nth_element(begin, begin + (k_ - 1), begin + size_);
    size_ = k_;
    bound_ = candidates_[k_ - 1].iou;
    for (int64_t i = 0; i < k_; ++i) {
      ious_[i] = candidates_[i].iou;
    }
  }

  int64_t k_, size_ = 0;
  T bound_ = 0, highest_ = 0;
  std::vector<Candidate<T>> candidates_;
  std::vector<T> ious_; // those of the candidates, side by side
};

// The coordinates along one axis of the anchors of a grid with one index a.
template <typename T>
struct Axis {
  T *low, *high;
  int64_t count;
  double min_size = std::numeric_limits<double>::infinity(), max_size = 0, per_step = 0;

  // Copies 2 * count coordinates to `memory`, from where they are far apart, and goes past them.
  Axis(const T* corners, int64_t stride, int64_t count, T*& memory)
      : low(memory), high(memory + count), count(count) {
    memory += 2 * count;
    bool valid = true;
    for (int64_t i = 0; i < count; ++i) {
      low[i] = corners[i * stride];
      high[i] = corners[i * stride + 2];
      const double size = double(high[i]) - low[i];
      valid &= size >= 0 && (i == 0 || centre(i - 1) <= centre(i));
      min_size = std::min(min_size, size);
      max_size = std::max(max_size, size);
    }
    TORCH_CHECK_VALUE(
        valid && std::isfinite(max_size),
        "anchors of the form (H, W, A, 4) must be grids: finite coordinates with x1 <= x2 and "
        "y1 <= y2, and centres that move to the right and down");
    const double range = centre(count - 1) - centre(0);
    per_step = range > 0 ? (count - 1) / range : 0;
  }

  double centre(int64_t i) const { // twice the centre
    return double(low[i]) + high[i];
  }

  // The first position whose centre is not below `value`: a guess, put right step by step.
  int64_t lower_bound(double value) const {
    const double guess = (value - centre(0)) * per_step;
    int64_t i = guess > 0 ? static_cast<int64_t>(std::min(guess, double(count - 1))) : 0;
    while (i > 0 && centre(i - 1) >= value) {
      --i;
    }
    while (i < count && centre(i) < value) {
      ++i;
    }
    return i;
  }

  // The positions [begin, end) outside of which the overlap with [a, b] is below `overlap`: it is
  // at most (size + (b - a)) / 2 - distance of the centres.
  std::pair<int64_t, int64_t> reach(T a, T b, double overlap) const {
    const double limit = max_size + (double(b) - a) - 2 * overlap;
    const double twice = double(a) + b;
    const int64_t begin = lower_bound(twice - limit);
    int64_t end = begin;
    while (end < count && centre(end) <= twice + limit) {
      ++end;
    }
    return {begin, end};
  }
};

// The anchors of one level and one index a: all translations of (nearly) the same box.
template <typename T>
struct Shape {
  Axis<T> x, y;
  int64_t first, per_cell;

  int64_t index(int64_t row, int64_t column) const {
    return first + (row * x.count + column) * per_cell;
  }

  // Upper bound of the IoU with a box.
  double bound(const Box<T>& box) const {
    const double width = double(box.x2) - box.x1, height = double(box.y2) - box.y1;
    const double inter = std::min(x.max_size, width) * std::min(y.max_size, height);
    const double area = x.min_size * y.min_size + width * height;
    return (inter < area - inter ? inter / (area - inter) : 1.0) * (1 + kSlack);
  }
};

template <typename T>
std::vector<Shape<T>> load_shapes(
    const std::vector<at::Tensor>& levels, std::vector<T>& coordinates) {
  std::vector<Shape<T>> shapes;
  int64_t size = 0, first = 0;
  for (const at::Tensor& level : levels) {
    size += 2 * (level.size(0) + level.size(1)) * level.size(2);
  }
  coordinates.resize(size);
  T* memory = coordinates.data();
  for (const at::Tensor& level : levels) {
    const int64_t height = level.size(0), width = level.size(1), per_cell = level.size(2);
    for (int64_t a = 0; a < per_cell && level.numel() > 0; ++a) {
      const T* corner = level.const_data_ptr<T>() + 4 * a;
      const Axis<T> x(corner, 4 * per_cell, width, memory);
      const Axis<T> y(corner + 1, 4 * per_cell * width, height, memory);
      const T* last = corner + level.numel() - 4 * per_cell;
      TORCH_CHECK_VALUE(
          last[0] == x.low[width - 1] && last[2] == x.high[width - 1] &&
              last[1] == y.low[height - 1] && last[3] == y.high[height - 1],
          "anchors of the form (H, W, A, 4) must be grids: x depends on the column only, y on the "
          "row");
      shapes.push_back({x, y, first + a, per_cell});
    }
    first += level.numel() / 4;
  }
  return shapes;
}

// Offers the anchors of one shape.
template <typename T>
void search_shape(const Shape<T>& shape, const Box<T>& box, Best<T>& best) {
  const double width = double(box.x2) - box.x1, height = double(box.y2) - box.y1;
  const double area = shape.x.min_size * shape.y.min_size + width * height;
  const double widest = std::min(shape.x.max_size, width);
  // An IoU of at least t needs an intersection of at least t * (sum of the areas) / (1 + t).
  const auto needed = [&] { return best.bound() * area / (1 + best.bound()) * (1 - kSlack); };
  const auto [top, bottom] = shape.y.reach(box.y1, box.y2, widest > 0 ? needed() / widest : 0);
  const auto search_row = [&](int64_t row) {
    const T y1 = shape.y.low[row], y2 = shape.y.high[row];
    const T overlap = std::min(y2, box.y2) - std::max(y1, box.y1);
    const double wanted = needed() / overlap;
    if (!(overlap > 0) || wanted > widest) {
      return;
    }
    const auto [left, right] = shape.x.reach(box.x1, box.x2, wanted);
    for (int64_t column = left; column < right; ++column) {
      const Box<T> anchor{shape.x.low[column], y1, shape.x.high[column], y2};
      const T iou = box_iou(box, anchor);
      if (iou > 0 && iou >= best.bound()) {
        best.offer({iou, centre_distance(anchor, box), shape.index(row, column)});
      }
    }
  };
  // From the row of the nearest centre outwards, so that the bound rises early.
  const int64_t middle =
      std::clamp(shape.y.lower_bound(double(box.y1) + box.y2), top, bottom);
  for (int64_t below = middle, above = middle - 1; below < bottom || above >= top;) {
    if (below < bottom) {
      search_row(below++);
    }
    if (above >= top) {
      search_row(above--);
    }
  }
}

// Offers the anchors of grids that overlap a box, those of the most similar shape first.
template <typename T>
void search_grids(const std::vector<Shape<T>>& shapes, const Box<T>& box, Best<T>& best) {
  best.clear();
  std::vector<double> bounds;
  for (const Shape<T>& shape : shapes) {
    bounds.push_back(shape.bound(box));
  }
  while (true) {
    const auto next = std::max_element(bounds.begin(), bounds.end());
    if (*next < 0 || *next < best.bound()) {
      return;
    }
    search_shape(shapes[next - bounds.begin()], box, best);
    best.raise_bound();
    *next = -1;
  }
}

// IoU of a box with a block of anchors, and whether any is at least `bound`.
template <typename T>
FREEANCHOR_INLINE bool iou_loop(
    const T* __restrict x1, const T* __restrict y1, const T* __restrict x2, const T* __restrict y2,
    T* __restrict iou, int64_t n, Box<T> box, T bound) {
  const T area = box.area();
  int any = 0;
  for (int64_t i = 0; i < n; ++i) {
    T width = (box.x2 < x2[i] ? box.x2 : x2[i]) - (box.x1 > x1[i] ? box.x1 : x1[i]);
    T height = (box.y2 < y2[i] ? box.y2 : y2[i]) - (box.y1 > y1[i] ? box.y1 : y1[i]);
    width = width > 0 ? width : 0;
    height = height > 0 ? height : 0;
    const T inter = width * height;
    const T value = inter / (area + (x2[i] - x1[i]) * (y2[i] - y1[i]) - inter);
    iou[i] = inter > 0 ? value : 0;
    any |= iou[i] >= bound;
  }
  return any != 0;
}

template <bool>
FREEANCHOR_INLINE bool iou_block_body(
    const float* block, float* iou, int64_t n, const Box<float>& box, float bound) {
  return iou_loop(
      block, block + kBlock, block + 2 * kBlock, block + 3 * kBlock, iou, n, box, bound);
}

FREEANCHOR_SIMD(
    bool, iou_block,
    (const float* block, float* iou, int64_t n, const Box<float>& box, float bound),
    iou_block_body, block, iou, n, box, bound)

bool iou_block(
    const double* block, double* iou, int64_t n, const Box<double>& box, double bound) {
  return iou_loop(
      block, block + kBlock, block + 2 * kBlock, block + 3 * kBlock, iou, n, box, bound);
}

// Offers all anchors with an IoU of at least `lowest` to the bests of some objects.
template <typename T>
void search_all(
    const std::vector<at::Tensor>& levels, const Box<T>* boxes, int64_t count, T lowest,
    Best<T>* best) {
  for (int64_t i = 0; i < count; ++i) {
    best[i].clear();
  }
  alignas(64) T block[4 * kBlock], iou[kBlock];
  int64_t first = 0;
  for (const at::Tensor& level : levels) {
    const T* data = level.const_data_ptr<T>();
    const int64_t anchors = level.numel() / 4;
    for (int64_t begin = 0; begin < anchors; begin += kBlock) {
      const int64_t n = std::min(kBlock, anchors - begin);
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t c = 0; c < 4; ++c) {
          block[c * kBlock + j] = data[4 * (begin + j) + c];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const T bound = std::max(best[i].bound(), lowest);
        if (!iou_block(block, iou, n, boxes[i], bound)) {
          continue;
        }
        for (int64_t j = 0; j < n; ++j) {
          if (iou[j] >= bound) {
            const T* a = data + 4 * (begin + j);
            const T distance = centre_distance(Box<T>{a[0], a[1], a[2], a[3]}, boxes[i]);
            best[i].offer({iou[j], distance, first + begin + j});
          }
        }
      }
    }
    first += anchors;
  }
}

// Writes the bag of an object that was searched for.
template <typename T>
void write_bag(
    const std::vector<at::Tensor>& levels, const Box<T>& box, Best<T>& best, int64_t k,
    int64_t* bag) {
  if (best.size() < k) {
    // Anchors that do not overlap the object fill its bag, the nearest first.
    search_all(levels, &box, 1, T(0), &best);
    TORCH_CHECK_VALUE(best.size() >= k, "gt_boxes and anchors must have finite coordinates");
  }
  best.write(bag);
}

template <typename T>
void search(
    const std::vector<at::Tensor>& levels, const std::vector<Shape<T>>& shapes, const Box<T>* boxes,
    int64_t begin, int64_t end, int64_t k, int64_t* bags) {
  const int64_t together = shapes.empty() ? std::min(kObjects, end - begin) : 1;
  std::vector<Best<T>> best(together, Best<T>(k));
  for (int64_t first = begin; first < end; first += together) {
    const int64_t count = std::min(together, end - first);
    if (shapes.empty()) {
      search_all(levels, boxes + first, count, std::numeric_limits<T>::min(), best.data());
    } else {
      search_grids(shapes, boxes[first], best[0]);
    }
    for (int64_t i = 0; i < count; ++i) {
      write_bag(levels, boxes[first + i], best[i], k, bags + (first + i) * k);
    }
  }
}

at::Tensor iou_topk(at::TensorList anchors, const at::Tensor& gt_boxes, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  TORCH_CHECK(
      gt_boxes.dim() == 2 && gt_boxes.size(1) == 4, "gt_boxes must be (M, 4), got ",
      gt_boxes.sizes());
  check_boxes("gt_boxes", gt_boxes);
  std::vector<at::Tensor> levels;
  int64_t count = 0;
  for (const at::Tensor& level : anchors) {
    TORCH_CHECK(
        (level.dim() == 2 || level.dim() == 4) && level.size(-1) == 4 &&
            level.scalar_type() == gt_boxes.scalar_type() && level.is_cpu(),
        "anchors must be (R, 4) or (H, W, A, 4), of the dtype and device of gt_boxes");
    if (level.dim() == 2) {
      check_boxes("anchors", level);
    }
    levels.push_back(level.contiguous());
    count += level.numel() / 4;
  }
  at::Tensor bags =
      at::empty({gt_boxes.size(0), std::min(k, count)}, gt_boxes.options().dtype(at::kLong));
  if (bags.numel() == 0) {
    return bags;
  }
  const at::Tensor boxes_c = gt_boxes.contiguous();
  AT_DISPATCH_FLOATING_TYPES(gt_boxes.scalar_type(), "iou_topk", [&] {
    const bool grids = std::all_of(
        levels.begin(), levels.end(), [](const at::Tensor& level) { return level.dim() == 4; });
    std::vector<scalar_t> coordinates;
    std::vector<Shape<scalar_t>> shapes;
    if (grids) {
      shapes = load_shapes<scalar_t>(levels, coordinates);
    }
    const auto* boxes = reinterpret_cast<const Box<scalar_t>*>(boxes_c.const_data_ptr<scalar_t>());
    int64_t* out = bags.mutable_data_ptr<int64_t>();
    k = bags.size(1);
    at::parallel_for(0, bags.size(0), 4, [&](int64_t begin, int64_t end) {
      search(levels, shapes, boxes, begin, end, k, out);
    });
  });
  return bags;
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("iou_topk", iou_topk);
}

} // namespace freeanchor
