// The score functions element by element, and the loops over vectors that all of them share.
//
// A score is finish(Σ term(h, r, t)); the sum runs over dimensions, or for models in the complex plane over pairs (i, D/2 + i), as vectors
// are stored [re, im]. term() leaves in u what slopes() wants to see again; slopes() gives c·∂term for h, r and t. RotatE's r are
// cosines and sines here.
#pragma once

#include "vector_math.h"

namespace dhns::DHNS_LEVEL {
namespace {

template <class T>
struct Complex {
  T re, im;
};
template <class T>
DHNS_FN Complex<T> operator+(Complex<T> a, Complex<T> b) { return {a.re + b.re, a.im + b.im}; }
template <class T>
DHNS_FN Complex<T> operator-(Complex<T> a, Complex<T> b) { return {a.re - b.re, a.im - b.im}; }
template <class T>
DHNS_FN Complex<T> operator*(Complex<T> a, Complex<T> b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
template <class T>
DHNS_FN Complex<T> operator*(T a, Complex<T> b) { return {a * b.re, a * b.im}; }
template <class T>
DHNS_FN Complex<T> conjugate(Complex<T> a) { return {a.re, -a.im}; }

template <class E>
struct Triple {
  E h, r, t;
};

struct OnReals {
  template <class T>
  using Element = T;
  static constexpr int kParts = 1;
  template <class T>
  static DHNS_FN T load(const T* x, int64_t i, int64_t) { return x[i]; }
  template <class T>
  static DHNS_FN void store(T* x, int64_t i, int64_t, T value) { x[i] = value; }
};

struct OnComplex {
  template <class T>
  using Element = Complex<T>;
  static constexpr int kParts = 2;
  template <class T>
  static DHNS_FN Complex<T> load(const T* x, int64_t i, int64_t n) { return {x[i], x[n + i]}; }
  template <class T>
  static DHNS_FN void store(T* x, int64_t i, int64_t n, Complex<T> value) { x[i] = value.re, x[n + i] = value.im; }
};

// −‖h + r − t‖
template <int kNorm>
struct TransE : OnReals {
  template <class T>
  static DHNS_FN T term(T h, T r, T t) {
    const T d = h + r - t;
    return kNorm == 1 ? std::fabs(d) : d * d;
  }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) {
    const T distance = kNorm == 1 ? sum : std::sqrt(sum);
    slope = kNorm == 1 ? T(-1) : distance > 0 ? -1 / distance : T(0);
    return -distance;
  }
  template <class T>
  static DHNS_FN Triple<T> slopes(T h, T r, T t, T c) {
    const T d = h + r - t, cu = kNorm == 2 ? c * d : d > 0 ? c : d < 0 ? -c : T(0);
    return {cu, cu, -cu};
  }
};

// Σ h∘r∘t
struct DistMult : OnReals {
  template <class T>
  static DHNS_FN T term(T h, T r, T t) { return h * r * t; }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) { return slope = 1, sum; }
  template <class T>
  static DHNS_FN Triple<T> slopes(T h, T r, T t, T c) { return {c * r * t, c * h * t, c * h * r}; }
};

// Re Σ h∘r∘conj(t)
struct ComplEx : OnComplex {
  template <class T>
  static DHNS_FN T term(Complex<T> h, Complex<T> r, Complex<T> t) {
    const Complex<T> x = h * r;
    return x.re * t.re + x.im * t.im;
  }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) { return slope = 1, sum; }
  template <class T>
  static DHNS_FN Triple<Complex<T>> slopes(Complex<T> h, Complex<T> r, Complex<T> t, T c) {
    return {c * (conjugate(r) * t), c * (conjugate(h) * t), c * (h * r)};
  }
};

// −Σ |h∘r − t|; a modulus of 0 has gradient 0
struct RotatE : OnComplex {
  template <class T>
  static DHNS_FN T term(Complex<T> h, Complex<T> r, Complex<T> t) {
    const Complex<T> d = h * r - t;
    return std::sqrt(d.re * d.re + d.im * d.im);
  }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) { return slope = -1, -sum; }
  template <class T>
  static DHNS_FN Triple<Complex<T>> slopes(Complex<T> h, Complex<T> r, Complex<T> t, T c) {
    const Complex<T> d = h * r - t;
    const T square = d.re * d.re + d.im * d.im, scale = square > 0 ? c / std::sqrt(square) : T(0);
    const Complex<T> u = scale * d;
    return {conjugate(r) * u, conjugate(h) * u, T(-1) * u};
  }
};

// One triple: the score, and the slope of finish() for gradient_of.
template <class I, class T>
inline T score_of(const T* __restrict h, const T* __restrict r, const T* __restrict t, T& slope, int64_t dim) {
  const int64_t n = dim / I::kParts;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += I::term(I::load(h, i, n), I::load(r, i, n), I::load(t, i, n));
  return I::finish(sum, slope);
}

// gh, gr, gt = c·∂score.
template <class I, class T>
inline void gradient_of(
    const T* __restrict h, const T* __restrict r, const T* __restrict t, T c, T* __restrict gh, T* __restrict gr, T* __restrict gt, int64_t dim) {
  const int64_t n = dim / I::kParts;
  for (int64_t i = 0; i < n; ++i) {
    const auto g = I::slopes(I::load(h, i, n), I::load(r, i, n), I::load(t, i, n), c);
    I::store(gh, i, n, g.h);
    I::store(gr, i, n, g.r);
    I::store(gt, i, n, g.t);
  }
}

// The corruptions of (h, r, t) with x for the head, y for the tail, and both: three sums from five loads.
template <class I, class T>
inline void scores_of_corruptions(
    const T* __restrict h, const T* __restrict r, const T* __restrict t, const T* __restrict x, const T* __restrict y, T* score, T* slope,
    int64_t dim) {
  const int64_t n = dim / I::kParts;
  T head = 0, tail = 0, both = 0;
#pragma omp simd reduction(+ : head, tail, both)
  for (int64_t i = 0; i < n; ++i) {
    head += I::term(I::load(x, i, n), I::load(r, i, n), I::load(t, i, n));
    tail += I::term(I::load(h, i, n), I::load(r, i, n), I::load(y, i, n));
    both += I::term(I::load(x, i, n), I::load(r, i, n), I::load(y, i, n));
  }
  score[0] = I::finish(head, slope[0]);
  score[1] = I::finish(tail, slope[1]);
  score[2] = I::finish(both, slope[2]);
}

// Adds Σ_k c_k·∂score_k to gh, gr, gt; writes that for x and y where kGenerated.
template <class I, bool kGenerated, class T>
inline void gradients_of_corruptions(
    const T* __restrict h, const T* __restrict r, const T* __restrict t, const T* __restrict x, const T* __restrict y, const T* c,
    T* __restrict gh, T* __restrict gr, T* __restrict gt, T* __restrict gx, T* __restrict gy, int64_t dim) {
  const int64_t n = dim / I::kParts;
  const T c0 = c[0], c1 = c[1], c2 = c[2];
  for (int64_t i = 0; i < n; ++i) {
    const auto hi = I::load(h, i, n), ri = I::load(r, i, n), ti = I::load(t, i, n), xi = I::load(x, i, n), yi = I::load(y, i, n);
    const auto head = I::slopes(xi, ri, ti, c0), tail = I::slopes(hi, ri, yi, c1), both = I::slopes(xi, ri, yi, c2);
    I::store(gh, i, n, I::load(gh, i, n) + tail.h);
    I::store(gr, i, n, I::load(gr, i, n) + head.r + tail.r + both.r);
    I::store(gt, i, n, I::load(gt, i, n) + head.t);
    if (kGenerated) I::store(gx, i, n, head.h + both.h), I::store(gy, i, n, tail.t + both.t);
  }
}

// Four sums hide the latency of the addition.
template <class T>
inline T dot(const T* __restrict a, const T* __restrict b, int64_t n) {
  const int64_t q = n / 4;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < q; ++i) {
    s0 += a[i] * b[i];
    s1 += a[q + i] * b[q + i];
    s2 += a[2 * q + i] * b[2 * q + i];
    s3 += a[3 * q + i] * b[3 * q + i];
  }
  for (int64_t i = 4 * q; i < n; ++i) s0 += a[i] * b[i];
  return (s0 + s1) + (s2 + s3);
}

template <class T>
inline void add_scaled(T* __restrict out, T c, const T* __restrict a, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += c * a[i];
}

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
