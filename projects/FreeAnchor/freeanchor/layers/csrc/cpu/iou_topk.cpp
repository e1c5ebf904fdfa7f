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
#include "iou_block.h"
#include "grid_search.h"

namespace freeanchor {
namespace {

// Offers all anchors.
template <typename T>
void search_all(const Levels<T>& levels, const Box<T>& box, Best<T>& best) {
  T iou[kBlock];
  for (const Level<T>& level : levels) {
    for (int32_t begin = 0; begin < level.anchors; begin += kBlock) {
      const Box<T>* anchors = level.boxes() + begin;
      const int32_t n = std::min(kBlock, level.anchors - begin);
      const T bound = best.bound();
      if (!iou_block(box, anchors, n, bound, iou)) {
        continue;
      }
      for (int32_t j = 0; j < n; ++j) {
        if (iou[j] >= bound) {
          best.offer({iou[j], centre_distance(anchors[j], box), level.first + begin + j});
        }
      }
    }
  }
}

struct Cpu {
  template <typename T>
  static void search(const Levels<T>& levels, const Objects<T>& objects, at::Tensor& bags) {
    check_on_host(objects, levels);
    std::vector<T> coordinates;
    auto shapes = load_shapes(levels, coordinates);
    if (!std::all_of(levels.begin(), levels.end(), [](const Level<T>& x) { return x.grid; })) {
      shapes.clear();
    }
    const int64_t k = bags.size(1);
    int64_t* out = bags.mutable_data_ptr<int64_t>();
    at::parallel_for(0, k > 0 ? objects.count : 0, 4, [&](int64_t begin, int64_t end) {
      Best<T> best(k);
      for (int64_t i = begin; i < end; ++i) {
        const Box<T>& box = objects.boxes[i];
        best.clear(std::numeric_limits<T>::min()); // anchors that overlap the object
        shapes.empty() ? search_all(levels, box, best) : search_grids(shapes, box, best);
        if (best.size() < k) {
          best.clear(0); // others fill its bag, the nearest first
          search_all(levels, box, best);
          raise(best.size() >= k ? kNone : kGrid); // its inner coordinates, which are not checked
        }
        best.write(out + i * k);
      }
    });
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CPU, m) {
  m.impl("iou_topk", iou_topk<Cpu>);
}

} // namespace freeanchor
