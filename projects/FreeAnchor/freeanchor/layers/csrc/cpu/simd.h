// One loop, compiled for several instruction sets, of which PyTorch's choice for this machine runs.
//
// PyTorch's choice can be seen with torch.backends.cpu.get_cpu_capability() and changed with the
// environment variable ATEN_CPU_CAPABILITY (default, avx2 or avx512).
#pragma once

#include <ATen/Version.h>

#include <string>

// What is inlined into a function for an instruction set is compiled for it.
#define FREEANCHOR_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define FREEANCHOR_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define FREEANCHOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define FREEANCHOR_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

namespace freeanchor {

#ifdef FREEANCHOR_AVX2
template <typename Loop>
FREEANCHOR_AVX512 auto run_avx512(const Loop& loop) {
  return loop();
}
template <typename Loop>
FREEANCHOR_AVX2 auto run_avx2(const Loop& loop) {
  return loop();
}
#endif

// Runs a lambda that is FREEANCHOR_INLINE_LAMBDA.
template <typename Loop>
auto simd(const Loop& loop) {
#ifdef FREEANCHOR_AVX2
  static const auto run = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? run_avx512<Loop>
           : capability == "AVX2" ? run_avx2<Loop>
                                  : +[](const Loop& loop) { return loop(); };
  }();
  return run(loop);
#else
  return loop();
#endif
}

} // namespace freeanchor
