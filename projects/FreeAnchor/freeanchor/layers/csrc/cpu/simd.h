// One loop, compiled for several instruction sets, of which PyTorch's choice for this machine runs.
//
// PyTorch's choice can be seen with torch.backends.cpu.get_cpu_capability() and changed with the
// environment variable ATEN_CPU_CAPABILITY (default, avx2 or avx512).
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define FREEANCHOR_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define FREEANCHOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define FREEANCHOR_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

// The loop is written once, as a function that is inlined into one function per instruction set.
#define FREEANCHOR_INLINE inline __attribute__((always_inline))

// Whether a * b + c is one instruction where nothing but the compiler's default may be used.
#ifdef __FMA__
constexpr bool kDefaultFma = true;
#elif defined(__ARM_FEATURE_FMA)
constexpr bool kDefaultFma = true;
#else
constexpr bool kDefaultFma = false;
#endif

// Defines `name`, with the signature `(params)`, to run body<fma>(args).
#ifdef FREEANCHOR_AVX2
#define FREEANCHOR_SIMD(result, name, params, body, ...)       \
  FREEANCHOR_AVX512 result name##_avx512 params {              \
    return body<true>(__VA_ARGS__);                            \
  }                                                            \
  FREEANCHOR_AVX2 result name##_avx2 params {                  \
    return body<true>(__VA_ARGS__);                            \
  }                                                            \
  result name##_default params {                               \
    return body<kDefaultFma>(__VA_ARGS__);                     \
  }                                                            \
  result name params {                                         \
    static const auto chosen = [] {                            \
      const std::string capability = at::get_cpu_capability(); \
      return capability == "AVX512" ? name##_avx512            \
             : capability == "AVX2" ? name##_avx2              \
                                    : name##_default;          \
    }();                                                       \
    return chosen(__VA_ARGS__);                                \
  }
#else
#define FREEANCHOR_SIMD(result, name, params, body, ...) \
  result name params {                                   \
    return body<kDefaultFma>(__VA_ARGS__);               \
  }
#endif
