// Self-adversarial loss of queries against corruptions by index, without the gathered [B, N, D], see dhns_fast/loss.py.
//
// Forward: the N rows of a query stay in the second-level cache between their scores and the gradient of the query, so that memory gives
// each once. Backward: row by row of the table, the queries that met it. Where an optimiser's step is known to follow, it is taken as soon as
// the last query to meet a row has read it: the row is in the cache then, and would have to come from memory again.
#include "corruption_cpu.h"

#include <algorithm>
#include <vector>

#include "row_rules.h"

namespace dhns::kernels {
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

// Goes over the rows of a query once for scores and once for its gradient, and then calls done(b, ahead). Of the rows of the next query one in
// kShare is asked for in either, and done() asks for the others by telling ahead(i) that it has come to row i.
template <class R, int kShare, class T, class Done>
void loss_rows(const Corruptions<T>& a, int64_t first, int64_t last, Done done) {
  const int64_t n = a.columns;
  std::vector<T> score(n + kRows), inner(n + kRows), share(n);
  // Rows of a table that no second-level cache holds lie anywhere in it: those of the next query are asked for all the while that this one's are
  // at hand, as no more than some ten lines can be on their way, and in proportion to the time that each part takes.
  const int64_t row_bytes = a.dim * static_cast<int64_t>(sizeof(T));
  const bool far = a.rows * row_bytes > kCached;
  for (int64_t b = first; b < last; ++b) {
    const T* const q = a.query + b * a.dim;
    const int64_t* const ids = a.ids + b * n;
    T* const slope = a.slope + b * n;
    const int64_t wanted = far && b + 1 < last ? n : 0;
    int64_t asked = 0;
    const auto ahead = [&](int64_t rows) {
      for (; asked < std::min(rows, wanted); ++asked) fetch_bytes<2>(a.table + ids[n + asked] * a.dim, row_bytes);
    };
    const auto row = [&](int64_t k) { return a.table + ids[k] * a.dim; };
    by_four<T>(n, row, [](int64_t) { return T(0); }, [&](int64_t k, const T* const* rows, const T*) {
      ahead((k + kRows) / kShare);
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
    by_four<T>(n, row, [&](int64_t k) { return slope[k]; }, [&](int64_t k, const T* const* rows, const T* weights) {
      ahead((n + k + kRows) / kShare);
      add_gradients<R>(g, q, rows, weights, a.dim);
    });
    done(b, [&](int64_t k) { ahead((2 * n + (kShare - 2) * k) / kShare); });
    ahead(n);
  }
}

// Of numbers that nearly always fit in 32 bits, whose division takes half as long on processors before Ice Lake.
inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

template <class R, class T>
void step_part(const CorruptionStep<T>& a, int64_t first, int64_t last) {
  const Corruptions<T>& loss = a.loss;
  const int64_t n = loss.columns, D = loss.dim;
  std::vector<T> sum(D), weights;
  std::vector<const T*> vectors;
  loss_rows<R, 8>(loss, first, last, [&](int64_t b, auto ahead) {
    const int64_t end = (b + 1) * n;
    const auto ask = [&](int64_t place) {
      if (place < end && a.link[place] & 1) fetch_state(a.rule, a.first, a.second, loss.ids[place], D);
    };
    for (int64_t place = b * n; place < b * n + kAhead; ++place) ask(place);
    for (int64_t place = b * n; place < end; ++place) {
      ask(place + kAhead);
      ahead(place - b * n + 1);
      int64_t link = a.link[place];
      if (!(link & 1)) continue;
      const T* const q = loss.query + b * D;
      const int64_t row = loss.ids[place];
      Given<T> given{&q, &loss.slope[place], 1, 1};
      if (link > 1) {
        vectors.assign(1, q);
        weights.assign(1, loss.slope[place]);
        while (link >>= 1) {
          vectors.push_back(loss.query + quotient(link - 1, n) * D);
          weights.push_back(loss.slope[link - 1]);
          link = a.link[link - 1];
        }
        // Sums are in the order of the batch.
        std::reverse(vectors.begin(), vectors.end());
        std::reverse(weights.begin(), weights.end());
        const auto count = static_cast<int64_t>(weights.size());
        given = {vectors.data(), weights.data(), count, count};
      }
      move_row<R>(a.rule, a.table + row * D, a.rule.state(a.first, row, D), a.rule.state(a.second, row, D), given, D, sum.data());
    }
  });
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
  with_reduction(a.reduction, [&](auto reduction) {
    loss_rows<typename decltype(reduction)::type, 2>(a, first, last, [](int64_t, auto) {});
  });
}

template <class T>
void step_of(const CorruptionStep<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  with_reduction(a.loss.reduction, [&](auto reduction) {
    const int64_t share = a.share / a.loss.columns;
    for (int64_t part = first; part < last; ++part)
      step_part<typename decltype(reduction)::type>(a, part * share, std::min((part + 1) * share, a.loss.batch));
  });
}

template <class T>
void table_of(const TableGradient<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  with_reduction(a.reduction, [&](auto reduction) { table_rows<typename decltype(reduction)::type>(a, first, last); });
}

}  // namespace

void corruption_loss(const Corruptions<float>& a, int64_t first, int64_t last) { loss_of(a, first, last); }
void corruption_loss(const Corruptions<double>& a, int64_t first, int64_t last) { loss_of(a, first, last); }
void corruption_step(const CorruptionStep<float>& a, int64_t first, int64_t last) { step_of(a, first, last); }
void corruption_step(const CorruptionStep<double>& a, int64_t first, int64_t last) { step_of(a, first, last); }
void corruption_table_gradient(const TableGradient<float>& a, int64_t first, int64_t last) { table_of(a, first, last); }
void corruption_table_gradient(const TableGradient<double>& a, int64_t first, int64_t last) { table_of(a, first, last); }

}  // namespace dhns::kernels
