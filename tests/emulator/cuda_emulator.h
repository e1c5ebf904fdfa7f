// The words of CUDA for a C++ compiler: kernels run on the CPU, a thread of a block as a fiber.
//
// The fibers of a block take turns in random order, and change at barriers, shuffles and atomics.
// Blocks run one after another, in random order. translate.py makes C++ of <<<>>> and __shared__.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(n)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
#define C10_CUDA_CHECK(call) call

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {
  }
};

namespace emulator {

struct Thread {
  dim3 thread_index;
  int number; // in its block
};
extern Thread* current;
extern dim3 block_index, block_size, grid_size;

void launch(dim3 grid, dim3 block, int64_t shared_bytes, int stream, std::function<void()> thread);
unsigned char* dynamic_shared();
// Fills a shared variable with garbage once per block.
void poison(void* variable, size_t bytes);
// Waits for all threads of the block. `id` is the place in the source.
void barrier(int id);
// Lets other threads run.
void pause();
// Gives the value that the thread `lane` of the warp has in the same call.
uint64_t exchange(uint64_t value, int lane);
void atomic(const void* address, size_t bytes);

template <typename T>
T shuffle(T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

} // namespace emulator

#define threadIdx (emulator::current->thread_index)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

template <typename T>
T __shfl_down_sync(unsigned, T value, int lanes) {
  const int lane = emulator::current->number % 32 + lanes;
  return emulator::shuffle(value, lane < 32 ? lane : lane - lanes);
}

// Not to be taken for plain accesses where those are recorded.
#define EMULATOR_ATOMIC __attribute__((no_sanitize("thread"), noinline))

template <typename T>
EMULATOR_ATOMIC T atomicAdd(T* address, T value) {
  emulator::pause();
  emulator::atomic(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
EMULATOR_ATOMIC T atomicMax(T* address, T value) {
  emulator::pause();
  emulator::atomic(address, sizeof(T));
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}

inline int __float_as_int(float x) {
  return emulator::bit_cast<int>(x);
}
inline long long __double_as_longlong(double x) {
  return emulator::bit_cast<long long>(x);
}

constexpr int cudaHostAllocMapped = 0, cudaHostAllocPortable = 0;
inline void cudaHostAlloc(void** memory, size_t bytes, int) {
  *memory = std::calloc(1, bytes);
}

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(Device) {
  }
};
inline int getCurrentCUDAStream() {
  return 0;
}
} // namespace c10::cuda
