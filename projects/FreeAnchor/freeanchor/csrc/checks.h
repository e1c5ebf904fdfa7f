// What the kernels check of their arguments: values, and what memory safety needs. ops.py has checked
// shapes and dtypes, with messages for users.
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

// matching.check_boxes of the values. Waits for the device.
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
