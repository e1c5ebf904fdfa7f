// matching.iou_topk: bags of anchors, without a matrix of objects and anchors.
//
// If all levels of anchors are grids, see grid_search.h. Others are searched exhaustively, in
// blocks.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "best.h"
#include "grid_search.h"
#include "simd.h"

namespace freeanchor {
namespace {

// Anchors whose IoU is computed at a time in the exhaustive search, and objects that share a pass
// over the anchors.
constexpr int64_t kBlock = 256;
constexpr int64_t kObjects = 32;

// IoU of a box with a block of anchors, and whether any is at least `bound`.
template <typename T>
bool iou_block(const T* block, T* iou, int64_t n, const Box<T>& box, T bound) {
  return simd([=](auto) FREEANCHOR_INLINE_LAMBDA {
    const T* __restrict in = block;
    T* __restrict out = iou;
    int any = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Box<T> anchor{in[i], in[kBlock + i], in[2 * kBlock + i], in[3 * kBlock + i]};
      out[i] = box_iou(box, anchor);
      any |= out[i] >= bound;
    }
    return any != 0;
  });
}

// Offers all anchors with an IoU of at least `lowest` to the bests of some objects.
template <typename T>
void search_all(
    const Levels<T>& levels, const Box<T>* boxes, int64_t count, T lowest, Best<T>* best) {
  for (int64_t i = 0; i < count; ++i) {
    best[i].clear();
  }
  alignas(64) T block[4 * kBlock], iou[kBlock];
  for (const Level<T>& level : levels) {
    for (int64_t begin = 0; begin < level.anchors; begin += kBlock) {
      const Box<T>* anchors = level.boxes() + begin;
      const int64_t n = std::min(kBlock, level.anchors - begin);
      for (int64_t j = 0; j < n; ++j) {
        block[j] = anchors[j].x1;
        block[kBlock + j] = anchors[j].y1;
        block[2 * kBlock + j] = anchors[j].x2;
        block[3 * kBlock + j] = anchors[j].y2;
      }
      for (int64_t i = 0; i < count; ++i) {
        const T bound = std::max(best[i].bound(), lowest);
        if (!iou_block(block, iou, n, boxes[i], bound)) {
          continue;
        }
        for (int64_t j = 0; j < n; ++j) {
          if (iou[j] >= bound) {
            best[i].offer({iou[j], centre_distance(anchors[j], boxes[i]), level.first + begin + j});
          }
        }
      }
    }
  }
}

// Writes the bag of an object that was searched for.
template <typename T>
void write_bag(const Levels<T>& levels, const Box<T>& box, Best<T>& best, int64_t k, int64_t* bag) {
  if (best.size() < k) {
    // Anchors that do not overlap the object fill its bag, the nearest first.
    search_all(levels, &box, 1, T(0), &best);
    TORCH_CHECK(best.size() >= k, kBadGrid); // its inner coordinates, which are not checked
  }
  best.write(bag);
}

// Writes the bags of some objects; by exhaustive search if there are no shapes.
template <typename T>
void search_some(
    const Levels<T>& levels, const std::vector<Shape<T>>& shapes, const Box<T>* boxes,
    int64_t count, int64_t k, int64_t* bags) {
  const int64_t together = shapes.empty() ? std::min(kObjects, count) : 1;
  std::vector<Best<T>> best(together, Best<T>(k));
  for (int64_t first = 0; first < count; first += together) {
    const int64_t some = std::min(together, count - first);
    if (shapes.empty()) {
      search_all(levels, boxes + first, some, std::numeric_limits<T>::min(), best.data());
    } else {
      search_grids(shapes, boxes[first], best[0]);
    }
    for (int64_t i = 0; i < some; ++i) {
      write_bag(levels, boxes[first + i], best[i], k, bags + (first + i) * k);
    }
  }
}

struct Cpu {
  template <typename T>
  static void search(const Levels<T>& levels, const Objects<T>& objects, at::Tensor& bags) {
    check_boxes("gt_boxes", objects.boxes, objects.count);
    bool grids = true;
    for (const Level<T>& level : levels) {
      if (!level.grid) {
        check_boxes("anchors", level.boxes(), level.anchors);
        grids = false;
      }
    }
    std::vector<T> coordinates;
    auto shapes = load_shapes(levels, coordinates);
    if (!grids) {
      shapes.clear();
    }
    const int64_t k = bags.size(1);
    int64_t* out = bags.mutable_data_ptr<int64_t>();
    at::parallel_for(0, k > 0 ? objects.count : 0, 4, [&](int64_t begin, int64_t end) {
      search_some(levels, shapes, objects.boxes + begin, end - begin, k, out + begin * k);
    });
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("iou_topk", iou_topk<Cpu>);
}

} // namespace freeanchor
