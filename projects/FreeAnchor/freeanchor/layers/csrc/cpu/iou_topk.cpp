// matching.iou_topk: bags of anchors, without a matrix of objects and anchors.
//
// If all levels of anchors are grids, see grid_search.h. Others are searched exhaustively, in
// blocks.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
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
    TORCH_CHECK(best.size() >= k, kBadGrid); // its inner coordinates, which are not checked
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
  const std::vector<at::Tensor> levels = check_iou_topk(anchors, gt_boxes, k);
  const at::Tensor boxes_c = gt_boxes.contiguous();
  at::Tensor bags = at::empty(
      {gt_boxes.size(0), std::min(k, count_anchors(levels))}, gt_boxes.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(gt_boxes.scalar_type(), "iou_topk", [&] {
    check_boxes<scalar_t>("gt_boxes", boxes_c);
    bool grids = true;
    for (const at::Tensor& level : levels) {
      if (level.dim() == 2) {
        check_boxes<scalar_t>("anchors", level);
        grids = false;
      }
    }
    std::vector<scalar_t> coordinates;
    auto shapes = load_shapes<scalar_t>(levels, coordinates);
    if (!grids) {
      shapes.clear();
    }
    const auto* boxes = reinterpret_cast<const Box<scalar_t>*>(boxes_c.const_data_ptr<scalar_t>());
    int64_t* out = bags.mutable_data_ptr<int64_t>();
    if (bags.numel() > 0) {
      at::parallel_for(0, bags.size(0), 4, [&](int64_t begin, int64_t end) {
        search(levels, shapes, boxes, begin, end, bags.size(1), out);
      });
    }
  });
  return bags;
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("iou_topk", iou_topk);
}

} // namespace freeanchor
