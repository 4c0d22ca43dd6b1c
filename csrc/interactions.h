// Score functions, element by element: of numbers on the GPU and at the ends of vectors, of whole vectors (vectors.h) on the CPU.
//
// A score is finish(Σ term(q, e)) of a query q = compose(h, r) and an entity e, the tail. The sum runs over dimensions, or in the complex plane
// over pairs (i, D/2 + i), as vectors are stored [re, im]. finish() leaves the slope by the sum, c is that times the loss's; slopes(q, e, c) are
// c·∂term/∂q and c·∂term/∂e. to_head(r, g) and to_relation(h, g) lead a gradient g of the query back through compose(). RotatE's r are cosines
// and sines here.
#pragma once

#include "reductions.h"
#include "vector_math.h"
#if !defined(__CUDACC__)
#include "vectors.h"  // whose overloads the templates below have to see
#endif

namespace dhns::kernels {
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
template <class S, class T>
DHNS_FN Complex<T> operator*(S a, Complex<T> b) { return {a * b.re, a * b.im}; }
template <class T>
DHNS_FN Complex<T> conjugate(Complex<T> a) { return {a.re, -a.im}; }

template <class E>
struct Slopes {
  E query, entity;
};

// The type by itself, to hand a choice made at run time to a generic function.
template <class T>
struct Type {
  using type = T;
};

struct OnReals {
  template <class T>
  using Element = T;
  static constexpr int kParts = 1;
  template <class V, class T>
  static DHNS_FN V at(const T* x, int64_t i, int64_t) { return load_as<V>(x + i); }
  template <class T>
  static DHNS_FN T load(const T* x, int64_t i, int64_t) { return x[i]; }
  template <class T, class V>
  static DHNS_FN void store(T* x, int64_t i, int64_t, V value) { std::memcpy(x + i, &value, sizeof value); }
};

struct OnComplex {
  template <class T>
  using Element = Complex<T>;
  static constexpr int kParts = 2;
  template <class V, class T>
  static DHNS_FN Complex<V> at(const T* x, int64_t i, int64_t n) { return {load_as<V>(x + i), load_as<V>(x + n + i)}; }
  template <class T>
  static DHNS_FN Complex<T> load(const T* x, int64_t i, int64_t n) { return {x[i], x[n + i]}; }
  template <class T, class V>
  static DHNS_FN void store(T* x, int64_t i, int64_t n, Complex<V> value) {
    std::memcpy(x + i, &value.re, sizeof(V)), std::memcpy(x + n + i, &value.im, sizeof(V));
  }
};

// Σ q∘e
struct Dot : OnReals {
  static constexpr bool kProduct = true;  // linear in the head, in the relation and in the tail: term(compose(h, r), t) is term(r, to_relation(h, t))
  template <class V>
  static DHNS_FN V term(V q, V e) { return q * e; }
  template <class V, class T>
  static DHNS_FN Slopes<V> slopes(V q, V e, T c) { return {c * e, c * q}; }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) { return slope = 1, sum; }
};

struct ComplexDot : OnComplex {
  static constexpr bool kProduct = true;
  template <class V>
  static DHNS_FN V term(Complex<V> q, Complex<V> e) { return q.re * e.re + q.im * e.im; }
  template <class V, class T>
  static DHNS_FN Slopes<Complex<V>> slopes(Complex<V> q, Complex<V> e, T c) { return {c * e, c * q}; }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) { return slope = 1, sum; }
};

// −‖q − e‖
template <int kNorm>
struct Distance : OnReals {
  static constexpr bool kProduct = false;
  template <class V>
  static DHNS_FN V term(V q, V e) {
    const V d = q - e;
    if constexpr (kNorm == 1)
      return absolute(d);
    else
      return d * d;
  }
  template <class V, class T>
  static DHNS_FN Slopes<V> slopes(V q, V e, T c) {
    V u = q - e;
    if constexpr (kNorm == 1)
      u = with_sign(c, u);
    else
      u = c * u;
    return {u, -u};
  }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) {
    const T distance = kNorm == 1 ? sum : std::sqrt(sum);
    slope = kNorm == 1 ? T(-1) : distance > 0 ? -1 / distance : T(0);
    return -distance;
  }
};

// −Σ |q − e|; a modulus of 0 has gradient 0
struct Moduli : OnComplex {
  static constexpr bool kProduct = false;
  template <class V>
  static DHNS_FN V term(Complex<V> q, Complex<V> e) {
    const Complex<V> d = q - e;
    return root(d.re * d.re + d.im * d.im);
  }
  template <class V, class T>
  static DHNS_FN Slopes<Complex<V>> slopes(Complex<V> q, Complex<V> e, T c) {
    const Complex<V> d = q - e, u = (c * inverse_root(d.re * d.re + d.im * d.im)) * d;
    return {u, {-u.re, -u.im}};
  }
  template <class T>
  static DHNS_FN T finish(T sum, T& slope) { return slope = -1, -sum; }
};

// Calls f(Type<...>) with the reduction of this number.
template <class F>
void with_reduction(int64_t reduction, F f) {
  switch (reduction) {
    case kDot: return f(Type<Dot>{});
    case kL2: return f(Type<Distance<2>>{});
    case kL1: return f(Type<Distance<1>>{});
    case kComplexL1: return f(Type<Moduli>{});
  }
}

// kPhases: relations are given as phases and taken as their cosines and sines. kNormalizes: heads, relations and tails may be brought to unit norm.
template <int kNorm>
struct TransE : Distance<kNorm> {
  static constexpr bool kPhases = false, kNormalizes = true;
  template <class V>
  static DHNS_FN V compose(V h, V r) { return h + r; }
  template <class V>
  static DHNS_FN V to_head(V, V g) { return g; }
  template <class V>
  static DHNS_FN V to_relation(V, V g) { return g; }
};

struct DistMult : Dot {
  static constexpr bool kPhases = false, kNormalizes = false;
  template <class V>
  static DHNS_FN V compose(V h, V r) { return h * r; }
  template <class V>
  static DHNS_FN V to_head(V r, V g) { return r * g; }
  template <class V>
  static DHNS_FN V to_relation(V h, V g) { return h * g; }
};

template <class Reduction>
struct Turned : Reduction {
  template <class V>
  static DHNS_FN Complex<V> compose(Complex<V> h, Complex<V> r) { return h * r; }
  template <class V>
  static DHNS_FN Complex<V> to_head(Complex<V> r, Complex<V> g) { return conjugate(r) * g; }
  template <class V>
  static DHNS_FN Complex<V> to_relation(Complex<V> h, Complex<V> g) { return conjugate(h) * g; }
};
struct ComplEx : Turned<ComplexDot> {
  static constexpr bool kPhases = false, kNormalizes = false;
};
struct RotatE : Turned<Moduli> {
  static constexpr bool kPhases = true, kNormalizes = false;
};

// Calls f(Type<...>) with the interaction of this number.
template <class F>
void with_interaction(int64_t interaction, F f) {
  switch (interaction) {
    case kTransE1: return f(Type<TransE<1>>{});
    case kTransE2: return f(Type<TransE<2>>{});
    case kDistMult: return f(Type<DistMult>{});
    case kComplEx: return f(Type<ComplEx>{});
    case kRotatE: return f(Type<RotatE>{});
  }
}

}  // namespace
}  // namespace dhns::kernels
