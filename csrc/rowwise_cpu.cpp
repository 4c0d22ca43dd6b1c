// Row-wise optimisers over the rows that a step touches, see dhns_fast/ops/rowwise.py.
//
// Rows lie anywhere in a table larger than every cache: what a row needs of table and states is asked for some rows ahead of its turn, and each
// is read and written once. The gradients of a row are added in their order into a buffer that stays in the first-level cache; what pairs of a
// query and a row give is computed there, and never written anywhere else.
#include "rowwise_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "philox.h"
#include "row_rules.h"

namespace dhns::kernels {
namespace {

inline float wide(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline float wide(float x) { return x; }
inline double wide(double x) { return x; }

// x rounded to bfloat16, up with the probability of what is cut off: `noise` is uniform in 0 .. 2¹⁶ − 1. Infinities stay; so does NaN, whose
// bits a carry would turn into a number.
inline uint16_t stochastic(float x, uint32_t noise) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>((nan ? word | 0x400000u : word + noise) >> 16);
}

// Column c of a row has 16 bits of the counter c / 8: word c % 8 / 2, the lower half first.
inline void put(uint16_t* to, const float* from, int64_t dim, uint64_t seed, uint64_t row, uint32_t number) {
  uint32_t words[4][kChunk];
  uint16_t noise[8 * kChunk];
  for (int64_t column = 0; column < dim; column += 8 * kChunk) {
    const int64_t wanted = std::min<int64_t>(dim - column, 8 * kChunk);
    const int groups = static_cast<int>((wanted + 8 * kGroup - 1) / (8 * kGroup));
    philox_chunk(words, groups, seed, static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), number);
    for (int64_t i = 0; 8 * i < wanted; ++i)
      for (int k = 0; k < 4; ++k) {
        noise[8 * i + 2 * k] = static_cast<uint16_t>(words[k][i]);
        noise[8 * i + 2 * k + 1] = static_cast<uint16_t>(words[k][i] >> 16);
      }
    for (int64_t i = 0; i < wanted; ++i) to[column + i] = stochastic(from[column + i], noise[i]);
  }
}
template <class T>
inline void put(T* to, const T* from, int64_t dim, uint64_t, uint64_t, uint32_t) {
  if (to != from) std::copy(from, from + dim, to);
}

template <class R, class S, class T>
void update_rows(const RowUpdate<S, T>& a, int64_t first, int64_t last) {
  constexpr bool narrow = sizeof(S) < sizeof(T);
  const int64_t D = a.dim, wide_bytes = D * static_cast<int64_t>(sizeof(T));
  std::vector<T> sum(D), values(narrow ? D : 0);
  const auto ask = [&](int64_t j) {
    const int64_t row = a.rows[j];
    fetch_bytes(a.table + row * D, D * static_cast<int64_t>(sizeof(S)));
    fetch_state(a.rule, a.first, a.second, row, D);
    // Queries too: those of a batch would fit in the second-level cache, but for the rows that pass through it.
    fetch_bytes(a.vectors[a.offsets[j]], wide_bytes);
  };
  for (int64_t j = first; j < std::min(first + kAhead, last); ++j) ask(j);
  for (int64_t j = first; j < last; ++j) {
    if (j + kAhead < last) ask(j + kAhead);
    const int64_t row = a.rows[j], begin = a.offsets[j];
    S* const place = a.table + row * D;
    T* x;
    if constexpr (narrow) {
      x = values.data();
      for (int64_t i = 0; i < D; ++i) x[i] = wide(place[i]);
    } else {
      x = place;
    }
    const Given<T> given{a.vectors + begin, a.weights + begin, a.pairs[j], a.offsets[j + 1] - begin};
    move_row<R>(a.rule, x, a.rule.state(a.first, row, D), a.rule.state(a.second, row, D), given, D, sum.data());
    put(place, x, D, a.seed, a.row_offset + static_cast<uint64_t>(row), a.number);
  }
}

template <class S, class T>
void update_by(const RowUpdate<S, T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  with_reduction(a.reduction, [&](auto reduction) { update_rows<typename decltype(reduction)::type>(a, first, last); });
}

template <class S, class T>
void gather_rows(const RowGather<S, T>& a, int64_t first, int64_t last) {
  const int64_t D = a.dim;
  for (int64_t j = first; j < last; ++j) {
    if (j + kAhead < last) fetch_bytes(a.table + a.rows[j + kAhead] * D, D * static_cast<int64_t>(sizeof(S)));
    const S* const from = a.table + a.rows[j] * D;
    T* const to = a.out + j * D;
    for (int64_t i = 0; i < D; ++i) to[i] = wide(from[i]);
  }
}

}  // namespace

void row_update(const RowUpdate<float, float>& a, int64_t first, int64_t last) { update_by(a, first, last); }
void row_update(const RowUpdate<double, double>& a, int64_t first, int64_t last) { update_by(a, first, last); }
void row_update(const RowUpdate<uint16_t, float>& a, int64_t first, int64_t last) { update_by(a, first, last); }
void row_gather(const RowGather<float, float>& a, int64_t first, int64_t last) { gather_rows(a, first, last); }
void row_gather(const RowGather<double, double>& a, int64_t first, int64_t last) { gather_rows(a, first, last); }
void row_gather(const RowGather<uint16_t, float>& a, int64_t first, int64_t last) { gather_rows(a, first, last); }

}  // namespace dhns::kernels
