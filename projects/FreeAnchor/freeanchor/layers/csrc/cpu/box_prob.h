// matching.box_prob: P{a in A+}, without the IoU of every prediction with every object.
//
// A predicted box can only overlap an object by more than the threshold if its centre is near the
// object's, and its area similar. Coarse bins list the objects for which they are, so for most
// predictions nothing but the centre is decoded.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../arguments.h"

namespace freeanchor {

// Anchors per task. The results of the tasks are joined in order.
constexpr int32_t kAnchors = 4096;

// The objects of one image by the centres and areas that boxes have which may match them.
template <typename T>
class Bins {
 public:
  // An IoU of more than t needs an overlap of more than t / (1 + t) * (width + object's width), so
  // the distance of the centres is less than (1 - t) / (2 * (1 + t)) * (width + object's width);
  // and the width, and the area, must be less than 1 / t times the object's.
  Bins(const Box<T>* objects, int64_t count, double threshold) {
    const double reach = (1 - threshold) / (2 * threshold) * kSlack; // may be infinite
    for (int64_t i = 0; i < count; ++i) {
      const Box<T>& box = objects[i];
      const double x = (double(box.x1) + box.x2) / 2, y = (double(box.y1) + box.y2) / 2;
      const double dx = (double(box.x2) - box.x1) * reach, dy = (double(box.y2) - box.y1) * reach;
      near_.push_back({finite(x - dx), finite(y - dy), finite(x + dx), finite(y + dy)});
      range_.x1 = std::min(range_.x1, near_[i].x1);
      range_.y1 = std::min(range_.y1, near_[i].y1);
      range_.x2 = std::max(range_.x2, near_[i].x2);
      range_.y2 = std::max(range_.y2, near_[i].y2);
    }
    std::tie(first_x_, scale_x_) = scale(range_.x1, range_.x2);
    std::tie(first_y_, scale_y_) = scale(range_.y1, range_.y2);
    // Counting sort: begin_[b] is where the objects of bin b begin in objects_.
    const auto for_each_bin = [&](auto visit) {
      for (int64_t i = 0; i < count; ++i) {
        const T area = objects[i].area();
        if (!(area > 0 && area <= kLargest)) {
          continue; // no IoU with it is above 0
        }
        const int largest = area_bin(T(area / threshold * kSlack));
        for (int size = area_bin(T(area * threshold / kSlack)); size <= largest; ++size) {
          for (int y = bin_y(near_[i].y1); y <= bin_y(near_[i].y2); ++y) {
            for (int x = bin_x(near_[i].x1); x <= bin_x(near_[i].x2); ++x) {
              visit((size * kSide + y) * kSide + x, i);
            }
          }
        }
      }
    };
    begin_.assign(kAreas * kSide * kSide + 1, 0);
    for_each_bin([&](int bin, int64_t) {
      ++begin_[bin + 1];
      occupied_[bin % (kSide * kSide)] = true;
    });
    for (size_t bin = 1; bin < begin_.size(); ++bin) {
      begin_[bin] += begin_[bin - 1];
    }
    objects_.resize(begin_.back());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    for_each_bin([&](int bin, int64_t i) { objects_[next[bin]++] = static_cast<int32_t>(i); });
  }

  // Whether a box with this centre may match any object; not if the centre is NaN.
  bool any(T x, T y) const {
    return range_.x1 <= x && x <= range_.x2 && range_.y1 <= y && y <= range_.y2 &&
           occupied_[bin_y(y) * kSide + bin_x(x)];
  }

  // Calls visit(i) for every object, in order, that a box may match for which any() is true.
  template <typename F>
  void for_each(T x, T y, T area, F visit) const {
    const int bin = (area_bin(area) * kSide + bin_y(y)) * kSide + bin_x(x);
    for (int64_t b = begin_[bin]; b < begin_[bin + 1]; ++b) {
      const Box<T>& near = near_[objects_[b]];
      if ((near.x1 <= x) & (x <= near.x2) & (near.y1 <= y) & (y <= near.y2)) { // one branch
        visit(objects_[b]);
      }
    }
  }

 private:
  static constexpr int kSide = 32, kAreas = 16; // bins
  static constexpr double kSlack = 1 + 1e-4;

  // NaN, of no width times an infinite reach, is near nothing.
  static T finite(double x) {
    return static_cast<T>(std::clamp(x, -double(kLargest), double(kLargest)));
  }
  // All in one bin if there is but a point, or the range overflows.
  static std::pair<T, T> scale(T low, T high) {
    const T range = high - low;
    const bool fits = range > T(1e-30) && range <= kLargest;
    return fits ? std::pair<T, T>(low, kSide / range) : std::pair<T, T>(0, 0);
  }
  int bin_x(T x) const {
    return std::min(static_cast<int>((x - first_x_) * scale_x_), kSide - 1);
  }
  int bin_y(T y) const {
    return std::min(static_cast<int>((y - first_y_) * scale_y_), kSide - 1);
  }
  // An octave of areas, from one pixel on.
  static int area_bin(T area) {
    return std::clamp(std::ilogb(area), 0, kAreas - 1);
  }

  static constexpr T kLargest = std::numeric_limits<T>::max();
  Box<T> range_{kLargest, kLargest, -kLargest, -kLargest};
  T first_x_, first_y_, scale_x_, scale_y_;
  std::array<bool, kSide * kSide> occupied_{};
  std::vector<Box<T>> near_;
  std::vector<int64_t> begin_;
  std::vector<int32_t> objects_;
};

template <typename T>
bool similar(T a, T b, T threshold) {
  return std::min(a, b) >= std::max(a, b) * threshold * T(1 - 1e-4);
}

template <typename T>
struct Match {
  int64_t anchor, object;
  T iou;
};

// Anchors of a level in an image.
template <typename T>
struct Task {
  int64_t image;
  int level;
  int32_t begin, end;
  std::vector<Match<T>> matches;
};

// Finds the predictions of a task that overlap an object by more than the threshold, by anchor.
template <typename T>
void find_matches(const Matching<T>& matching, const Bins<T>& bins, Task<T>& task) {
  const Level<T>& deltas = matching.deltas.level[task.level];
  const Box<T>* anchors = matching.anchors.level[task.level].boxes();
  const int64_t first_object = matching.objects.first[task.image];
  for (int32_t j = task.begin; j < task.end; ++j) {
    const T* raw = deltas.at(task.image, j);
    const Box<T>& anchor = anchors[j];
    const auto delta = [&](int d) { return raw[d * deltas.stride[4]] / matching.weights[d]; };
    const T x = decode_centre(delta(0), anchor.x1, anchor.x2);
    const T y = decode_centre(delta(1), anchor.y1, anchor.y2);
    if (!bins.any(x, y)) {
      continue;
    }
    const T half_width = decode_half(delta(2), anchor.x1, anchor.x2, matching.scale_clamp);
    const T half_height = decode_half(delta(3), anchor.y1, anchor.y2, matching.scale_clamp);
    const Box<T> box{x - half_width, y - half_height, x + half_width, y + half_height};
    bins.for_each(x, y, box.area(), [&](int64_t i) {
      // The IoU is at most the ratio of the widths, and of the heights.
      const Box<T>& object = matching.objects.boxes[first_object + i];
      if (!similar(box.x2 - box.x1, object.x2 - object.x1, matching.threshold) ||
          !similar(box.y2 - box.y1, object.y2 - object.y1, matching.threshold)) {
        return;
      }
      const T iou = box_iou(object, box);
      if (iou > matching.threshold) {
        task.matches.push_back({deltas.first + j, first_object + i, iou});
      }
    });
  }
}

// P{a in A+} of the element `index` of the logits.
template <typename T>
struct Cell {
  int64_t index;
  T prob;
};

// Gives the cells, and raises `highest`, zeros, to the highest IoU with each object.
template <typename T>
std::vector<Cell<T>> box_prob(const Matching<T>& matching, T* highest) {
  const Levels<T>& deltas = matching.deltas;
  std::vector<Bins<T>> bins;
  std::vector<Task<T>> tasks;
  for (int64_t n = 0; n < deltas.images; ++n) {
    const int64_t begin = matching.objects.first[n], count = matching.objects.first[n + 1] - begin;
    bins.emplace_back(matching.objects.boxes + begin, count, matching.threshold);
    for (int l = 0; l < deltas.count && count > 0; ++l) {
      for (int32_t j = 0; j < deltas.level[l].anchors; j += kAnchors) {
        tasks.push_back({n, l, j, std::min(j + kAnchors, deltas.level[l].anchors), {}});
      }
    }
  }
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      find_matches(matching, bins[tasks[t].image], tasks[t]);
    }
  });

  for (const Task<T>& task : tasks) {
    for (const Match<T>& match : task.matches) {
      highest[match.object] = std::max(highest[match.object], match.iou);
    }
  }
  // Objects of the same class share a cell.
  std::vector<Cell<T>> cells;
  for (const Task<T>& task : tasks) {
    int64_t anchor = -1;
    size_t first = 0; // cell of the anchor
    for (const Match<T>& match : task.matches) {
      if (match.anchor != anchor) {
        anchor = match.anchor;
        first = cells.size();
      }
      const int64_t index = (task.image * deltas.anchors + anchor) * matching.num_classes +
                            matching.objects.classes[match.object];
      const T ramp = highest[match.object] - matching.threshold;
      const T prob = (match.iou - matching.threshold) / ramp;
      const auto same = std::find_if(cells.begin() + first, cells.end(), [&](const Cell<T>& cell) {
        return cell.index == index;
      });
      if (same == cells.end()) {
        cells.push_back({index, prob});
      } else {
        same->prob = std::max(same->prob, prob);
      }
    }
  }
  return cells;
}

} // namespace freeanchor
