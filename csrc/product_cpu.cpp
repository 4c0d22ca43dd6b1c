// Products of matrices whose sums have one order, whatever the number of threads and wherever an element stands: equal rows come out equal.
#include "product_cpu.h"

#include <algorithm>

#include "vectors.h"

namespace dhns::kernels {
namespace {

// Rows of a product at a time: two running sums each, as many as registers allow beside the operands.
#if defined(__AVX512F__)
constexpr int kProducts = 12;
#else
constexpr int kProducts = 6;
#endif

// Terms summed in registers before they join the sum of those before them.
constexpr int64_t kChain = 128;

template <class T>
constexpr int64_t kWidth = 2 * kLanes<T>;  // of a panel

// Rows of W from `row`, at most kChain terms of them from `start`, into blocks of kProducts rows that lie close together: row after row, or
// (kByTerm) term after term. Rows beyond the last are the last's.
template <bool kByTerm, class T>
void pack_weight(const Product<T>& p, int64_t row, int64_t rows, int64_t start, int64_t terms, T* to) {
  for (int64_t i = 0; i < rows; i += kProducts, to += kProducts * kChain) {
    const int64_t count = std::min<int64_t>(kProducts, rows - i);
    if constexpr (!kByTerm) {
      for (int64_t r = 0; r < kProducts; ++r) {
        const int64_t at = row + i + std::min(r, count - 1);
        std::copy_n(p.weight + (p.ids ? p.ids[at] : at) * p.stride + start, terms, to + r * kChain);
      }
      continue;
    }
    const T* const from = p.weight + row + i + start * p.stride;
    if (count == kProducts) {
      for (int64_t k = 0; k < terms; ++k) std::copy_n(from + k * p.stride, kProducts, to + k * kProducts);
    } else {
      for (int64_t k = 0; k < terms; ++k)
        for (int64_t r = 0; r < kProducts; ++r) to[k * kProducts + r] = from[k * p.stride + std::min(r, count - 1)];
    }
  }
}

// kProducts rows of packed W by `terms` rows of a panel, beside what is there (kAdd) or the bias, to `rows` rows of out, `count` columns each.
template <bool kByTerm, bool kAdd, class T>
void add_products(const T* weight, const T* panel, int64_t terms, int64_t rows, int64_t count, const T* bias, T* out, int64_t dim) {
  using V = Vector<T>;
  constexpr int64_t kRow = kByTerm ? 1 : kChain, kTerm = kByTerm ? kProducts : 1;
  V sum[kProducts][2];
#pragma GCC unroll 12
  for (int r = 0; r < kProducts; ++r) sum[r][0] = sum[r][1] = V{};
  for (int64_t k = 0; k < terms; ++k) {
    const V x0 = load_as<V>(panel + k * kWidth<T>), x1 = load_as<V>(panel + k * kWidth<T> + kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < kProducts; ++r) {
      const T w = weight[r * kRow + k * kTerm];
      sum[r][0] += w * x0;
      sum[r][1] += w * x1;
    }
  }
  const auto put = [](T* to, V x) { std::memcpy(to, &x, sizeof x); };
  if (rows == kProducts && count == kWidth<T>) {
    const V b0 = bias ? load_as<V>(bias) : V{}, b1 = bias ? load_as<V>(bias + kLanes<T>) : V{};
#pragma GCC unroll 12
    for (int r = 0; r < kProducts; ++r) {
      T* const to = out + r * dim;
      put(to, (kAdd ? load_as<V>(to) : b0) + sum[r][0]);
      put(to + kLanes<T>, (kAdd ? load_as<V>(to + kLanes<T>) : b1) + sum[r][1]);
    }
  } else {
    T sums[kProducts][kWidth<T>];
#pragma GCC unroll 12
    for (int r = 0; r < kProducts; ++r) put(sums[r], sum[r][0]), put(sums[r] + kLanes<T>, sum[r][1]);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; ++j) out[r * dim + j] = (kAdd ? out[r * dim + j] : bias ? bias[j] : T(0)) + sums[r][j];
  }
}

// Adds Σ of each row of what is packed, chain by chain as the products do.
template <class T>
void add_sums(const T* weight, int64_t terms, int64_t rows, T* sums) {
  for (int64_t i = 0; i < rows; i += kProducts, weight += kProducts * kChain) {
    T total[kProducts] = {};
    for (int64_t k = 0; k < terms; ++k)
      for (int r = 0; r < kProducts; ++r) total[r] += weight[k * kProducts + r];
    for (int64_t r = 0; r < std::min<int64_t>(kProducts, rows - i); ++r) sums[i + r] += total[r];
  }
}

template <bool kByTerm, class T>
void add_panels(const Product<T>& p, int64_t row, int64_t end, int64_t first, int64_t last) {
  const int64_t rows = end - row;
  Buffer<T> weight((rows + kProducts - 1) / kProducts * kProducts * kChain);
  // The chain's part of W stays in the second-level cache for all panels, that of a panel in the first for all rows.
  for (int64_t start = 0; start < p.terms; start += kChain) {
    const int64_t terms = std::min(kChain, p.terms - start);
    pack_weight<kByTerm>(p, row, rows, start, terms, weight.data());
    if constexpr (kByTerm)
      if (p.sums && !first) add_sums(weight.data(), terms, rows, p.sums + row);
    const auto products = p.add || start ? &add_products<kByTerm, true, T> : &add_products<kByTerm, false, T>;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t column = panel * kWidth<T>;
      for (int64_t i = 0; i < rows; i += kProducts)
        products(
            weight.data() + i * kChain, p.panels + column * p.terms + start * kWidth<T>, terms, std::min<int64_t>(kProducts, rows - i),
            std::min<int64_t>(kWidth<T>, p.dim - column), p.bias ? p.bias + column : nullptr, p.out + (row + i) * p.dim + column, p.dim);
    }
  }
}

template <class T>
void pack(const Panels<T>& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* const from = a.table + (a.ids ? a.ids[row] : row) * a.dim;
    for (int64_t column = 0; column < a.dim; column += kWidth<T>) {
      const int64_t count = std::min<int64_t>(kWidth<T>, a.dim - column);
      T* const to = a.out + column * a.rows + row * kWidth<T>;
      std::copy_n(from + column, count, to);
      std::fill(to + count, to + kWidth<T>, T(0));
    }
  }
}

template <class T>
void add(const Product<T>& a, int64_t row, int64_t end, int64_t first, int64_t last) {
  (a.columns ? add_panels<true, T> : add_panels<false, T>)(a, row, end, first, last);
}

}  // namespace

int64_t panel_width(float) { return kWidth<float>; }
int64_t panel_width(double) { return kWidth<double>; }
void pack_panels(const Panels<float>& a, int64_t first, int64_t last) { pack(a, first, last); }
void pack_panels(const Panels<double>& a, int64_t first, int64_t last) { pack(a, first, last); }
void add_product(const Product<float>& a, int64_t row, int64_t end, int64_t first, int64_t last) { add(a, row, end, first, last); }
void add_product(const Product<double>& a, int64_t row, int64_t end, int64_t first, int64_t last) { add(a, row, end, first, last); }

}  // namespace dhns::kernels
