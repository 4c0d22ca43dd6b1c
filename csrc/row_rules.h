// What a row-wise optimiser does to one row, in the pass over the rows of a step (rowwise_cpu.cpp) and where a loss has just read it
// (corruption_cpu.cpp): one source, so that a row gets the same bits in both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pairs.h"
#include "rowwise_cpu.h"

namespace dhns::kernels {
namespace {

// Rows between a request and its use: some 2 µs, more than memory takes to answer.
constexpr int64_t kAhead = 4;

// The gradient g is weight·vector: what a row is given but once is read where it lies.
template <class T>
inline void adam(T* x, T* m, T* v, const T* vector, T weight, int64_t dim, T rate, T beta1, T beta2, T correction, T epsilon) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) {
    const T g = weight * vector[i];
    m[i] = beta1 * m[i] + (1 - beta1) * g;
    v[i] = beta2 * v[i] + (1 - beta2) * g * g;
    x[i] -= rate * m[i] / (std::sqrt(v[i]) * correction + epsilon);
  }
}

template <class T>
inline void adagrad(T* x, T* s, const T* vector, T weight, int64_t dim, T rate, T epsilon) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) {
    const T g = weight * vector[i];
    s[i] += g * g;
    x[i] -= rate * g / (std::sqrt(s[i]) + epsilon);
  }
}

// The sum of a vector's lanes, by halves: one after the other they would take longer than all else of a row.
template <class T>
inline T folded(Vector<T> x) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &x, sizeof x);
  for (int half = kLanes<T> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T>
inline void rowwise_adagrad(T* x, T* s, const T* vector, T weight, int64_t dim, T rate, T epsilon) {
  Vector<T> squares{};
  T rest = 0;
  each<T>(dim, [&](int64_t i, auto v) {
    using V = decltype(v);
    const V y = weight * load_as<V>(vector + i);
    if constexpr (sizeof(V) == sizeof(T))
      rest += y * y;
    else
      squares += y * y;
  });
  *s += (folded<T>(squares) + rest) / static_cast<T>(dim);
  const T step = rate / (std::sqrt(*s) + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) x[i] -= step * (weight * vector[i]);
}

// Σ weight·vector.
template <class T>
inline void weighted_sum(T* sum, const T* const* vectors, const T* weights, int64_t count, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) sum[i] = weights[0] * vectors[0][i];
  for (int64_t k = 1; k < count; ++k) {
    const T* const v = vectors[k];
    const T w = weights[k];
    for (int64_t i = 0; i < dim; ++i) sum[i] += w * v[i];
  }
}

// The sum of all that a row x is given, in `sum`; terms are symmetric in the two that meet.
template <class R, class T>
inline void gradient_of_row(T* sum, const T* x, const T* const* vectors, const T* weights, int64_t pairs, int64_t count, int64_t dim) {
  if constexpr (R::kProduct) {
    weighted_sum(sum, vectors, weights, count, dim);
  } else {
    int64_t k = 0;
    std::fill(sum, sum + dim, T(0));
    for (; k + kRows <= pairs; k += kRows) add_gradients<R>(sum, x, vectors + k, weights + k, dim);
    for (; k < pairs; ++k) add_gradients<R, 1>(sum, x, vectors + k, weights + k, dim);
    for (; k < count; ++k)
      for (int64_t i = 0; i < dim; ++i) sum[i] += vectors[k][i];
  }
}

// What a row is given: vectors and their weights, the first `pairs` of `count` being queries that met it.
template <class T>
struct Given {
  const T* const* vectors;
  const T* weights;
  int64_t pairs, count;
};

// Asks for what a rule keeps of a row.
template <class T>
inline void fetch_state(const RowRule<T>& rule, const T* first, const T* second, int64_t row, int64_t dim) {
  const int64_t bytes = rule.method == kRowwiseAdagrad ? 1 : dim * static_cast<int64_t>(sizeof(T));
  fetch_bytes(rule.state(first, row, dim), bytes);
  if (second) fetch_bytes(rule.state(second, row, dim), bytes);
}

// Moves the row x and its state by one step; `sum` is scratch of `dim` numbers.
template <class R, class T>
inline void move_row(const RowRule<T>& rule, T* x, T* first, T* second, const Given<T>& given, int64_t dim, T* sum) {
  const T* g = given.vectors[0];
  T weight = given.weights[0];
  if (given.count > 1 || (given.pairs && !R::kProduct) || rule.n3 != 0) {
    gradient_of_row<R>(sum, x, given.vectors, given.weights, given.pairs, given.count, dim);
    if (rule.n3 != 0)
      for (int64_t i = 0; i < dim; ++i) sum[i] += 3 * rule.n3 * x[i] * std::fabs(x[i]);
    g = sum;
    weight = 1;
  }
  switch (rule.method) {
    case kLazyAdam: adam(x, first, second, g, weight, dim, rule.rate, rule.beta1, rule.beta2, rule.correction, rule.epsilon); break;
    case kAdagrad: adagrad(x, first, g, weight, dim, rule.rate, rule.epsilon); break;
    case kRowwiseAdagrad: rowwise_adagrad(x, first, g, weight, dim, rule.rate, rule.epsilon); break;
  }
}

}  // namespace
}  // namespace dhns::kernels
