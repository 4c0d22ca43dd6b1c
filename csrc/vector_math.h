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

namespace dhns::kernels {
namespace {

template <class To, class From>
DHNS_FN To bits_of(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// A number, or a vector of them, from memory, by the type that is asked for.
template <class V, class T>
DHNS_FN V load_as(const T* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
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
DHNS_FN float scaled_down(float x, int32_t exponent) { return bits_of<float>(bits_of<uint32_t>(x) - (static_cast<uint32_t>(exponent) << 23)); }

// Added to a number of a smaller magnitude than 2²¹, it leaves its nearest integer in the last bits, and of NaN it leaves something: a conversion of
// NaN has no meaning.
constexpr float kInteger = 12582912.0f;
// 2^n of a whole number n.
DHNS_FN float power_of_two(float n) { return bits_of<float>((bits_of<uint32_t>(n + kInteger) + 127) << 23); }

DHNS_FN float sine_of_eighth(float x, float z) { return ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x; }
DHNS_FN float cosine_of_eighth(float z) {
  return ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
}

// In this order of operands each comparison is one min or max instruction, and NaN comes through.
template <class V>
DHNS_FN V clamped(V x, V low, V high) {
  const V below = high < x ? high : x;
  return low > below ? low : below;
}
#if defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ float clamped(float x, float low, float high) {
  asm("min.NaN.f32 %0, %0, %1;\n\tmax.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(high), "f"(low));
  return x;
}
#endif

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
  return y * power_of_two(n);
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

// tanh(c) = p/q for |c| up to where the result is 1 − 3e-7: a least-maximum fit, off by 2e-7 in exact arithmetic and 5e-7 in float, both
// relative. Two terms less than what would be exact to the last bit take an eighth off the loops that have it in them.
constexpr float kTangentIsOne = 7.9f;
template <class V>
DHNS_FN void tangent_parts(V c, V& numerator, V& denominator) {
  const V z = c * c;
  V p = z * -6.26343644e-09f + 7.22919549e-06f;
  p = p * z + 2.70522153e-03f;
  p = p * z + 1.2720938e-01f;
  p = p * z + 9.99999821e-01f;
  V q = z * 1.97881061e-04f + 2.28877254e-02f;
  q = q * z + 4.60541159e-01f;
  q = q * z + 1.0f;
  numerator = c * p, denominator = q;
}
DHNS_FN float quotient(float p, float q) {
#if defined(__CUDA_ARCH__)
  return __fdividef(p, q);  // two instructions, off by two units in the last place; q lies between 1 and 30 here
#else
  return p / q;
#endif
}
DHNS_FN float hyperbolic_tangent(float x) {
  float p, q;
  tangent_parts(clamped(x, -kTangentIsOne, kTangentIsOne), p, q);
  return quotient(p, q);
}
DHNS_FN double hyperbolic_tangent(double x) { return std::tanh(x); }

// Three-part reduction by π/2, good for |x| up to 8192; above that the caller asks the C library.
DHNS_FN void sine_cosine(float x, float& sine, float& cosine) {
  const float n = std::floor(x * 0.636619772f + 0.5f);
  const float r = ((x - n * 1.5703125f) - n * 4.83751296997070312e-4f) - n * 7.5497894159e-8f;
  const int32_t quarter = bits_of<int32_t>(n + kInteger);
  const float z = r * r, s = sine_of_eighth(r, z), c = cosine_of_eighth(z);
  const bool odd = quarter & 1;
  const float a = odd ? s : c, b = odd ? c : s;
  cosine = (quarter + 1) & 2 ? -a : a;
  sine = quarter & 2 ? -b : b;
}

DHNS_FN void sine_and_cosine(float x, float& sine, float& cosine) {
  if (std::fabs(x) <= 8192.0f) return sine_cosine(x, sine, cosine);
  sine = std::sin(x), cosine = std::cos(x);
}
DHNS_FN void sine_and_cosine(double x, double& sine, double& cosine) { sine = std::sin(x), cosine = std::cos(x); }

// What score functions are made of beside sums and products; vectors.h has the same for vectors.
template <class T>
DHNS_FN T absolute(T x) { return std::fabs(x); }
template <class T>
DHNS_FN T root(T x) { return std::sqrt(x); }
template <class T>
DHNS_FN T inverse_root(T x) { return x != 0 ? 1 / std::sqrt(x) : T(0); }
#if defined(__CUDA_ARCH__)
// One or two units in the last place off, and a fifth of the instructions.
template <>
__device__ __forceinline__ float root(float x) {
  asm("sqrt.approx.f32 %0, %0;" : "+f"(x));
  return x;
}
template <>
__device__ __forceinline__ float inverse_root(float x) { return x != 0 ? rsqrtf(x) : 0.0f; }
#endif
// c with the sign of d, 0 where d is.
template <class T>
DHNS_FN T with_sign(T c, T d) { return d != 0 ? (d < 0 ? -c : c) : T(0); }

// An infinite score is an overflow and no good or bad triple: it becomes NaN, so that the loss tells of it.
template <class T>
DHNS_FN T finite_or_nan(T x) {
  return (x - x) + x;
}

}  // namespace
}  // namespace dhns::kernels
