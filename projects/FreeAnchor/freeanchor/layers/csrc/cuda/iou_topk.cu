// matching.iou_topk: bags of anchors, without a matrix of objects and anchors.
//
// Blocks search slices of the anchors for an object, and one block joins what they found. The order
// of candidates is total, so threads may find them in any order.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernel.cuh"

namespace freeanchor {
namespace {

constexpr int kSearchThreads = 128;
// Anchors that each thread looks at before the block makes room for more candidates.
constexpr int kStep = 4;
constexpr int kRound = kStep * kSearchThreads;
// Of the candidates; larger ones are in global memory. Every device has this much shared memory.
constexpr int64_t kMaxSharedBytes = 47 << 10;
// Slices are as many as fill a device, and not so many that joining takes longer than searching.
constexpr int64_t kBlocks = 1024, kMaxSlices = 32;

// The best k of the candidates that the threads of a block offer. All threads must make all calls.
template <typename T>
class Best {
 public:
  // Memory of the block: room for `capacity` candidates, and their number.
  __device__ Best(Candidate<T>* candidates, int capacity, int* size, int k)
      : candidates_(candidates), capacity_(capacity), size_(size), k_(k) {
    clear(-1);
  }

  // From now on takes anchors that overlap, or else are nearer than `distance`. Followed by
  // offer(), which waits for the other threads.
  __device__ void clear(T distance) {
    bound_ = {0, distance, INT64_MAX};
    if (threadIdx.x == 0) {
      *size_ = 0;
    }
  }

  // The number of candidates; up to k of them after shrink().
  __device__ int size() const {
    __syncthreads();
    const int size = *size_;
    __syncthreads();
    return size;
  }

  __device__ const Candidate<T>& operator[](int i) const {
    return candidates_[i];
  }

  // Offers the candidates get(i) for i < count.
  template <typename F>
  __device__ void offer(int64_t count, F get) {
    for (int64_t first = 0; first < count; first += kRound) {
      if (size() > capacity_ - kRound) {
        shrink();
      }
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        const int64_t i = first + step * kSearchThreads + threadIdx.x;
        if (i < count) {
          const Candidate<T> candidate = get(i);
          if (candidate < bound_) {
            candidates_[atomicAdd(size_, 1)] = candidate;
          }
        }
      }
    }
  }

  // Offers the anchors [begin, end).
  __device__ void
  offer_anchors(const Levels<T>& levels, int64_t begin, int64_t end, const Box<T>& box) {
    offer(end - begin, [&](int64_t i) -> Candidate<T> {
      const Level<T>& level = levels.level[levels.level_of(begin + i)];
      const Box<T> anchor = level.boxes()[begin + i - level.first];
      return {box_iou(box, anchor), centre_distance(anchor, box), begin + i};
    });
    shrink();
  }

  // Sorts the candidates, keeps the best k, and takes no more that are not better.
  __device__ void shrink() {
    const int size = this->size();
    sort(size);
    if (size >= k_) {
      bound_ = candidates_[k_ - 1];
      if (threadIdx.x == 0) {
        *size_ = k_;
      }
      __syncthreads();
    }
  }

 private:
  // Bitonic, in the form in which every comparison has the better one first. The missing ones up to
  // a power of two would stay last, so that those comparisons can be left out.
  __device__ void sort(int size) {
    for (int merged = 2; merged / 2 < size; merged *= 2) {
      for (int step = merged / 2; step > 0; step /= 2) {
        for (int i = threadIdx.x;; i += kSearchThreads) {
          const int a = 2 * i - (i & (step - 1));
          const int b = a ^ (step == merged / 2 ? merged - 1 : step);
          if (a >= size) {
            break;
          }
          if (b < size && candidates_[b] < candidates_[a]) {
            const Candidate<T> better = candidates_[b];
            candidates_[b] = candidates_[a];
            candidates_[a] = better;
          }
        }
        __syncthreads();
      }
    }
  }

  Candidate<T>* candidates_;
  int capacity_;
  int* size_;
  int k_;
  Candidate<T> bound_;
};

// What a block has for its candidates: `memory` if they do not fit into shared memory.
template <typename T>
__device__ Candidate<T>* block_memory(Candidate<T>* memory, unsigned char* shared, int capacity) {
  const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  return memory ? memory + block * capacity : reinterpret_cast<Candidate<T>*>(shared);
}

// A block per slice and object. Writes up to k candidates that overlap the object, and others that
// are worse than none.
template <typename T>
__global__ void __launch_bounds__(kSearchThreads) search_kernel(
    const Levels<T> levels, const Box<T>* gt_boxes, int k, int capacity, Candidate<T>* memory,
    Candidate<T>* candidates) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int size;
  const int64_t object = blockIdx.x, slice = blockIdx.y, slices = gridDim.y;
  Best<T> best(block_memory<T>(memory, shared, capacity), capacity, &size, k);
  best.offer_anchors(
      levels, levels.anchors * slice / slices, levels.anchors * (slice + 1) / slices,
      gt_boxes[object]);
  const int found = best.size();
  for (int i = threadIdx.x; i < k; i += kSearchThreads) {
    candidates[(object * slices + slice) * k + i] = i < found ? best[i] : Candidate<T>{-1};
  }
}

// A block per object.
template <typename T>
__global__ void __launch_bounds__(kSearchThreads) join_kernel(
    const Levels<T> levels, const Box<T>* gt_boxes, int k, int capacity, Candidate<T>* memory,
    const Candidate<T>* candidates, int slices, int64_t* bags) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int size;
  const int64_t object = blockIdx.x;
  Best<T> best(block_memory<T>(memory, shared, capacity), capacity, &size, k);
  best.offer(int64_t(slices) * k, [&](int64_t i) { return candidates[object * slices * k + i]; });
  best.shrink();
  int found = best.size();
  if (found < k) {
    // Anchors that do not overlap the object are many, and seldom needed: those by distance.
    best.clear(INFINITY);
    best.offer_anchors(levels, 0, levels.anchors, gt_boxes[object]);
    found = best.size();
  }
  for (int i = threadIdx.x; i < k; i += kSearchThreads) {
    bags[object * k + i] = i < found ? best[i].index : 0;
  }
}

template <typename T>
void fill_bags(const Levels<T>& levels, const Objects<T>& gt, at::Tensor& bags) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto bytes = [&](int64_t size) {
    return at::empty({size}, bags.options().dtype(at::kByte));
  };
  const int64_t objects = gt.count, k = bags.size(1), capacity = 2 * k + kRound;
  TORCH_CHECK_VALUE(capacity < 1 << 30, "k must be below 2^29, got ", k);
  const int64_t full = (levels.anchors + kRound - 1) / kRound; // slices of one round
  const int64_t slices = std::clamp<int64_t>(kBlocks / objects, 1, std::min(full, kMaxSlices));
  int64_t shared_bytes = capacity * sizeof(Candidate<T>);
  at::Tensor memory;
  if (shared_bytes > kMaxSharedBytes) {
    memory = bytes(objects * slices * shared_bytes);
    shared_bytes = 0;
  }
  auto* own = memory.defined() ? static_cast<Candidate<T>*>(memory.mutable_data_ptr()) : nullptr;
  const at::Tensor candidates = bytes(objects * slices * k * sizeof(Candidate<T>));
  auto* found = static_cast<Candidate<T>*>(candidates.mutable_data_ptr());
  search_kernel<T><<<dim3(objects, slices), kSearchThreads, shared_bytes, stream>>>(
      levels, gt.boxes, k, capacity, own, found);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  join_kernel<T><<<objects, kSearchThreads, shared_bytes, stream>>>(
      levels, gt.boxes, k, capacity, own, found, slices, bags.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
  template <typename T>
  static void search(const Levels<T>& levels, const Objects<T>& gt, at::Tensor& bags) {
    const c10::cuda::CUDAGuard guard(bags.device());
    check_on_device(gt, levels);
    if (bags.numel() > 0) {
      fill_bags(levels, gt, bags);
    }
    raise_errors();
  }
};

} // namespace

TORCH_LIBRARY_IMPL(freeanchor, CUDA, m) {
  m.impl("iou_topk", iou_topk<Cuda>);
}

} // namespace freeanchor
