// matching.box_prob: P{a in A+}, without the IoU of every prediction with every object.
//
// A thread decodes one prediction and walks through the objects of its image, twice: to find the
// highest IoUs and count the cells, and to write the cells. The objects come by class, so those of
// one class, which share a cell, are consecutive and the cells of a prediction are in order.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <vector>

#include "../box_iou.h"
#include "../checks.h"
#include "../levels.h"
#include "launch.cuh"

namespace freeanchor {
namespace {

template <typename scalar_t, typename T>
struct Batch {
  Levels<scalar_t> deltas;
  const T* anchors[kMaxLevels];
  const T* gt_boxes;
  const int64_t* gt_classes;
  const int64_t* order;  // the objects by image and class
  const int64_t* begin;  // where those of each image begin, and where the last ones end
  T weights[4], scale_clamp, threshold;
  int64_t num_classes;

  C10_HOST_DEVICE int64_t blocks_per_image() const {
    return (deltas.anchors + kThreads - 1) / kThreads;
  }
  __device__ int64_t image() const {
    return blockIdx.x / blocks_per_image();
  }
  // May be past the last one.
  __device__ int64_t anchor() const {
    return blockIdx.x % blocks_per_image() * kThreads + threadIdx.x;
  }
};

template <typename scalar_t, typename T>
__device__ Box<T> predicted_box(const Batch<scalar_t, T>& batch, int64_t image, int64_t anchor) {
  int l = 0;
  while (anchor - batch.deltas.level[l].first >= batch.deltas.level[l].anchors) {
    ++l;
  }
  const Level<scalar_t>& level = batch.deltas.level[l];
  const scalar_t* raw = level.at(image, anchor - level.first);
  const T* a = batch.anchors[l] + 4 * (anchor - level.first);
  const auto delta = [&](int d) {
    return static_cast<T>(raw[d * level.stride[4]]) / batch.weights[d];
  };
  const T x = decode_centre(delta(0), a[0], a[2]);
  const T y = decode_centre(delta(1), a[1], a[3]);
  const T half_width = decode_half(delta(2), a[0], a[2], batch.scale_clamp);
  const T half_height = decode_half(delta(3), a[1], a[3], batch.scale_clamp);
  return {x - half_width, y - half_height, x + half_width, y + half_height};
}

// Calls visit(object, IoU), by class, for the objects that this thread's prediction overlaps by
// more than the threshold. For all threads of a block together.
template <typename scalar_t, typename T, typename F>
__device__ void for_each_match(const Batch<scalar_t, T>& batch, F visit) {
  __shared__ Box<T> boxes[kThreads];
  __shared__ int64_t objects[kThreads];
  const int64_t image = batch.image(), anchor = batch.anchor();
  const int64_t begin = batch.begin[image], end = batch.begin[image + 1];
  Box<T> box{}; // matches nothing
  if (begin < end && anchor < batch.deltas.anchors) {
    box = predicted_box(batch, image, anchor);
  }
  for (int64_t first = begin; first < end; first += kThreads) {
    const int count = static_cast<int>(end - first < kThreads ? end - first : kThreads);
    __syncthreads();
    if (threadIdx.x < count) {
      objects[threadIdx.x] = batch.order[first + threadIdx.x];
      const T* b = batch.gt_boxes + 4 * objects[threadIdx.x];
      boxes[threadIdx.x] = {b[0], b[1], b[2], b[3]};
    }
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const Box<T> object = boxes[i];
      // Few overlap at all, and only those need a division.
      if (object.x1 < box.x2 && box.x1 < object.x2 && object.y1 < box.y2 && box.y1 < object.y2) {
        const T iou = box_iou(object, box);
        if (iou > batch.threshold) {
          visit(objects[i], iou);
        }
      }
    }
  }
}

// Positive numbers are ordered as their bits are.
__device__ void atomic_max(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
}
__device__ void atomic_max(double* address, double value) {
  atomicMax(
      reinterpret_cast<unsigned long long*>(address),
      static_cast<unsigned long long>(__double_as_longlong(value)));
}

// The highest IoU with each object and the number of cells of each prediction.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const Batch<scalar_t, T> batch, T* max_iou, int* counts) {
  int count = 0;
  int64_t last_class = -1;
  for_each_match(batch, [&](int64_t object, T iou) {
    atomic_max(max_iou + object, iou);
    count += batch.gt_classes[object] != last_class;
    last_class = batch.gt_classes[object];
  });
  if (batch.anchor() < batch.deltas.anchors) {
    counts[batch.image() * batch.deltas.anchors + batch.anchor()] = count;
  }
}

// The cells of each prediction, which end at `ends` among all.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) write_kernel(
    const Batch<scalar_t, T> batch, const T* max_iou, const int64_t* ends, int64_t* cells,
    T* prob) {
  const int64_t row = batch.image() * batch.deltas.anchors + batch.anchor();
  const bool in_image = batch.anchor() < batch.deltas.anchors;
  const int64_t begin = in_image && row > 0 ? ends[row - 1] : 0, end = in_image ? ends[row] : 0;
  if (!__syncthreads_or(begin < end)) {
    return;
  }
  int64_t at = begin - 1, last_class = -1;
  for_each_match(batch, [&](int64_t object, T iou) {
    const T p = (iou - batch.threshold) / (max_iou[object] - batch.threshold);
    if (batch.gt_classes[object] == last_class) {
      prob[at] = prob[at] < p ? p : prob[at];
    } else {
      last_class = batch.gt_classes[object];
      ++at;
      CUDA_KERNEL_ASSERT(at < end);
      cells[at] = row * batch.num_classes + last_class;
      prob[at] = p;
    }
  });
}

template <typename scalar_t, typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> match(
    Batch<scalar_t, T>& batch, const at::Tensor& gt_boxes, const at::Tensor& gt_classes) {
  at::Tensor max_iou = at::zeros({gt_boxes.size(0)}, gt_boxes.options());
  at::Tensor cells = at::empty({0}, gt_classes.options());
  at::Tensor prob = at::empty({0}, gt_boxes.options());
  const int64_t rows = batch.deltas.images * batch.deltas.anchors;
  if (rows == 0 || gt_boxes.numel() == 0) {
    return {cells, prob, max_iou};
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto blocks = static_cast<unsigned>(batch.deltas.images * batch.blocks_per_image());
  const at::Tensor counts = at::empty({rows}, gt_boxes.options().dtype(at::kInt));
  count_kernel<<<blocks, kThreads, 0, stream>>>(
      batch, max_iou.template mutable_data_ptr<T>(), counts.template mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const at::Tensor ends = at::cumsum(counts, 0, at::kLong);
  const int64_t total = ends[rows - 1].template item<int64_t>(); // waits for the device
  if (total > 0) {
    cells.resize_({total});
    prob.resize_({total});
    write_kernel<<<blocks, kThreads, 0, stream>>>(
        batch, max_iou.template const_data_ptr<T>(), ends.template const_data_ptr<int64_t>(),
        cells.template mutable_data_ptr<int64_t>(), prob.template mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {cells, prob, max_iou};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> box_prob(
    at::TensorList deltas, at::TensorList anchors, const at::Tensor& gt_boxes,
    const at::Tensor& gt_classes, at::IntArrayRef counts, int64_t num_classes,
    at::ArrayRef<double> weights, double scale_clamp, double threshold) {
  check_box_prob(deltas, anchors, gt_boxes, gt_classes, counts, num_classes, weights);
  const c10::cuda::CUDAGuard guard(deltas[0].device());
  std::vector<at::Tensor> anchor_levels;
  for (const at::Tensor& level : anchors) {
    anchor_levels.push_back(level.contiguous());
  }
  // Of each image, where its objects begin; of each object, the first class of its image if the
  // classes of all images are numbered consecutively.
  std::vector<int64_t> begin{0}, first_class;
  for (int64_t count : counts) {
    first_class.resize(begin.back() + count, (begin.size() - 1) * num_classes);
    begin.push_back(first_class.size());
  }
  const at::Tensor boxes = gt_boxes.contiguous(), classes = gt_classes.contiguous();
  const auto to_device = [&](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(boxes.device(), at::kLong, /*non_blocking=*/true);
  };
  const at::Tensor begin_d = to_device(begin), keys = classes + to_device(first_class);
  const at::Tensor order =
      std::get<1>(at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, deltas[0].scalar_type(), "box_prob", [&] {
        const auto run = [&](auto compute) {
          using T = decltype(compute);
          Batch<scalar_t, T> batch;
          batch.deltas = view_levels<scalar_t>("deltas", deltas);
          for (size_t l = 0; l < anchors.size(); ++l) {
            batch.anchors[l] = anchor_levels[l].template const_data_ptr<T>();
          }
          batch.gt_boxes = boxes.template const_data_ptr<T>();
          batch.gt_classes = classes.template const_data_ptr<int64_t>();
          batch.order = order.template const_data_ptr<int64_t>();
          batch.begin = begin_d.template const_data_ptr<int64_t>();
          std::copy(weights.begin(), weights.end(), batch.weights);
          batch.scale_clamp = scale_clamp;
          batch.threshold = threshold;
          batch.num_classes = num_classes;
          return match<scalar_t, T>(batch, boxes, classes);
        };
        result = boxes.scalar_type() == at::kDouble ? run(double()) : run(float());
      });
  return result;
}

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("box_prob", box_prob);
}

} // namespace freeanchor
