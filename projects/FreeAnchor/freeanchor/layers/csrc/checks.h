// What the kernels check of their arguments: what memory safety needs, and values, with the
// messages of matching.py. ops.py has checked shapes and dtypes, with messages for users.
#pragma once

#include <ATen/ATen.h>

#include "box_iou.h"

namespace freeanchor {

inline constexpr char kBadBoxes[] = " must have finite coordinates with x1 <= x2 and y1 <= y2";
inline constexpr char kBadGrid[] =
    "anchors of the form (H, W, A, 4) must be grids: finite coordinates with x1 <= x2 and "
    "y1 <= y2, x that depends on the column only and y on the row only, and centres that move to "
    "the right and down";
inline constexpr char kOutOfRange[] = " must be in [0, ";
inline constexpr char kNeverDecrease[] = " and never decrease";

// The dtype of results: float32 or better.
inline at::ScalarType compute_dtype(const char* name, at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), name, " must have a tensor for each level, got none");
  return at::promote_types(tensors[0].scalar_type(), at::kFloat);
}

template <typename scalar_t>
using compute_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline void check_like(const char* name, const at::Tensor& x, const at::TensorOptions& options) {
  TORCH_CHECK(
      x.device() == options.device() && x.dtype() == options.dtype(), name, " must be ",
      options.dtype(), " on ", options.device(), ", got ", x.dtype(), " on ", x.device());
}

// Whether all boxes (..., 4), without gaps in memory on the CPU, are valid.
template <typename T>
void check_boxes(const char* name, const at::Tensor& boxes) {
  const auto* box = reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
  bool valid = true;
  for (int64_t i = 0; i < boxes.numel() / 4; ++i) {
    valid &= is_valid(box[i]);
  }
  TORCH_CHECK_VALUE(valid, name, kBadBoxes);
}

inline int64_t count_anchors(at::TensorList levels) {
  int64_t count = 0;
  for (const at::Tensor& level : levels) {
    count += level.numel() / 4;
  }
  return count;
}

// The arguments of iou_topk. Gives the anchors without gaps in memory.
inline std::vector<at::Tensor>
check_iou_topk(at::TensorList anchors, const at::Tensor& gt_boxes, int64_t k) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  TORCH_CHECK(
      gt_boxes.dim() == 2 && gt_boxes.size(1) == 4, "gt_boxes must be (M, 4), got ",
      gt_boxes.sizes());
  std::vector<at::Tensor> levels;
  for (const at::Tensor& level : anchors) {
    TORCH_CHECK(
        (level.dim() == 2 || level.dim() == 4) && level.size(-1) == 4,
        "anchors must be (R, 4) or (H, W, A, 4), got ", level.sizes());
    check_like("anchors", level, gt_boxes.options());
    levels.push_back(level.contiguous());
  }
  return levels;
}

// The arguments of negative_bag_loss. The dense pass goes through all logits in the order of
// memory. Gives the anchors without gaps.
inline std::vector<at::Tensor> check_negative_bag_loss(
    at::TensorList logits, at::TensorList deltas, at::TensorList anchors,
    const at::Tensor& gt_boxes, const at::Tensor& gt_classes, const at::Tensor& gt_images,
    at::ArrayRef<double> coding, const at::Tensor& scale, const at::Tensor& grad_scale,
    at::TensorList grads) {
  const auto dtype = compute_dtype("logits", logits);
  const auto options = logits[0].options();
  TORCH_CHECK(
      deltas.size() == logits.size() && anchors.size() == logits.size() &&
          (grads.empty() || grads.size() == logits.size()),
      "deltas, anchors and grads must have the levels of logits");
  std::vector<at::Tensor> levels;
  for (size_t l = 0; l < logits.size(); ++l) {
    TORCH_CHECK(
        logits[l].dim() >= 3 && deltas[l].dim() >= 3 && deltas[l].size(-1) == 4 &&
            deltas[l].size(0) == logits[0].size(0) &&
            deltas[l].numel() == deltas[l].size(0) * anchors[l].numel() &&
            deltas[l].numel() * logits[l].size(-1) == logits[l].numel() * 4,
        "logits, deltas and anchors must be (N, ..., C), (N, ..., 4) and (..., 4)");
    check_like("deltas", deltas[l], options);
    check_like("anchors", anchors[l], options.dtype(dtype));
    TORCH_CHECK(logits[l].is_non_overlapping_and_dense(), "logits must have no gaps in memory");
    if (!grads.empty()) {
      check_like("grads", grads[l], options);
      TORCH_CHECK(
          grads[l].sizes() == logits[l].sizes() && grads[l].strides() == logits[l].strides(),
          "grads must be of the shape and strides of logits");
    }
    levels.push_back(anchors[l].contiguous());
  }
  check_like("gt_boxes", gt_boxes, options.dtype(dtype));
  check_like("gt_classes", gt_classes, options.dtype(at::kLong));
  check_like("gt_images", gt_images, options.dtype(at::kLong));
  check_like("scale", scale, options.dtype(dtype));
  check_like("grad_scale", grad_scale, options.dtype(dtype));
  TORCH_CHECK(
      gt_boxes.dim() == 2 && gt_boxes.size(1) == 4 && gt_classes.numel() == gt_boxes.size(0) &&
          gt_images.numel() == gt_boxes.size(0) && scale.numel() == 1 && grad_scale.numel() == 1,
      "gt_boxes, gt_classes and gt_images must be (M, 4), (M,) and (M,), and scales scalars");
  TORCH_CHECK(coding.size() == 5, "coding must be 5 numbers");
  return levels;
}

} // namespace freeanchor
