// A vector against others, four at a time: one load of the common vector for four, and four sums that hide the latency of the addition.
#pragma once

#include "interactions.h"

namespace dhns::kernels {
namespace {

constexpr int kRows = 4;

template <class R, class T>
inline void sums_of_four(const T* q, const T* const* e, T* sums, int64_t dim) {
  const int64_t n = dim / R::kParts;
  Sum<T> s[kRows];
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    const auto x = R::template at<V>(q, i, n);
    for (int k = 0; k < kRows; ++k) s[k].add(R::term(x, R::template at<V>(e[k], i, n)));
  });
  for (int k = 0; k < kRows; ++k) sums[k] = s[k].total();
}

// g += Σ_k w_k·∂term(q, e_k)/∂q over the first kCount.
template <class R, int kCount = kRows, class T>
inline void add_gradients(T* g, const T* q, const T* const* e, const T* w, int64_t dim) {
  const int64_t n = dim / R::kParts;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    const auto x = R::template at<V>(q, i, n);
    auto sum = R::template at<V>(g, i, n);
    for (int k = 0; k < kCount; ++k) sum = sum + R::slopes(x, R::template at<V>(e[k], i, n), w[k]).query;
    R::store(g, i, n, sum);
  });
}

}  // namespace
}  // namespace dhns::kernels
