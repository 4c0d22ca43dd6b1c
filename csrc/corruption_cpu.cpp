// Self-adversarial loss of queries against corruptions by index, without the gathered [B, N, D], see dhns_fast/loss.py.
//
// Forward: the N rows of a query stay in the second-level cache between their scores and the gradient of the query, so that memory gives
// each once. Backward: row by row of the table, the queries that met it.
#include "corruption_cpu.h"

#include <algorithm>
#include <vector>

#include "pairs.h"

namespace dhns::DHNS_LEVEL {
namespace {

// Of one core's second-level cache, what a table may take of it.
constexpr int64_t kCached = 1 << 19;

// Calls body(rows, weights, count) with `row(k)` four at a time; the last call repeats a row with weight 0.
template <class T, class Row, class Weight, class Body>
inline void by_four(int64_t count, Row row, Weight weight, Body body) {
  for (int64_t k = 0; k < count; k += kRows) {
    const T* rows[kRows];
    T weights[kRows];
    for (int i = 0; i < kRows; ++i) {
      const bool inside = k + i < count;
      rows[i] = row(inside ? k + i : k);
      weights[i] = inside ? weight(k + i) : T(0);
    }
    body(k, rows, weights);
  }
}

template <class R, class T>
void loss_rows(const Corruptions<T>& a, int64_t first, int64_t last) {
  const int64_t n = a.columns;
  std::vector<T> score(n + kRows), inner(n + kRows), share(n);
  // Rows of a table that no second-level cache holds lie anywhere in it: those of the next query are asked for while this one's are scored.
  const int64_t row_bytes = a.dim * static_cast<int64_t>(sizeof(T));
  const bool ahead = a.rows * row_bytes > kCached;
  for (int64_t b = first; b < last; ++b) {
    const T* const q = a.query + b * a.dim;
    const int64_t* const ids = a.ids + b * n;
    T* const slope = a.slope + b * n;
    const auto row = [&](int64_t k) { return a.table + ids[k] * a.dim; };
    by_four<T>(n, row, [](int64_t) { return T(0); }, [&](int64_t k, const T* const* rows, const T*) {
      if (ahead && b + 1 < last)
        for (int64_t i = k; i < std::min(k + kRows, n); ++i) fetch_bytes<2>(a.table + ids[n + i] * a.dim, row_bytes);
      sums_of_four<R>(q, rows, &score[k], a.dim);
    });
    T largest = -INFINITY;
    for (int64_t k = 0; k < n; ++k) {
      score[k] = finite_or_nan(a.offset + R::finish(score[k], inner[k]));
      if (k) largest = std::max(largest, a.temperature * score[k]);
    }
    T total = 0, sum = 0, sigmoid;
    for (int64_t k = 1; k < n; ++k) total += share[k] = exponential(a.temperature * score[k] - largest);
    const T scale = T(0.5) / T(a.batch);
    sum = scale * softplus_sigmoid(-score[0], sigmoid);
    slope[0] = -scale * sigmoid * inner[0];
    for (int64_t k = 1; k < n; ++k) {
      const T weight = scale * share[k] / total;
      sum += weight * softplus_sigmoid(score[k], sigmoid);
      slope[k] = weight * sigmoid * inner[k];
    }
    a.partial[b] = sum;
    T* const g = a.grad_query + b * a.dim;
    std::fill(g, g + a.dim, T(0));
    by_four<T>(n, row, [&](int64_t k) { return slope[k]; }, [&](int64_t, const T* const* rows, const T* weights) {
      add_gradients<R>(g, q, rows, weights, a.dim);
    });
  }
}

template <class R, class T>
void table_rows(const TableGradient<T>& a, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; ++e) {
    const int64_t* const pairs = a.pairs + a.offsets[e];
    T* const g = a.grad_table + e * a.dim;
    std::fill(g, g + a.dim, T(0));
    by_four<T>(
        a.offsets[e + 1] - a.offsets[e], [&](int64_t k) { return a.query + pairs[k] / a.columns * a.dim; },
        [&](int64_t k) { return a.scale * a.slope[pairs[k]]; },
        [&](int64_t, const T* const* rows, const T* weights) { add_gradients<R>(g, a.table + e * a.dim, rows, weights, a.dim); });
  }
}

template <class T>
void loss_of(const Corruptions<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  with_reduction(a.reduction, [&](auto reduction) { loss_rows<typename decltype(reduction)::type>(a, first, last); });
}

template <class T>
void table_of(const TableGradient<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  with_reduction(a.reduction, [&](auto reduction) { table_rows<typename decltype(reduction)::type>(a, first, last); });
}

}  // namespace

void corruption_loss(const Corruptions<float>& a, int64_t first, int64_t last) { loss_of(a, first, last); }
void corruption_loss(const Corruptions<double>& a, int64_t first, int64_t last) { loss_of(a, first, last); }
void corruption_table_gradient(const TableGradient<float>& a, int64_t first, int64_t last) { table_of(a, first, last); }
void corruption_table_gradient(const TableGradient<double>& a, int64_t first, int64_t last) { table_of(a, first, last); }

}  // namespace dhns::DHNS_LEVEL
