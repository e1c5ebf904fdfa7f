// The exact search for bags among anchors that form grids, which looks at few of them.
//
// An upper bound of the IoU that each shape of anchor can reach excludes most shapes, and for the
// others the k-th best IoU so far bounds the rows and columns to look at.
#pragma once

#include "../arguments.h"
#include "best.h"

namespace freeanchor {

// Bounds are computed in double precision. What rounding in float32 may lift above one is looked at
// too.
constexpr double kSlack = 1e-5;

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
    raise(valid && max_size <= std::numeric_limits<T>::max() ? kNone : kGrid);
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

// Checks the grids among the levels, and gives their shapes, whose coordinates lie in the memory.
template <typename T>
std::vector<Shape<T>> load_shapes(const Levels<T>& levels, std::vector<T>& coordinates) {
  std::vector<Shape<T>> shapes;
  int64_t size = 0;
  for (const Level<T>& level : levels) {
    size += level.grid ? 2 * (level.height + level.width) * level.per_cell : 0;
  }
  coordinates.resize(size);
  T* memory = coordinates.data();
  for (const Level<T>& level : levels) {
    for (int a = 0; level.grid && level.anchors > 0 && a < level.per_cell; ++a) {
      const T* corners = level.data + a * level.stride[3];
      const Axis<T> x(corners, level.stride[2], level.width, memory);
      const Axis<T> y(corners + 1, level.stride[1], level.height, memory);
      const Box<T>& last = level.boxes()[level.anchors - level.per_cell + a];
      const bool valid = last.x1 == x.low[x.count - 1] && last.x2 == x.high[x.count - 1] &&
                         last.y1 == y.low[y.count - 1] && last.y2 == y.high[y.count - 1];
      raise(valid ? kNone : kGrid);
      shapes.push_back({x, y, level.first + a, level.per_cell});
    }
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
  const double needed = best.bound() * area / (1 + best.bound()) * (1 - kSlack);
  const auto [top, bottom] = shape.y.reach(box.y1, box.y2, widest > 0 ? needed / widest : 0);
  for (int64_t row = top; row < bottom; ++row) {
    const T y1 = shape.y.low[row], y2 = shape.y.high[row];
    const T overlap = std::min(y2, box.y2) - std::max(y1, box.y1);
    const double wanted = needed / overlap;
    if (!(overlap > 0) || wanted > widest) {
      continue;
    }
    const auto [left, right] = shape.x.reach(box.x1, box.x2, wanted);
    for (int64_t column = left; column < right; ++column) {
      const Box<T> anchor{shape.x.low[column], y1, shape.x.high[column], y2};
      best.offer({box_iou(box, anchor), centre_distance(anchor, box), shape.index(row, column)});
    }
  }
}

// Offers the anchors of grids that overlap a box, those of the most similar shape first.
template <typename T>
void search_grids(const std::vector<Shape<T>>& shapes, const Box<T>& box, Best<T>& best) {
  std::vector<double> bounds;
  for (const Shape<T>& shape : shapes) {
    bounds.push_back(shape.bound(box));
  }
  while (true) {
    const auto next = std::max_element(bounds.begin(), bounds.end());
    if (*next < best.bound()) {
      return;
    }
    search_shape(shapes[next - bounds.begin()], box, best);
    best.raise_bound();
    *next = -1;
  }
}

} // namespace freeanchor
