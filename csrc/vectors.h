// Vectors of the processor as values, for the inner loops of CPU kernels: the same expressions as for one number, see interactions.h.
//
// each() walks over whole vectors and then over what is left one by one; a loop body is a generic lambda that sees which of the two it has.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <new>
#include <vector>

#include "vector_math.h"

namespace dhns::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLineBytes = 64;

// Asks for the line at p, which is wanted soon; kLevel 3: in the first-level cache, 2: in the second. The empty assembly is an effect: g++ 12 takes a
// function that only prefetches for one without any, and drops calls of it that it has not put in line (a step's update of rows in 512 MB waited
// for each of them: 12.1 µs a triple, 8.9 with what is asked for here).
template <int kLevel = 3>
inline void fetch_line(const void* p) {
  __builtin_prefetch(p, 0, kLevel);
  asm volatile("");
}

// Asks for the lines of memory that is wanted soon.
template <int kLevel = 3>
inline void fetch_bytes(const void* p, int64_t bytes) {
  const char* const c = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += kLineBytes) fetch_line<kLevel>(c + i);
}

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
using Floats = Vector<float>;
using Doubles = Vector<double>;
typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class F>
inline auto by_lane(Doubles x, F f) {
  Doubles out{};
  for (int lane = 0; lane < kLanes<double>; ++lane) out[lane] = f(x[lane]);
  return out;
}

#if defined(__AVX512F__)
inline Floats inverse_estimate(Floats x) { return (Floats)_mm512_rcp14_ps((__m512)x); }
inline Floats inverse_root_estimate(Floats x) { return (Floats)_mm512_rsqrt14_ps((__m512)x); }
#elif defined(__AVX2__)
inline Floats inverse_estimate(Floats x) { return (Floats)_mm256_rcp_ps((__m256)x); }
inline Floats inverse_root_estimate(Floats x) { return (Floats)_mm256_rsqrt_ps((__m256)x); }
#endif

inline Floats absolute(Floats x) { return (Floats)((Bits)x & 0x7fffffff); }
inline Doubles absolute(Doubles x) { return by_lane(x, [](double y) { return std::fabs(y); }); }
inline Floats with_sign(float c, Floats d) { return (Floats)(((Bits)(c - Floats{}) ^ ((Bits)d & INT32_MIN)) & (Bits)(d != 0)); }
inline Doubles with_sign(double c, Doubles d) { return by_lane(d, [c](double y) { return with_sign(c, y); }); }

// Estimates of 2⁻¹² and a Newton step: relative errors below 4e-7, at a third of the time of the division and of the root. The smallest
// normal number under a root makes a modulus of 0 one of 1e-19, with a finite inverse.
#if defined(__AVX2__) || defined(__AVX512F__)
inline Floats inverse(Floats x) {
  const Floats y = inverse_estimate(x);
  return y * (2.0f - x * y);
}
inline Floats inverse_root(Floats square) {
  const Floats m = square + 1.17549435e-38f, y = inverse_root_estimate(m);
  return y * (1.5f - 0.5f * m * y * y);
}
inline Floats root(Floats square) {
  const Floats m = square + 1.17549435e-38f, y = inverse_root_estimate(m), s = m * y;
  return s * (1.5f - 0.5f * s * y);
}
#else
inline Floats inverse(Floats x) { return 1.0f / x; }
inline Floats root(Floats square) {
  Floats out{};
  for (int lane = 0; lane < kLanes<float>; ++lane) out[lane] = std::sqrt(square[lane]);
  return out;
}
inline Floats inverse_root(Floats square) { return 1.0f / root(square + 1.17549435e-38f); }
#endif
inline Doubles root(Doubles square) { return by_lane(square, [](double y) { return root(y); }); }
inline Doubles inverse_root(Doubles square) { return by_lane(square, [](double y) { return inverse_root(y); }); }

// clamped() as the two instructions that it is, which the compiler finds for numbers but not for vectors.
inline Floats within(Floats x, float limit) {
  const Floats high = limit - Floats{};
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)-high, _mm512_min_ps((__m512)high, (__m512)x));
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)-high, _mm256_min_ps((__m256)high, (__m256)x));
#else
  return clamped(x, -high, high);
#endif
}

inline Floats hyperbolic_tangent(Floats x) {
  Floats p, q;
  tangent_parts(within(x, kTangentIsOne), p, q);
  return p * inverse(q);
}
inline Doubles hyperbolic_tangent(Doubles x) { return by_lane(x, [](double y) { return hyperbolic_tangent(y); }); }

// While one lives, numbers below the least normal one count as 0: the gradient of a triple that is scored beyond doubt is such a number, and a
// processor may be slow at each (RotatE's loss of B 2000, D 1024, M 3 on Sapphire Rapids, two threads: 245 ms with them, 32 without).
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results and operands
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | 1 << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Scratch that begins with a cache line, so that no vector in it crosses two, and some lines further into its page than the one before: a
// load that follows a store to the same place of another page waits for it in vain.
template <class T>
struct LineAllocator {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T) + 3 * kLineBytes, std::align_val_t(kLineBytes))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(kLineBytes)); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

// A sum over a loop of each().
template <class T>
class Sum {
 public:
  void add(Vector<T> x) { lanes_ += x; }
  void add(T x) { rest_ += x; }
  T total() const {
    T total = rest_;
    for (int lane = 0; lane < kLanes<T>; ++lane) total += lanes_[lane];
    return total;
  }

 private:
  Vector<T> lanes_{};
  T rest_ = 0;
};

// Writes past the caches what nobody reads soon: no line is fetched from memory first, only to be overwritten. Whole lines of aligned vectors;
// fence() before another thread may look.
inline void put_past_caches(float* p, float x) { *p = x; }
inline void put_past_caches(double* p, double x) { *p = x; }
#if defined(__AVX512F__)
inline void put_past_caches(float* p, Floats x) { _mm512_stream_ps(p, (__m512)x); }
inline void put_past_caches(double* p, Doubles x) { _mm512_stream_pd(p, (__m512d)x); }
#elif defined(__AVX2__)
inline void put_past_caches(float* p, Floats x) { _mm256_stream_ps(p, (__m256)x); }
inline void put_past_caches(double* p, Doubles x) { _mm256_stream_pd(p, (__m256d)x); }
#else
inline void put_past_caches(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void put_past_caches(double* p, Doubles x) { std::memcpy(p, &x, sizeof x); }
#endif
inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// For large loop bodies: each() calls them from three places, and a call reads again all that the body refers to.
#define DHNS_ALWAYS_INLINE __attribute__((always_inline))

// f(i, V) for i = 0 .. n − 1 in steps of V, a vector or one number; touch(i) once a cache line, for prefetching.
template <class T, class F, class Touch>
inline void each(int64_t n, F f, Touch touch) {
  constexpr int lanes = kLanes<T>, line = kLineBytes / static_cast<int>(sizeof(T));
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    touch(i);
    for (int j = 0; j < line; j += lanes) f(i + j, Vector<T>{});
  }
  for (; i + lanes <= n; i += lanes) f(i, Vector<T>{});
  for (; i < n; ++i) f(i, T(0));
}
template <class T, class F>
inline void each(int64_t n, F f) {
  each<T>(n, f, [](int64_t) {});
}

// out = f(i, V) element by element, past the caches where that is asked for; fence() then.
template <class T, class F>
inline void write(T* out, int64_t n, bool past, F f) {
  if (past && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0)
    each<T>(n, [&](int64_t i, auto v) { put_past_caches(out + i, f(i, v)); });
  else
    each<T>(n, [&](int64_t i, auto v) {
      const auto y = f(i, v);
      std::memcpy(out + i, &y, sizeof y);
    });
}

}  // namespace
}  // namespace dhns::kernels
