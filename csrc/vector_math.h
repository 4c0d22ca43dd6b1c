// Elementary functions that the compiler can put into vector loops (a call of the C library cannot be): for float polynomials of
// Cephes with a relative error of some 1e-7, for double the C library, as double serves gradient checks and not speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// A real call on the GPU saves registers to memory around it: nothing here is one.
#if defined(__CUDACC__)
#define DHNS_FN __host__ __device__ __forceinline__
#else
#define DHNS_FN inline
#endif

namespace dhns::DHNS_LEVEL {
namespace {

template <class To, class From>
DHNS_FN To bits_of(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ln(2^e·(1 + f)) for 1 + f in [√½, √2).
DHNS_FN float log_from_parts(float f, float e) {
  const float z = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z + e * -2.12194440e-4f - 0.5f * z;
  return f + y + e * 0.693359375f;
}

// The exponent of x > 0 relative to √½, so that x·2^−exponent lies in [√½, √2).
DHNS_FN int32_t exponent_of(float x) { return (bits_of<int32_t>(x) - 0x3f3504f3) >> 23; }
DHNS_FN float scaled_down(float x, int32_t exponent) { return bits_of<float>(bits_of<int32_t>(x) - (exponent << 23)); }

DHNS_FN float sine_of_eighth(float x, float z) { return ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x; }
DHNS_FN float cosine_of_eighth(float z) {
  return ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
}

// In this order of operands each comparison is one min or max instruction, and NaN comes through.
DHNS_FN float clamped(float x, float low, float high) {
  const float below = high < x ? high : x;
  return low > below ? low : below;
}

DHNS_FN float exponential(float x) {
  const float bounded = clamped(x, -87.0f, 88.0f);
  const float n = std::floor(bounded * 1.44269504f + 0.5f);
  const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * bits_of<float>((static_cast<int32_t>(n) + 127) << 23);
}
DHNS_FN double exponential(double x) { return std::exp(x); }

// ln(1 + x) for x in [0, 1]; what 1 + x rounds away is added back.
DHNS_FN float log_one_plus(float x) {
  const float u = 1.0f + x;
  const int32_t exponent = exponent_of(u);
  return log_from_parts(scaled_down(u, exponent) - 1.0f, static_cast<float>(exponent)) + (x - (u - 1.0f)) / u;
}
DHNS_FN double log_one_plus(double x) { return std::log1p(x); }

// −logσ(−x) = ln(1 + eˣ) and σ(x) from one exponential of −|x|, which cannot overflow.
template <class T>
DHNS_FN T softplus_sigmoid(T x, T& sigmoid) {
  const T e = exponential(-std::fabs(x)), inverse = T(1) / (T(1) + e);
  sigmoid = x >= 0 ? inverse : e * inverse;
  return (x > 0 ? x : (x <= 0 ? T(0) : x)) + log_one_plus(e);
}

// Rational approximation of Eigen; beyond 7.9 the result is ±1 in float.
DHNS_FN float hyperbolic_tangent(float x) {
  const float c = clamped(x, -7.90531110763549805f, 7.90531110763549805f);
  const float z = c * c;
  float p = -2.76076847742355e-16f;
  p = p * z + 2.00018790482477e-13f;
  p = p * z - 8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-08f;
  p = p * z + 1.48572235717979e-05f;
  p = p * z + 6.37261928875436e-04f;
  p = p * z + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * z + 1.18534705686654e-04f;
  q = q * z + 2.26843463243900e-03f;
  q = q * z + 4.89352518554385e-03f;
  return c * p / q;
}
DHNS_FN double hyperbolic_tangent(double x) { return std::tanh(x); }

// Three-part reduction by π/2, good for |x| up to 8192; above that the caller asks the C library.
DHNS_FN void sine_cosine(float x, float& sine, float& cosine) {
  const float n = std::floor(x * 0.636619772f + 0.5f);
  const float r = ((x - n * 1.5703125f) - n * 4.83751296997070312e-4f) - n * 7.5497894159e-8f;
  const int32_t quarter = static_cast<int32_t>(n);
  const float z = r * r, s = sine_of_eighth(r, z), c = cosine_of_eighth(z);
  const bool odd = quarter & 1;
  const float a = odd ? s : c, b = odd ? c : s;
  cosine = (quarter + 1) & 2 ? -a : a;
  sine = quarter & 2 ? -b : b;
}

// An infinite score is an overflow and no good or bad triple: it becomes NaN, so that the loss tells of it.
template <class T>
DHNS_FN T finite_or_nan(T x) {
  return (x - x) + x;
}

}  // namespace
}  // namespace dhns::DHNS_LEVEL
