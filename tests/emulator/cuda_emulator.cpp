// The scheduler of cuda_emulator.h, and the search for races.
#include "cuda_emulator.h"

#include <torch/library.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Thread* current = nullptr;
dim3 block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kMaxThreads = 1024, kMaxGrid = 65535;
constexpr int64_t kMaxSharedBytes = 48 << 10;
constexpr size_t kWarp = 32;

struct Fiber : Thread {
  ucontext_t context;
  unsigned char* stack;
  enum { kReady, kAtBarrier, kAtShuffle, kDone } state;
  int barrier, lane;
  uint64_t bits;
  int64_t interval; // barriers that it has passed
};

std::vector<Fiber> fibers; // of the block that runs
std::unique_ptr<unsigned char[]> stacks, dynamic;
int64_t dynamic_bytes;
std::map<uintptr_t, size_t> statics; // shared variables of the block that runs
std::function<void()> body;
ucontext_t scheduler;
std::mt19937 randomness;
int64_t skipped_barrier = -1, block_number;
std::string problem;

void fail(const std::string& what) {
  if (problem.empty()) {
    problem = what;
  }
}

// AddressSanitizer wants to know which stack is in use.
void switch_to(ucontext_t& from, ucontext_t& to, const void* stack, size_t size, bool last) {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&from, &to);
#endif
}

const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

Fiber& current_fiber() {
  return static_cast<Fiber&>(*current);
}

void yield(bool last = false) {
  switch_to(current_fiber().context, scheduler, scheduler_stack, scheduler_stack_bytes, last);
}

void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  body();
  current_fiber().state = Fiber::kDone;
  yield(/*last=*/true);
}

bool release_barrier() {
  for (const Fiber& fiber : fibers) {
    if (fiber.state != Fiber::kAtBarrier || fiber.barrier != fibers[0].barrier) {
      return false;
    }
  }
  for (Fiber& fiber : fibers) {
    fiber.state = Fiber::kReady;
    ++fiber.interval;
  }
  return true;
}

bool release_shuffles() {
  bool any = false;
  for (size_t warp = 0; warp < fibers.size(); warp += kWarp) {
    const auto begin = fibers.begin() + warp;
    const auto end = fibers.begin() + std::min(fibers.size(), warp + kWarp);
    if (std::all_of(begin, end, [](const Fiber& f) { return f.state == Fiber::kAtShuffle; })) {
      std::vector<uint64_t> bits;
      std::transform(begin, end, std::back_inserter(bits), [](const Fiber& f) { return f.bits; });
      for (auto fiber = begin; fiber != end; ++fiber) {
        fiber->bits = bits.at(fiber->lane);
        fiber->state = Fiber::kReady;
      }
      any = true;
    }
  }
  return any;
}

void start_fibers() {
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.number = static_cast<int>(i);
    fiber.thread_index = dim3(i % block_size.x, i / block_size.x);
    fiber.state = Fiber::kReady;
    fiber.interval = 0;
    fiber.stack = stacks.get() + i * kStack;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

void run_block() {
  start_fibers();
  std::vector<int> order(fibers.size());
  std::iota(order.begin(), order.end(), 0);
  const auto done = [](const Fiber& fiber) { return fiber.state == Fiber::kDone; };
  while (problem.empty() && !std::all_of(fibers.begin(), fibers.end(), done)) {
    std::shuffle(order.begin(), order.end(), randomness);
    bool ran = false;
    for (int i : order) {
      if (fibers[i].state == Fiber::kReady) {
        current = &fibers[i];
        switch_to(scheduler, fibers[i].context, fibers[i].stack, kStack, false);
        ran = true;
      }
    }
    current = nullptr;
    if (!ran && !release_barrier() && !release_shuffles()) {
      fail("threads of a block wait for others that do not come");
    }
  }
}

// Races: two threads use the same byte, not both read it, not both by atomic operations, and there
// is no barrier in between, which there cannot be for threads of two blocks.
struct Access {
  int64_t block = -1, interval = 0;
  int thread = 0;
  bool atomic = false;
};
constexpr int64_t kSeveral = -2; // blocks, or threads, that have read

struct Byte {
  Access read, write;
};

bool finding_races = false;
std::unordered_map<uintptr_t, Byte> global_bytes, shared_bytes;

bool conflict(const Access& before, const Access& now) {
  if (before.block == -1 || (before.atomic && now.atomic)) {
    return false;
  }
  return before.block != now.block ||
         (before.interval == now.interval && before.thread != now.thread);
}

void note(Byte& byte, const Access& now, bool is_write, const char* memory) {
  if (conflict(byte.write, now) || (is_write && conflict(byte.read, now))) {
    fail(std::string("race: two threads use the same ") + memory + " memory");
  }
  Access& last = is_write ? byte.write : byte.read;
  const Access before = last;
  last = now;
  if (!is_write && before.block != -1 && before.block != now.block) {
    last.block = kSeveral;
  } else if (
      !is_write && before.interval == now.interval && before.thread != now.thread &&
      before.block == now.block) {
    last.thread = kSeveral;
  }
}

bool is_shared(uintptr_t address) {
  if (address - reinterpret_cast<uintptr_t>(dynamic.get()) < static_cast<size_t>(dynamic_bytes)) {
    return true;
  }
  auto next = statics.upper_bound(address);
  return next != statics.begin() && (--next, address - next->first < next->second);
}

void note_access(const void* pointer, size_t size, bool is_write, bool is_atomic = false) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!finding_races || !current ||
      address - reinterpret_cast<uintptr_t>(stacks.get()) < kMaxThreads * kStack) {
    return;
  }
  const Access now{block_number, current_fiber().interval, current->number, is_atomic};
  const bool shared = is_shared(address);
  for (size_t i = 0; i < size; ++i) {
    note(
        (shared ? shared_bytes : global_bytes)[address + i], now, is_write,
        shared ? "shared" : "global");
  }
}

} // namespace

void launch(dim3 grid, dim3 block, int64_t bytes, int, std::function<void()> thread) {
  const unsigned threads = block.x * block.y * block.z;
  TORCH_CHECK(
      0 < threads && threads <= kMaxThreads && 0 < grid.x && 0 < grid.y && grid.y <= kMaxGrid &&
          grid.z == 1 && 0 <= bytes && bytes <= kMaxSharedBytes,
      "emulator: a launch beyond the limits of a device");
  if (!stacks) {
    stacks.reset(new unsigned char[kMaxThreads * kStack]);
  }
  body = std::move(thread);
  block_size = block;
  grid_size = grid;
  dynamic_bytes = bytes;
  dynamic.reset(new unsigned char[bytes]);
  fibers.resize(threads);
  global_bytes.clear();
  problem.clear();
  std::vector<int64_t> blocks(int64_t(grid.x) * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), randomness);
  for (int64_t number : blocks) {
    block_number = number;
    block_index = dim3(number % grid.x, number / grid.x);
    statics.clear();
    shared_bytes.clear();
    std::memset(dynamic.get(), 0xa5, bytes);
    run_block();
    TORCH_CHECK(problem.empty(), "emulator: ", problem);
  }
}

unsigned char* dynamic_shared() {
  return dynamic.get();
}

void poison(void* variable, size_t bytes) {
  if (statics.emplace(reinterpret_cast<uintptr_t>(variable), bytes).second) {
    std::memset(variable, 0xa5, bytes);
  }
}

void barrier(int id) {
  if (id != skipped_barrier) {
    current_fiber().barrier = id;
    current_fiber().state = Fiber::kAtBarrier;
    yield();
  }
}

void pause() {
  yield();
}

uint64_t exchange(uint64_t value, int lane) {
  Fiber& fiber = current_fiber();
  fiber.bits = value;
  fiber.lane = lane;
  fiber.state = Fiber::kAtShuffle;
  yield();
  return fiber.bits;
}

void atomic(const void* address, size_t bytes) {
  note_access(address, bytes, /*is_write=*/true, /*is_atomic=*/true);
}

} // namespace emulator

// What the compiler calls at each access where -fsanitize=thread is given: here instead of the
// library that belongs to it.
#define ACCESS(name, size, is_write)                             \
  extern "C" void __tsan_##name##size(void* address) {           \
    emulator::note_access(address, size, is_write);              \
  }                                                              \
  extern "C" void __tsan_unaligned_##name##size(void* address) { \
    emulator::note_access(address, size, is_write);              \
  }
#define ACCESSES(size) ACCESS(read, size, false) ACCESS(write, size, true)
ACCESSES(1);
ACCESSES(2);
ACCESSES(4);
ACCESSES(8);
ACCESSES(16);
extern "C" void __tsan_read_range(void* address, size_t size) {
  emulator::note_access(address, size, false);
}
extern "C" void __tsan_write_range(void* address, size_t size) {
  emulator::note_access(address, size, true);
}
extern "C" void __tsan_init() {
}
extern "C" void __tsan_func_entry(void*) {
}
extern "C" void __tsan_func_exit() {
}
extern "C" void __tsan_vptr_update(void**, void*) {
}
extern "C" void __tsan_vptr_read(void**) {
}
// Of the reference counts of tensors, on the host.
#define ATOMIC(bits, type)                                                    \
  extern "C" type __tsan_atomic##bits##_load(const type* p, int) {            \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                              \
  }                                                                           \
  extern "C" void __tsan_atomic##bits##_store(type* p, type value, int) {     \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                             \
  }                                                                           \
  extern "C" type __tsan_atomic##bits##_fetch_add(type* p, type value, int) { \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                    \
  }                                                                           \
  extern "C" type __tsan_atomic##bits##_fetch_sub(type* p, type value, int) { \
    return __atomic_fetch_sub(p, value, __ATOMIC_SEQ_CST);                    \
  }                                                                           \
  EXCHANGE(bits, type, weak) EXCHANGE(bits, type, strong)
#define EXCHANGE(bits, type, how)                                       \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_##how(         \
      type* p, type* expected, type value, int, int) {                  \
    return __atomic_compare_exchange_n(                                 \
        p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
ATOMIC(8, uint8_t);
ATOMIC(32, uint32_t);
ATOMIC(64, uint64_t);

TORCH_LIBRARY(freeanchor_emulator, m) {
  m.def("seed(int seed) -> ()", [](int64_t seed) { emulator::randomness.seed(seed); });
  m.def("find_races(bool on) -> ()", [](bool on) { emulator::finding_races = on; });
  // A barrier that is as if it were removed, by its number in the translation; -1 for none.
  m.def("skip(int barrier) -> ()", [](int64_t barrier) { emulator::skipped_barrier = barrier; });
}
