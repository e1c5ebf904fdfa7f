// What the kernels check of their arguments: values, and what memory safety needs. ops.py has
// checked shapes and dtypes, with messages for users.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace freeanchor {

// The dtype of results: float32 or better.
inline at::ScalarType compute_dtype(const char* name, at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), name, " must have a tensor for each level, got none");
  return at::promote_types(tensors[0].scalar_type(), at::kFloat);
}

// Values only, as in matching.py. Waits for the device.
inline void check_boxes(const char* name, const at::Tensor& boxes) {
  bool valid = true;
  if (boxes.is_cpu()) {
    AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "check_boxes", [&] {
      const auto box = boxes.accessor<scalar_t, 2>();
      for (int64_t i = 0; i < box.size(0); ++i) {
        const scalar_t width = box[i][2] - box[i][0], height = box[i][3] - box[i][1];
        valid &= width >= 0 && height >= 0 && std::isfinite(width) && std::isfinite(height);
      }
    });
  } else {
    const at::Tensor size = boxes.slice(1, 2) - boxes.slice(1, 0, 2);
    valid = at::all((size >= 0) & (size < std::numeric_limits<double>::infinity())).item<bool>();
  }
  TORCH_CHECK_VALUE(
      valid, name, " must have finite coordinates with x1 <= x2 and y1 <= y2");
}

// Waits for the device.
inline void check_classes(const at::Tensor& gt_classes, int64_t num_classes) {
  TORCH_CHECK_VALUE(
      at::all((gt_classes >= 0) & (gt_classes < num_classes)).item<bool>(),
      "gt_classes must be in [0, ", num_classes, ")");
}

// The arguments of box_prob. Waits for the device.
inline void check_box_prob(
    at::TensorList deltas, at::TensorList anchors, const at::Tensor& gt_boxes,
    const at::Tensor& gt_classes, at::IntArrayRef counts, int64_t num_classes,
    at::ArrayRef<double> weights) {
  TORCH_CHECK(
      !deltas.empty() && deltas.size() == anchors.size(),
      "deltas and anchors must have as many levels");
  for (size_t l = 0; l < anchors.size(); ++l) {
    TORCH_CHECK(
        deltas[l].dim() >= 3 && deltas[l].size(-1) == 4 &&
            deltas[l].numel() == deltas[0].size(0) * anchors[l].numel() &&
            anchors[l].scalar_type() == gt_boxes.scalar_type() &&
            anchors[l].device() == deltas[0].device(),
        "deltas must be (N, ..., 4) and anchors (..., 4) as in deltas, of the dtype of gt_boxes");
  }
  int64_t total = 0;
  for (int64_t count : counts) {
    TORCH_CHECK(count >= 0, "counts must not be negative");
    total += count;
  }
  TORCH_CHECK(
      static_cast<int64_t>(counts.size()) == deltas[0].size(0) && gt_boxes.dim() == 2 &&
          gt_boxes.size(0) == total && gt_boxes.size(1) == 4 && gt_classes.numel() == total &&
          gt_boxes.device() == deltas[0].device() && gt_classes.device() == deltas[0].device(),
      "counts must be those of gt_boxes and gt_classes, per image of deltas");
  TORCH_CHECK(weights.size() == 4, "weights must be 4 numbers");
  check_boxes("gt_boxes", gt_boxes);
  check_classes(gt_classes, num_classes);
}

// For kernels that go through all elements in the order of memory, and do not care which is which.
inline void check_dense(at::TensorList logits, at::TensorList grads) {
  TORCH_CHECK(grads.empty() || grads.size() == logits.size(), "grads must be those of logits");
  for (size_t l = 0; l < logits.size(); ++l) {
    TORCH_CHECK(logits[l].is_non_overlapping_and_dense(), "logits must have no gaps in memory");
    TORCH_CHECK(
        grads.empty() ||
            (grads[l].sizes() == logits[l].sizes() && grads[l].strides() == logits[l].strides() &&
             grads[l].scalar_type() == logits[l].scalar_type() &&
             grads[l].device() == logits[l].device()),
        "grads must be of the shape, strides, dtype and device of logits");
  }
}

} // namespace freeanchor
