// matching.box_prob: P{a in A+}, without the IoU of every prediction with every object.
//
// A predicted box can only overlap an object by more than the threshold if its centre is near the
// object's. Of most blocks of predictions none is near any, so that nothing but their centres is
// decoded.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../arguments.h"
#include "iou_block.h"

namespace freeanchor {

// Where the centres of the boxes are that may match an object. An IoU of more than t needs an
// overlap of more than t / (1 + t) * (width + object's width), so the distance of the centres is
// less than (1 - t) / (2 * (1 + t)) * (width + object's width), and the width less than 1 / t times
// the object's.
template <typename T>
Box<T> reach(const Box<T>& object, T threshold) {
  const T factor = (1 - threshold) / (2 * threshold) * T(1 + 1e-4); // may be infinite
  const T x = object.x1 / 2 + object.x2 / 2, y = object.y1 / 2 + object.y2 / 2;
  // NaN, of no width times infinity, is near nothing. Coordinates far from 0 are rounded much.
  const T rounding = 4 * std::numeric_limits<T>::epsilon();
  const T dx = (object.x2 - object.x1) * factor + std::abs(x) * rounding;
  const T dy = (object.y2 - object.y1) * factor + std::abs(y) * rounding;
  return {x - dx, y - dy, x + dx, y + dy};
}

template <typename T>
struct Match {
  int64_t anchor, object;
  T iou;
};

// Up to kBlock anchors of an image.
template <typename T>
struct Task {
  int64_t image, begin, end;
  std::vector<Match<T>> matches;
};

// Finds the predictions of a task that overlap an object by more than the threshold.
template <typename T>
void find_matches(const Matching<T>& matching, const Box<T>* reaches, Task<T>& task) {
  constexpr T kLargest = std::numeric_limits<T>::max();
  Box<T> centres{kLargest, kLargest, -kLargest, -kLargest}; // without those that are NaN
  for (int64_t j = task.begin; j < task.end; ++j) {
    const Prediction<T> at = matching.predict(task.image, j);
    centres = {
        std::min(centres.x1, at.x), std::min(centres.y1, at.y), std::max(centres.x2, at.x),
        std::max(centres.y2, at.y)};
  }
  const Objects<T>& objects = matching.objects;
  std::vector<int64_t> near;
  for (int64_t i = objects.first[task.image]; i < objects.first[task.image + 1]; ++i) {
    if (overlap(reaches[i], centres)) {
      near.push_back(i);
    }
  }
  if (near.empty()) {
    return;
  }
  Box<T> boxes[kBlock];
  T iou[kBlock];
  const auto n = static_cast<int32_t>(task.end - task.begin);
  for (int32_t j = 0; j < n; ++j) {
    boxes[j] = matching.predict(task.image, task.begin + j).box;
  }
  for (const int64_t i : near) {
    if (!iou_block(objects.boxes[i], boxes, n, matching.threshold, iou)) {
      continue;
    }
    for (int32_t j = 0; j < n; ++j) {
      if (iou[j] > matching.threshold) {
        task.matches.push_back({task.begin + j, i, iou[j]});
      }
    }
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
  const Objects<T>& objects = matching.objects;
  std::vector<Box<T>> reaches;
  for (int64_t i = 0; i < objects.count; ++i) {
    reaches.push_back(reach(objects.boxes[i], matching.threshold));
  }
  std::vector<Task<T>> tasks;
  for (int64_t n = 0; n < deltas.images; ++n) {
    for (int64_t j = 0; j < deltas.anchors && objects.first[n] < objects.first[n + 1];
         j += kBlock) {
      tasks.push_back({n, j, std::min(j + kBlock, deltas.anchors), {}});
    }
  }
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      find_matches(matching, reaches.data(), tasks[t]);
    }
  });

  for (const Task<T>& task : tasks) {
    for (const Match<T>& match : task.matches) {
      highest[match.object] = std::max(highest[match.object], match.iou);
    }
  }
  std::vector<Cell<T>> cells;
  for (const Task<T>& task : tasks) {
    for (const Match<T>& match : task.matches) {
      const int64_t row = task.image * deltas.anchors + match.anchor;
      const T ramp = highest[match.object] - matching.threshold;
      cells.push_back(
          {row * objects.num_classes + objects.classes[match.object],
           (match.iou - matching.threshold) / ramp});
    }
  }
  // Objects of the same class share a cell: the one with the highest P.
  std::sort(cells.begin(), cells.end(), [](const Cell<T>& a, const Cell<T>& b) {
    return a.index != b.index ? a.index < b.index : a.prob > b.prob;
  });
  const auto same = [](const Cell<T>& a, const Cell<T>& b) { return a.index == b.index; };
  cells.erase(std::unique(cells.begin(), cells.end(), same), cells.end());
  return cells;
}

} // namespace freeanchor
