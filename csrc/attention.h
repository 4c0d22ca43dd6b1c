// Modalities of one entity brought together by attention, and the way back; for losses on embeddings and for fusion itself.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace dhns::kernels {
namespace {

// Fetches the cache lines of x[i], x[i + 1], ... that lies `ahead` elements from what is being read: rows are a page long, shorter than
// what the processor's own prefetcher needs to see a pattern. Into the second-level cache: a level of a row is as large as the first.
template <class T>
inline void fetch(const T* x, int64_t ahead) {
  fetch_line<2>(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(x) + ahead * static_cast<int64_t>(sizeof(T))));
}

// out[k] = ⟨x, rows[k]⟩, all in one pass.
template <int K, class T>
inline void dots(const T* x, const T* const* rows, T* out, int64_t n) {
  // Two sums each hide the latency of the addition.
  Sum<T> low[K], high[K];
  const int64_t half = n / 2;
  each<T>(half, [&](int64_t i, auto v) {
    using V = decltype(v);
    const V a = load_as<V>(x + i), b = load_as<V>(x + half + i);
    for (int k = 0; k < K; ++k) low[k].add(a * load_as<V>(rows[k] + i)), high[k].add(b * load_as<V>(rows[k] + half + i));
  });
  for (int k = 0; k < K; ++k) out[k] = low[k].total() + high[k].total() + (n % 2 ? x[n - 1] * rows[k][n - 1] : T(0));
}

template <class T>
inline void dots(const T* x, const std::vector<const T*>& rows, T* out, int64_t n) {
  size_t k = 0;
  for (; k + 3 <= rows.size(); k += 3) dots<3>(x, &rows[k], out + k, n);
  for (; k < rows.size(); ++k) dots<1>(x, &rows[k], out + k, n);
}

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  T out;
  dots<1>(a, &b, &out, n);
  return out;
}

// out = Σ_k c_k·row_k, added to what is there where kAdd.
template <bool kAdd, class T>
inline void combine(T* out, const std::vector<const T*>& rows, const std::vector<T>& c, int64_t n) {
  constexpr int64_t strip = 4 * kLanes<T>;  // as much as stays in registers
  int64_t i = 0;
  for (; i + strip <= n; i += strip) {
    Vector<T> sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = kAdd ? load_as<Vector<T>>(out + i + j * kLanes<T>) : Vector<T>{};
    for (size_t k = 0; k < rows.size(); ++k)
      for (int j = 0; j < 4; ++j) sum[j] += c[k] * load_as<Vector<T>>(rows[k] + i + j * kLanes<T>);
    for (int j = 0; j < 4; ++j) std::memcpy(out + i + j * kLanes<T>, &sum[j], sizeof sum[j]);
  }
  for (; i < n; ++i) {
    T sum = kAdd ? out[i] : T(0);
    for (size_t k = 0; k < rows.size(); ++k) sum += c[k] * rows[k][i];
    out[i] = sum;
  }
}

// One entity's modalities e_m [D] brought together: Σ_m a_m·e_m with a = softmax_m(w·tanh(e_m)).
template <class T>
class Fusion {
 public:
  Fusion(int64_t modalities, int64_t dim)
      : modalities_(modalities), dim_(dim), tanh_(modalities * dim), joint_(dim), gradient_(dim), share_(modalities), e_(modalities) {}

  T* joint() { return joint_.data(); }
  T* gradient() { return gradient_.data(); }

  // e(m): where a modality begins. `ahead`: from an element of it to the one that the next call will read, which is fetched.
  template <class E>
  void forward(E e, const bool* present, int64_t present_stride, const T* attention, int64_t ahead) {
    T largest = -INFINITY;
    for (int64_t m = 0; m < modalities_; ++m) {
      share_[m] = -INFINITY;
      if (present && !present[m * present_stride]) continue;
      const T* const x = e_[m] = e(m);
      T* const th = &tanh_[m * dim_];
      Sum<T> sum;
      const auto body = [&](int64_t i, auto v) DHNS_ALWAYS_INLINE {
        using V = decltype(v);
        const V y = hyperbolic_tangent(load_as<V>(x + i));
        std::memcpy(th + i, &y, sizeof y);
        sum.add(load_as<V>(attention + i) * y);
      };
      each<T>(dim_, body, [&](int64_t i) { fetch(x + i, ahead); });
      const T logit = share_[m] = sum.total();
      largest = logit > largest || logit != logit ? logit : largest;
    }
    T total = 0;
    for (T& share : share_) total += share = share == -INFINITY ? T(0) : exponential(share - largest);
    for (T& share : share_)
      if (share != 0) share /= total;
    rows_.clear(), factors_.clear();
    for (int64_t m = 0; m < modalities_; ++m)
      if (share_[m] != 0) rows_.push_back(e_[m]), factors_.push_back(share_[m]);
    combine<false>(joint_.data(), rows_, factors_, dim_);
  }

  // From the gradient of the joint embedding: that of the attention, added to grad_attention, and those of the modalities, written to
  // grad_e(m) where that is not null, past the caches or not.
  template <class E>
  void backward(const T* attention, T* grad_attention, E grad_e, bool past) {
    const T* const g = gradient_.data();
    rows_.clear();
    for (int64_t m = 0; m < modalities_; ++m)
      if (share_[m] != 0) rows_.push_back(e_[m]);
    slope_.resize(rows_.size());
    dots(g, rows_, slope_.data(), dim_);
    T mean = 0;
    size_t k = 0;
    for (const T share : share_)
      if (share != 0) mean += share * slope_[k++];
    rows_.clear(), factors_.clear(), k = 0;
    for (int64_t m = 0; m < modalities_; ++m)
      if (share_[m] != 0) rows_.push_back(&tanh_[m * dim_]), factors_.push_back(share_[m] * (slope_[k++] - mean));
    combine<true>(grad_attention, rows_, factors_, dim_);
    k = 0;
    for (int64_t m = 0; m < modalities_; ++m) {
      T* const out = grad_e(m);
      if (!out) continue;
      if (share_[m] == 0) {
        std::fill(out, out + dim_, T(0));
        continue;
      }
      const T share = share_[m], slope = factors_[k++];
      const T* const th = &tanh_[m * dim_];
      write(out, dim_, past, [&](int64_t i, auto v) {
        using V = decltype(v);
        const V t = load_as<V>(th + i);
        return share * load_as<V>(g + i) + slope * load_as<V>(attention + i) * (T(1) - t * t);
      });
    }
  }

 private:
  int64_t modalities_, dim_;
  Buffer<T> tanh_, joint_, gradient_;
  std::vector<T> share_, slope_, factors_;
  std::vector<const T*> e_, rows_;  // rows_, with factors_: scratch of combine()
};

}  // namespace
}  // namespace dhns::kernels
