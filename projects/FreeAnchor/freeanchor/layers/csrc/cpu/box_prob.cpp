// matching.box_prob: P{a in A+}, without the IoU of every prediction with every object.
//
// A predicted box can only overlap an object by more than the threshold if its centre is near the
// object's, and its area similar. Coarse bins list the objects for which they are, so for most
// predictions nothing but the centre is decoded.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../box_iou.h"
#include "../checks.h"
#include "../levels.h"

namespace freeanchor {
namespace {

// Anchors per task. The results of the tasks are joined in order.
constexpr int64_t kChunk = 4096;

// The objects of one image by the centres and areas that boxes have which may match them.
template <typename T>
class Bins {
 public:
  // An IoU of more than t needs an overlap of more than t / (1 + t) * (width + object's width), so
  // the distance of the centres is less than (1 - t) / (2 * (1 + t)) * (width + object's width);
  // and the width, and the area, must be less than 1 / t times the object's.
  Bins(const Box<T>* objects, int64_t count, double threshold) {
    const double reach = std::min((1 - threshold) / (2 * threshold) * kSlack, 1e6);
    for (int64_t i = 0; i < count; ++i) {
      const Box<T>& box = objects[i];
      const double x = (double(box.x1) + box.x2) / 2, y = (double(box.y1) + box.y2) / 2;
      const double dx = (double(box.x2) - box.x1) * reach, dy = (double(box.y2) - box.y1) * reach;
      near_.push_back({T(x - dx), T(y - dy), T(x + dx), T(y + dy)});
      range_.x1 = std::min(range_.x1, near_[i].x1);
      range_.y1 = std::min(range_.y1, near_[i].y1);
      range_.x2 = std::max(range_.x2, near_[i].x2);
      range_.y2 = std::max(range_.y2, near_[i].y2);
    }
    scale_x_ = scale(range_.x2 - range_.x1);
    scale_y_ = scale(range_.y2 - range_.y1);
    // Counting sort: begin_[b] is where the objects of bin b begin in objects_.
    const auto for_each_bin = [&](auto visit) {
      for (int64_t i = 0; i < count; ++i) {
        const T area = objects[i].area();
        if (!(area > 0)) {
          continue; // nothing overlaps it
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

  static T scale(T range) {
    return range > T(1e-30) ? kSide / range : 0; // all in one bin if there is but a point
  }
  int bin_x(T x) const {
    return std::min(static_cast<int>((x - range_.x1) * scale_x_), kSide - 1);
  }
  int bin_y(T y) const {
    return std::min(static_cast<int>((y - range_.y1) * scale_y_), kSide - 1);
  }
  // An octave of areas, from one pixel on.
  static int area_bin(T area) {
    return std::clamp(std::ilogb(area), 0, kAreas - 1);
  }

  static constexpr T kLargest = std::numeric_limits<T>::max();
  Box<T> range_{kLargest, kLargest, -kLargest, -kLargest};
  T scale_x_, scale_y_;
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
  int64_t anchor, object; // of the batch
  T iou;
};

template <typename T>
struct Task {
  int64_t image, level, begin, end;
  std::vector<Match<T>> matches;
};

// Finds the predictions of a task that overlap an object by more than the threshold, by anchor.
template <typename scalar_t, typename T>
void find_matches(
    Task<T>& task, const Level<scalar_t>& deltas, const T* anchors, const Bins<T>& bins,
    const Box<T>* objects, int64_t first_object, const T* weights, T scale_clamp, T threshold) {
  for (int64_t j = task.begin; j < task.end; ++j) {
    const scalar_t* raw = deltas.at(task.image, j);
    const T* a = anchors + 4 * j;
    const Box<T> anchor{a[0], a[1], a[2], a[3]};
    TORCH_CHECK_VALUE(
        anchor.x2 >= anchor.x1 && anchor.y2 >= anchor.y1,
        "anchors must have finite coordinates with x1 <= x2 and y1 <= y2");
    const auto delta = [&](int d) {
      return static_cast<T>(raw[d * deltas.stride[4]]) / weights[d];
    };
    const T x = decode_centre(delta(0), anchor.x1, anchor.x2);
    const T y = decode_centre(delta(1), anchor.y1, anchor.y2);
    if (!bins.any(x, y)) {
      continue;
    }
    const T half_width = decode_half(delta(2), anchor.x1, anchor.x2, scale_clamp);
    const T half_height = decode_half(delta(3), anchor.y1, anchor.y2, scale_clamp);
    const Box<T> box{x - half_width, y - half_height, x + half_width, y + half_height};
    bins.for_each(x, y, box.area(), [&](int64_t i) {
      // The IoU is at most the ratio of the widths, and of the heights.
      const Box<T>& object = objects[i];
      if (!similar(box.x2 - box.x1, object.x2 - object.x1, threshold) ||
          !similar(box.y2 - box.y1, object.y2 - object.y1, threshold)) {
        return;
      }
      const T iou = box_iou(object, box);
      if (iou > threshold) {
        task.matches.push_back({deltas.first + j, first_object + i, iou});
      }
    });
  }
}

template <typename scalar_t, typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> match(
    at::TensorList delta_tensors, const std::vector<at::Tensor>& anchors,
    const at::Tensor& gt_boxes, const at::Tensor& gt_classes, at::IntArrayRef counts,
    int64_t num_classes, at::ArrayRef<double> weight_values, double scale_clamp,
    double threshold) {
  const auto deltas = view_levels<scalar_t>("deltas", delta_tensors);
  const T weights[4] = {
      T(weight_values[0]), T(weight_values[1]), T(weight_values[2]), T(weight_values[3])};
  const auto* objects = reinterpret_cast<const Box<T>*>(gt_boxes.const_data_ptr<T>());
  const int64_t* classes = gt_classes.const_data_ptr<int64_t>();

  std::vector<Bins<T>> bins;
  std::vector<int64_t> first_object;
  std::vector<Task<T>> tasks;
  int64_t objects_before = 0;
  for (int64_t n = 0; n < deltas.images; ++n) {
    bins.emplace_back(objects + objects_before, counts[n], threshold);
    first_object.push_back(objects_before);
    for (int64_t l = 0; l < deltas.count && counts[n] > 0; ++l) {
      for (int64_t j = 0; j < deltas.level[l].anchors; j += kChunk) {
        tasks.push_back({n, l, j, std::min(j + kChunk, deltas.level[l].anchors), {}});
      }
    }
    objects_before += counts[n];
  }
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Task<T>& task = tasks[t];
      const int64_t first = first_object[task.image];
      find_matches<scalar_t, T>(
          task, deltas.level[task.level], anchors[task.level].template const_data_ptr<T>(),
          bins[task.image], objects + first, first, weights, scale_clamp, threshold);
    }
  });

  at::Tensor max_iou = at::zeros({gt_boxes.size(0)}, gt_boxes.options());
  T* highest = max_iou.template mutable_data_ptr<T>();
  for (const Task<T>& task : tasks) {
    for (const Match<T>& match : task.matches) {
      highest[match.object] = std::max(highest[match.object], match.iou);
    }
  }
  // Tasks come by image and anchor, so only the classes of one anchor are to be ordered. Objects of
  // the same class share a cell.
  std::vector<int64_t> cells;
  std::vector<T> probs;
  for (const Task<T>& task : tasks) {
    for (const Match<T>& match : task.matches) {
      const int64_t cell =
          (task.image * deltas.anchors + match.anchor) * num_classes + classes[match.object];
      const T ramp = highest[match.object] - T(threshold);
      const T prob = (match.iou - T(threshold)) / ramp;
      size_t at = cells.size();
      while (at > 0 && cells[at - 1] > cell) {
        --at;
      }
      if (at > 0 && cells[at - 1] == cell) {
        probs[at - 1] = std::max(probs[at - 1], prob);
      } else {
        cells.insert(cells.begin() + at, cell);
        probs.insert(probs.begin() + at, prob);
      }
    }
  }
  const auto copy = [](const auto& values, const at::TensorOptions& options) {
    at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, options);
    std::copy(
        values.begin(), values.end(),
        tensor.template mutable_data_ptr<std::decay_t<decltype(values[0])>>());
    return tensor;
  };
  return {copy(cells, gt_classes.options()), copy(probs, gt_boxes.options()), max_iou};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> box_prob(
    at::TensorList deltas, at::TensorList anchors, const at::Tensor& gt_boxes,
    const at::Tensor& gt_classes, at::IntArrayRef counts, int64_t num_classes,
    at::ArrayRef<double> weights, double scale_clamp, double threshold) {
  check_box_prob(deltas, anchors, gt_boxes, gt_classes, counts, num_classes, weights);
  std::vector<at::Tensor> anchor_levels;
  for (const at::Tensor& level : anchors) {
    anchor_levels.push_back(level.contiguous());
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, deltas[0].scalar_type(), "box_prob", [&] {
        const auto run = [&](auto compute) {
          return match<scalar_t, decltype(compute)>(
              deltas, anchor_levels, gt_boxes.contiguous(), gt_classes.contiguous(), counts,
              num_classes, weights, scale_clamp, threshold);
        };
        result = gt_boxes.scalar_type() == at::kDouble ? run(double()) : run(float());
      });
  return result;
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("box_prob", box_prob);
}

} // namespace freeanchor
