// The focal loss of background, q^gamma * -log(1 - q), and its gradient, for the CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "box_iou.h"

namespace freeanchor {

// The polynomial with these coefficients, of the highest power first. std::fma is an instruction
// but on x86 without AVX2, where the loss takes ten times as long.
template <typename... Lower>
FREEANCHOR_INLINE float polynomial(float x, float sum, Lower... lower) {
  ((sum = std::fma(sum, x, lower)), ...);
  return sum;
}

// exp(-z) for z >= 0, to two units in the last place. Above 87, where the result is below 2^-125,
// that of 87.
FREEANCHOR_INLINE float exp_minus(float z) {
#ifdef __CUDA_ARCH__
  return std::exp(-z);
#else
  z = z > 87.0f ? 87.0f : z;            // NaN stays
  constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = std::fma(z, -1.44269504f, kRound);
  const float n = shifted - kRound;
  // exp(-z) = 2^n exp(r) with |r| <= log(2) / 2; log(2) in two parts
  float r = std::fma(n, -0.693145752f, -z);
  r = std::fma(n, -1.42860677e-6f, r);
  // Interpolation at the Chebyshev nodes, relative error 3e-9
  const float p = polynomial(
      r, 1.394121298e-3f, 8.375210201e-3f, 4.166635164e-2f, 1.666641451e-1f, 0.5f, 1.0f, 1.0f);
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u; // 2^n: the low bits of `shifted` are those of n
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
#endif
}
FREEANCHOR_INLINE double exp_minus(double z) {
  return std::exp(-z);
}

// log(1 + e) for e in [0, 1], to two units in the last place. The function of CUDA takes any e and
// has twice as many instructions, which would bound the speed, not the memory.
FREEANCHOR_INLINE float log1p_unit(float e) {
  // log(1 + e) / e interpolated at the Chebyshev nodes, relative error 5e-9
  return e * polynomial(
                 e, -3.176057010e-3f, 1.954252722e-2f, -5.637361275e-2f, 1.054362379e-1f,
                 -1.526966707e-1f, 1.966327426e-1f, -2.495161626e-1f, 3.332971050e-1f,
                 -4.999989265e-1f, 1.0f);
}
FREEANCHOR_INLINE double log1p_unit(double e) {
  return std::log1p(e);
}

// 1 / x for x in [1, 2], to one unit in the last place.
template <typename T>
FREEANCHOR_INLINE T reciprocal(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fdividef(1, x);
  }
#endif
  return 1 / x;
}

// The loss of one logit, and its derivative.
template <typename T>
struct Term {
  T value, slope;
};

// With P{a in A+} = 0, so q = p = sigmoid(x). `square` says that gamma is 2.
template <typename T>
FREEANCHOR_INLINE Term<T> background_term(T x, T gamma, bool square) {
  const T e = exp_minus(x < 0 ? -x : x), log1p_e = log1p_unit(e), r = reciprocal(1 + e);
  const T p = x >= 0 ? r : e * r, not_p = x >= 0 ? e * r : r;
  const T nll = (x > 0 ? x : 0) + log1p_e;
  // p^gamma = exp(gamma * log(p)) with -log(p) = max(-x, 0) + log1p(e)
  const T power = square ? p * p : exp_minus(gamma * ((x < 0 ? -x : 0) + log1p_e));
  return {power * nll, power * std::fma(gamma * not_p, nll, p)};
}

// With P{a in A+} = prob, so q = p * (1 - prob).
template <typename T>
C10_HOST_DEVICE inline Term<T> matched_term(T x, T prob, T gamma) {
  const T e = std::exp(-std::abs(x));
  const T p = (x >= 0 ? 1 : e) / (1 + e), not_p = (x >= 0 ? e : 1) / (1 + e);
  const T q = p * (1 - prob), not_q = not_p + p * prob;
  const T nll = q < T(0.5) ? -std::log1p(-q) : -std::log(not_q);
  const T power = std::pow(q, gamma);
  return {power * nll, power * not_p * (gamma * nll + q / not_q)};
}

} // namespace freeanchor
