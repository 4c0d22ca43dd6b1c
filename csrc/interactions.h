// The score functions and their gradients on vectors of one triple, shared by the loss kernels.
//
// score(h, r, t, u, D): the score, higher is better; distances also leave in u [D] the gradient of the distance with respect to the
// difference they measure, so that the gradient needs no second root or sign.
// gradient(h, r, t, u, c, gh, gr, gt, D): adds c·∂score to gh, gr and gt; gh and gt may be null.
// r is [D]: RotatE gets cosines and sines, `Relation` of the kernels turns phases into them.
#pragma once

#include "vector_math.h"

namespace dhns::DHNS_LEVEL {
namespace {

template <class T>
inline T dot(const T* __restrict a, const T* __restrict b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
inline void add_scaled(T* __restrict out, T c, const T* __restrict a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += c * a[i];
}

template <class T>
inline void add_scaled_product(T* __restrict out, T c, const T* __restrict a, const T* __restrict b, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += c * a[i] * b[i];
}

// out += c·a·b or c·conj(a)·b for complex vectors stored [re, im].
template <bool kConjugate, class T>
inline void add_scaled_complex_product(T* __restrict out, T c, const T* __restrict a, const T* __restrict b, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const T a_im = kConjugate ? -a[half + i] : a[half + i];
    out[i] += c * (a[i] * b[i] - a_im * b[half + i]);
    out[half + i] += c * (a[i] * b[half + i] + a_im * b[i]);
  }
}

template <int kNorm>
struct TransE {  // −‖h + r − t‖
  template <class T>
  static T score(const T* __restrict h, const T* __restrict r, const T* __restrict t, T* __restrict u, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const T x = h[i] + r[i] - t[i];
      sum += kNorm == 1 ? std::fabs(x) : x * x;
      u[i] = kNorm == 1 ? static_cast<T>(x > 0) - static_cast<T>(x < 0) : x;
    }
    if (kNorm == 1) return -sum;
    const T root = std::sqrt(sum), scale = root > 0 ? 1 / root : 0;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) u[i] *= scale;
    return -root;
  }
  template <class T>
  static void gradient(const T*, const T*, const T*, const T* __restrict u, T c, T* __restrict gh, T* __restrict gr, T* __restrict gt, int64_t n) {
    if (gh) add_scaled(gh, -c, u, n);
    add_scaled(gr, -c, u, n);
    if (gt) add_scaled(gt, c, u, n);
  }
};

struct DistMult {  // Σ h∘r∘t
  template <class T>
  static T score(const T* __restrict h, const T* __restrict r, const T* __restrict t, T*, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += h[i] * r[i] * t[i];
    return sum;
  }
  template <class T>
  static void gradient(const T* h, const T* r, const T* t, const T*, T c, T* gh, T* gr, T* gt, int64_t n) {
    if (gh) add_scaled_product(gh, c, r, t, n);
    add_scaled_product(gr, c, h, t, n);
    if (gt) add_scaled_product(gt, c, h, r, n);
  }
};

struct ComplEx {  // Re Σ h∘r∘conj(t), stored [re, im]
  template <class T>
  static T score(const T* __restrict h, const T* __restrict r, const T* __restrict t, T*, int64_t n) {
    const int64_t half = n / 2;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < half; ++i)
      sum += (h[i] * r[i] - h[half + i] * r[half + i]) * t[i] + (h[i] * r[half + i] + h[half + i] * r[i]) * t[half + i];
    return sum;
  }
  template <class T>
  static void gradient(const T* h, const T* r, const T* t, const T*, T c, T* gh, T* gr, T* gt, int64_t n) {
    if (gh) add_scaled_complex_product<true>(gh, c, r, t, n);
    add_scaled_complex_product<true>(gr, c, h, t, n);
    if (gt) add_scaled_complex_product<false>(gt, c, h, r, n);
  }
};

struct RotatE {  // −Σ |h∘r − t|, stored [re, im]; a modulus of 0 has gradient 0
  template <class T>
  static T score(const T* __restrict h, const T* __restrict r, const T* __restrict t, T* __restrict u, int64_t n) {
    const int64_t half = n / 2;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < half; ++i) {
      const T re = h[i] * r[i] - h[half + i] * r[half + i] - t[i], im = h[i] * r[half + i] + h[half + i] * r[i] - t[half + i];
      const T modulus = std::sqrt(re * re + im * im), scale = modulus > 0 ? 1 / modulus : 0;
      sum += modulus;
      u[i] = re * scale;
      u[half + i] = im * scale;
    }
    return -sum;
  }
  template <class T>
  static void gradient(const T* h, const T* r, const T*, const T* u, T c, T* gh, T* gr, T* gt, int64_t n) {
    if (gh) add_scaled_complex_product<true>(gh, -c, r, u, n);
    add_scaled_complex_product<true>(gr, -c, h, u, n);
    if (gt) add_scaled(gt, c, u, n);
  }
};

// Cosines, then sines of phases, [n / 2] -> [n].
template <class T>
inline void cosines_sines(const T* __restrict phase, T* __restrict out, int64_t n) {
  const int64_t half = n / 2;
  bool small = sizeof(T) == 4;
  for (int64_t i = 0; i < half; ++i) small &= std::fabs(phase[i]) < T(8192);
  if constexpr (sizeof(T) == 4) {
    if (small) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        float sine, cosine;
        sine_cosine(phase[i], sine, cosine);
        out[i] = cosine;
        out[half + i] = sine;
      }
      return;
    }
  }
  for (int64_t i = 0; i < half; ++i) out[i] = std::cos(phase[i]), out[half + i] = std::sin(phase[i]);
}

// The gradient of phases from that of cosines and sines.
template <class T>
inline void phase_gradient(const T* __restrict r, const T* __restrict gr, T* __restrict out, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) out[i] = r[i] * gr[half + i] - r[half + i] * gr[i];
}

}  // namespace
}  // namespace dhns::DHNS_LEVEL
