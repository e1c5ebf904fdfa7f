// The arguments of the operators, for the kernels of the CPU and of CUDA. Checked is what memory
// safety needs, and values, with the messages of matching.py: ops.py has checked shapes and dtypes,
// with messages for users.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "levels.h"

namespace freeanchor {

// What may be wrong with values, and the sentences of matching.py. `bound` is what they must be
// below.
enum Error : int64_t { kNone, kGtBoxes, kAnchors, kGrid, kClasses, kImages, kIndex };

inline void raise(int64_t error, int64_t bound = 0) {
  constexpr char kBoxes[] = " must have finite coordinates with x1 <= x2 and y1 <= y2";
  TORCH_CHECK_VALUE(error != kGtBoxes, "gt_boxes", kBoxes);
  TORCH_CHECK_VALUE(error != kAnchors, "anchors", kBoxes);
  TORCH_CHECK_VALUE(
      error != kGrid,
      "anchors of the form (H, W, A, 4) must be grids: finite coordinates with x1 <= x2 and "
      "y1 <= y2, x that depends on the column only and y on the row only, and centres that move to "
      "the right and down");
  TORCH_CHECK_VALUE(error != kClasses, "gt_classes must be in [0, ", bound, ")");
  TORCH_CHECK_VALUE(error != kImages, "gt_images must be in [0, ", bound, ") and never decrease");
  TORCH_CHECK_VALUE(error != kIndex, "index must be in [0, ", bound, ")");
}

// The M objects of a batch, those of the first image first.
template <typename T>
struct Objects {
  const Box<T>* boxes;
  int64_t count;
  const int64_t *classes, *images; // null if there are but boxes
  const int64_t* first;            // the first object of each image, and their number
  int64_t num_classes, num_images;

  C10_HOST_DEVICE bool class_is_valid(int64_t i) const {
    return 0 <= classes[i] && classes[i] < num_classes;
  }

  // What is wrong with object i, if anything.
  C10_HOST_DEVICE Error error(int64_t i) const {
    if (!is_valid(boxes[i])) {
      return kGtBoxes;
    }
    if (!classes) {
      return kNone;
    }
    const bool in_order = (i > 0 ? images[i - 1] : 0) <= images[i];
    return !class_is_valid(i) ? kClasses : in_order && images[i] < num_images ? kNone : kImages;
  }
  C10_HOST_DEVICE int64_t bound(Error error) const {
    return error == kClasses ? num_classes : num_images;
  }
};

// The boxes of a tensor without gaps in memory.
template <typename T>
const Box<T>* view_boxes(const at::Tensor& boxes) {
  TORCH_CHECK(
      boxes.dim() == 2 && boxes.size(1) == 4, "gt_boxes must be (M, 4), got ", boxes.sizes());
  return reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
}

// The dtype of results: float32 or better.
inline at::ScalarType compute_dtype(const char* name, at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), name, " must have a tensor for each level, got none");
  return at::promote_types(tensors[0].scalar_type(), at::kFloat);
}

// The operator: Kernel::search(anchors, gt_boxes, bags) fills the bags.
template <typename Kernel>
at::Tensor iou_topk(at::TensorList anchors, const at::Tensor& gt_boxes, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  std::vector<at::Tensor> tensors;
  for (const at::Tensor& level : anchors) {
    tensors.push_back(level.contiguous());
  }
  const at::Tensor boxes = gt_boxes.contiguous();
  at::Tensor bags;
  AT_DISPATCH_FLOATING_TYPES(gt_boxes.scalar_type(), "iou_topk", [&] {
    const auto levels = view_levels<scalar_t>("anchors", tensors, boxes.device(), false);
    TORCH_CHECK(levels.depth == 4, "anchors must be (R, 4) or (H, W, A, 4)");
    bags =
        at::empty({boxes.size(0), std::min(k, levels.anchors)}, boxes.options().dtype(at::kLong));
    Kernel::search(levels, Objects<scalar_t>{view_boxes<scalar_t>(boxes), boxes.size(0)}, bags);
  });
  return bags;
}

// The operators: Kernel::take(levels, index, out), and Kernel::put(levels, index, source), which
// adds and rounds the sum once. The tensors have no gaps in memory.
template <typename Kernel>
at::Tensor take(at::TensorList levels, const at::Tensor& index) {
  const auto dtype = compute_dtype("levels", levels);
  at::Tensor result = at::empty(index.sizes(), index.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "take", [&] {
    Kernel::take(
        view_levels<scalar_t>("levels", levels, index.device()), index.contiguous(),
        result.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return result;
}
template <typename Kernel>
void put_(at::TensorList levels, const at::Tensor& index, const at::Tensor& source) {
  compute_dtype("levels", levels);
  TORCH_CHECK(
      index.numel() == source.numel() && index.device() == source.device(),
      "source must have as many elements as index, and be on its device");
  const at::Tensor source_c = source.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, levels[0].scalar_type(), "put_", [&] {
    Kernel::put(
        view_levels<scalar_t>("levels", levels, index.device()), index.contiguous(),
        source_c.const_data_ptr<at::opmath_type<scalar_t>>());
  });
}

// Checks what the CPU can read, but for grids.
template <typename T>
void check_on_host(const Objects<T>& objects, const Levels<T>& anchors) {
  for (int64_t i = 0; i < objects.count; ++i) {
    const Error error = objects.error(i);
    raise(error, objects.bound(error));
  }
  for (const Level<T>& level : anchors) {
    const bool valid =
        level.grid || std::all_of(level.boxes(), level.boxes() + level.anchors, is_valid<T>);
    raise(valid ? kNone : kAnchors);
  }
}

// The box that an anchor predicts, and its centre.
template <typename T>
struct Prediction {
  T x, y;
  Box<T> box;
};

// What box_prob matches.
template <typename T>
struct Matching {
  Levels<T> deltas, anchors; // anchors without gaps in memory
  Objects<T> objects;
  T weights[4], scale_clamp, threshold;

  // matching.decode_boxes for anchor j of image n. Inlined, so that what is not used costs nothing.
  FREEANCHOR_INLINE Prediction<T> predict(int64_t n, int64_t j) const {
    const int l = deltas.level_of(j);
    const auto in_level = static_cast<int32_t>(j - deltas.level[l].first);
    const Box<T> anchor = anchors.level[l].boxes()[in_level];
    const T width = anchor.x2 - anchor.x1, height = anchor.y2 - anchor.y1;
    const T* raw = deltas.level[l].at(n, in_level);
    const auto delta = [&](int d) { return raw[d * deltas.level[l].stride[4]] / weights[d]; };
    const auto half = [&](int d) {
      return T(0.5) * std::exp(delta(d) > scale_clamp ? scale_clamp : delta(d));
    };
    const T x = anchor.x1 + T(0.5) * width + delta(0) * width, half_width = half(2) * width;
    const T y = anchor.y1 + T(0.5) * height + delta(1) * height, half_height = half(3) * height;
    return {x, y, {x - half_width, y - half_height, x + half_width, y + half_height}};
  }
};

// The loss of the logits without gaps in memory, and where to write the gradient, which has no
// levels if it is not wanted.
template <typename scalar_t>
struct Loss {
  using T = at::opmath_type<scalar_t>;
  Levels<scalar_t> logits, grads;
  T gamma;
  const T* grad_scale;
};

// The operator: Kernel::run(loss, matching, max_iou) gives the loss as a scalar in float64, and
// raises max_iou, zeros, to the highest IoUs.
template <typename Kernel>
std::tuple<at::Tensor, at::Tensor> negative_bag_loss(
    at::TensorList logits, at::TensorList deltas, at::TensorList anchors,
    const at::Tensor& gt_boxes, const at::Tensor& gt_classes, const at::Tensor& gt_images,
    at::ArrayRef<double> coding, double threshold, double gamma, const at::Tensor& grad_scale,
    at::TensorList grads) {
  const auto dtype = compute_dtype("logits", logits);
  const auto device = logits[0].device();
  for (const at::Tensor& x : {gt_boxes, gt_classes, gt_images, grad_scale}) {
    TORCH_CHECK(x.device() == device, "objects and grad_scale must be on ", device);
  }
  TORCH_CHECK(
      gt_classes.numel() == gt_boxes.size(0) && gt_images.numel() == gt_boxes.size(0),
      "gt_classes and gt_images must be (M,)");
  TORCH_CHECK(
      coding.size() == 5 && grad_scale.numel() == 1,
      "coding must be 5 numbers, and grad_scale a scalar");
  // Deltas are few numbers: of one type they need half of the code.
  std::vector<at::Tensor> flat_anchors, computed_deltas;
  for (const at::Tensor& level : anchors) {
    flat_anchors.push_back(level.reshape({-1, 4}).contiguous());
  }
  for (const at::Tensor& level : deltas) {
    computed_deltas.push_back(level.to(dtype));
  }
  const at::Tensor boxes = gt_boxes.contiguous(), classes = gt_classes.contiguous(),
                   images = gt_images.contiguous();
  const at::Tensor first =
      at::searchsorted(images, at::arange(logits[0].size(0) + 1, images.options()));
  at::Tensor total, max_iou = at::zeros({boxes.size(0)}, boxes.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits[0].scalar_type(), "negative_bag_loss", [&] {
        using T = at::opmath_type<scalar_t>;
        Loss<scalar_t> loss{view_levels<scalar_t>("logits", logits, device)};
        loss.gamma = gamma;
        loss.grad_scale = grad_scale.const_data_ptr<T>();
        Matching<T> matching{
            view_levels<T>("deltas", computed_deltas, device),
            view_levels<T>("anchors", flat_anchors, device, false),
            {view_boxes<T>(boxes), boxes.size(0), classes.const_data_ptr<int64_t>(),
             images.const_data_ptr<int64_t>(), first.const_data_ptr<int64_t>(), loss.logits.depth,
             loss.logits.images}};
        bool fit = deltas.size() == logits.size() && anchors.size() == logits.size() &&
                   matching.deltas.depth == 4 && matching.deltas.images == loss.logits.images;
        for (size_t l = 0; l < logits.size(); ++l) {
          TORCH_CHECK(
              logits[l].is_non_overlapping_and_dense(), "logits must have no gaps in memory");
          const auto count = loss.logits.level[l].anchors;
          fit = fit && matching.deltas.level[l].anchors == count &&
                matching.anchors.level[l].anchors == count;
        }
        TORCH_CHECK(fit, "logits, deltas and anchors must be (N, ..., C), (N, ..., 4), (..., 4)");
        if (!grads.empty()) {
          loss.grads = view_levels<scalar_t>("grads", grads, device);
          TORCH_CHECK(
              std::equal(
                  logits.begin(), logits.end(), grads.begin(), grads.end(),
                  [](const at::Tensor& x, const at::Tensor& grad) {
                    return grad.sizes() == x.sizes() && grad.strides() == x.strides();
                  }),
              "grads must be of the shape and strides of logits");
        }
        std::copy_n(coding.begin(), 4, matching.weights);
        matching.scale_clamp = coding[4];
        matching.threshold = threshold;
        total = Kernel::run(loss, matching, max_iou);
      });
  return {total, max_iou};
}

} // namespace freeanchor
