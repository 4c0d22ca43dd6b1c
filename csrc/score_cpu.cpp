// Scores of queries against entities, a register block at a time, and the vector half of what is done with them.
//
//     dot Σ q·s·e    l2 −Σ (q − s·e)²    l1 −Σ |q − s·e|    complex_l1 −Σ √((Δre)² + (Δim)²)
//
// Entities lie across the lanes of a vector, so that no sum crosses lanes and the arithmetic of a pair does not depend on where it stands.
#include "score_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dhns::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#define DHNS_RSQRT(x) _mm512_rsqrt14_ps((__m512)(x))
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#define DHNS_RSQRT(x) _mm256_rsqrt_ps((__m256)(x))
#else
constexpr int kLanes = 4;
#endif
constexpr int kWidth = 2 * kLanes;  // of a panel

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V all(float x) { return x - V{}; }
inline V absolute(V x) { return (V)((I)x & 0x7fffffff); }

#if !defined(DHNS_RSQRT)
inline V root(V m) {
  V out{};
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = std::sqrt(m[lane]);
  return out;
}
#endif

// Adding −|d| by a multiplication with this keeps half of an L1 step off the adders (22 % faster on Zen 3, whose adders and multipliers
// are separate pipes); volatile, so that the compiler does not turn it back into a subtraction.
const volatile float kMinusOne = -1.0f;

// The smallest normal number, added under the root: 1/√0 would make 0·∞ of a modulus of 0, which becomes 1e-19 instead.
constexpr float kTiny = 1.17549435e-38f;

// −2√m for m ≥ kTiny. On x86 by an estimate of 1/√m (relative error 2⁻¹² at most) and one Newton step: relative error below 4e-7, at
// a third of the root instruction's time. The factor is taken out of the sum.
inline V twice_negated_root(V m) {
#if defined(DHNS_RSQRT)
  const V y = (V)DHNS_RSQRT(m), s = m * y;
  return s * (s * y - 3.0f);
#else
  return -2.0f * root(m);
#endif
}

// 1/√m for m ≥ kTiny, as accurate as the root.
inline V inverse_root(V m) {
#if defined(DHNS_RSQRT)
  const V y = (V)DHNS_RSQRT(m);
  return y * (1.5f - 0.5f * (m * y) * y);
#else
  return 1.0f / root(m);
#endif
}

template <bool kScaled>
inline V difference(float q, float s, V e) {
  return kScaled ? q - s * e : q - e;
}

// Steps summed in registers before they join the score: a sum of n terms is within (kChain + n/kChain + 3) units in the last place of
// Σ|terms|, not n of them.
constexpr int64_t kChain = 128;

template <int64_t kReduction, bool kScaled, int kQueries>
void score_panel(const float* const* query, const float* const* scale, const float* panel, int64_t dim, float* raw) {
  const V minus = all(kMinusOne);
  const int64_t half = dim / 2, steps = kReduction == kComplexL1 ? half : dim;
  for (int64_t start = 0; start < steps; start += kChain) {
    const int64_t end = steps - start < kChain ? steps : start + kChain;
    V sum[kQueries][2] = {};
    for (int64_t k = start; k < end; ++k) {
      const float* const p = panel + k * kWidth;
      const V e0 = load(p), e1 = load(p + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kQueries; ++r) {
        const float q = query[r][k], s = kScaled ? scale[r][k] : 1.0f;
        if constexpr (kReduction == kDot) {
          sum[r][0] += q * e0;
          sum[r][1] += q * e1;
        } else if constexpr (kReduction == kL2) {
          const V d0 = difference<kScaled>(q, s, e0), d1 = difference<kScaled>(q, s, e1);
          sum[r][0] -= d0 * d0;
          sum[r][1] -= d1 * d1;
        } else if constexpr (kReduction == kL1) {
          // With a scale, the difference is the multiplication.
          const V d0 = absolute(difference<kScaled>(q, s, e0)), d1 = absolute(difference<kScaled>(q, s, e1));
          sum[r][0] = kScaled ? sum[r][0] - d0 : sum[r][0] + d0 * minus;
          sum[r][1] = kScaled ? sum[r][1] - d1 : sum[r][1] + d1 * minus;
        } else {
          const float* const i = p + half * kWidth;
          const float qi = query[r][k + half], si = kScaled ? scale[r][k + half] : 1.0f;
          const V d0 = difference<kScaled>(q, s, e0), d1 = difference<kScaled>(q, s, e1);
          const V i0 = difference<kScaled>(qi, si, load(i)), i1 = difference<kScaled>(qi, si, load(i + kLanes));
          sum[r][0] += twice_negated_root(d0 * d0 + (i0 * i0 + kTiny));
          sum[r][1] += twice_negated_root(d1 * d1 + (i1 * i1 + kTiny));
        }
      }
    }
    constexpr float factor = kReduction == kComplexL1 ? 0.5f : 1.0f;
    for (int r = 0; r < kQueries; ++r)
      for (int j = 0; j < 2; ++j) {
        float* const at = raw + r * score::kColumns + j * kLanes;
        store(at, (start ? load(at) : V{}) + factor * sum[r][j]);
      }
  }
}

// −Σ of moduli whose squares a float cannot hold, which the vectors above leave infinite or undefined: pair by pair, in double.
void mend_moduli(const float* const* query, const float* const* scale, int64_t rows, const float* panels, int64_t dim, float* raw) {
  const int64_t half = dim / 2;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < score::kColumns; j += kLanes) {
      const V x = load(raw + row * score::kColumns + j), zero = x - x;
      int32_t all_finite = -1;
      const I finite = zero == 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) all_finite &= finite[lane];
      if (all_finite) continue;
      for (int64_t column = j; column < j + kLanes; ++column) {
        // What a float can hold stays as it is: a pair ties with its like, whatever lies beside it.
        if (finite[column - j]) continue;
        const float* const e = panels + column / kWidth * kWidth * dim + column % kWidth;
        double sum = 0;
        for (int64_t k = 0; k < half; ++k) {
          const double s = scale ? scale[row][k] : 1, t = scale ? scale[row][k + half] : 1;
          const double re = query[row][k] - s * e[k * kWidth], im = query[row][k + half] - t * e[(k + half) * kWidth];
          sum += std::isinf(re) || std::isinf(im) ? INFINITY : std::sqrt(re * re + im * im);
        }
        raw[row * score::kColumns + column] = static_cast<float>(-sum);
      }
    }
}

template <int64_t kReduction, bool kScaled>
void score_panels(const float* const* query, const float* const* scale, int64_t rows, const float* panels, int64_t dim, float* raw) {
  // As many running sums as registers allow beside the operands.
  constexpr int kQueries = !kScaled && (kReduction == kDot || kReduction == kL2) ? 6 : 4;
  for (int64_t column = 0; column < score::kColumns; column += kWidth)
    for (int64_t row = 0; row < rows; row += kQueries)
      score_panel<kReduction, kScaled, kQueries>(
          query + row, scale + (kScaled ? row : 0), panels + column * dim, dim, raw + row * score::kColumns + column);
  if constexpr (kReduction == kComplexL1) mend_moduli(query, kScaled ? scale : nullptr, rows, panels, dim, raw);
}

// exp(x) for x ≤ 0: 2^n·e^r with |r| ≤ ln2/2 and the polynomial of Cephes expf; 0 below −87, where float32 has no normal numbers.
inline V exponential(V x) {
  const I low = x < all(-87.0f);
  x = (V)((I)x & ~low);
  const I n = __builtin_convertvector(x * 1.44269504f - 0.5f, I);
  const V f = __builtin_convertvector(n, V), r = (x - f * 0.693359375f) + f * 2.12194440e-4f;
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return (V)((I)(y * (V)((n + 127) << 23)) & ~low);
}
// One part of the dimensions of a table: rows of kLanes floats (kParts of them, real and imaginary), zeros
// beyond the last dimension, and everywhere where there is no table.
template <int kParts>
struct Lanes {
  Lanes(const float* table, int64_t rows, int64_t dim, int64_t first) : values(rows * kParts * kLanes) {
    if (table) copy(rows, dim, first, [&](int64_t here, int64_t there, int64_t count) { std::copy_n(table + there, count, &values[here]); });
  }
  void add_to(float* table, int64_t rows, int64_t dim, int64_t first) const {
    copy(rows, dim, first, [&](int64_t here, int64_t there, int64_t count) {
      for (int64_t j = 0; j < count; ++j) table[there + j] += values[here + j];
    });
  }
  template <class Copy>
  static void copy(int64_t rows, int64_t dim, int64_t first, const Copy& each) {
    const int64_t part = dim / kParts, count = std::min<int64_t>(kLanes, part - first);
    for (int64_t row = 0; row < rows; ++row)
      for (int p = 0; p < kParts; ++p) each((row * kParts + p) * kLanes, row * dim + p * part + first, count);
  }
  std::vector<float> values;
};

struct Gradients {
  const float *query, *entity, *scale, *weight;
  int64_t entities;
  float *by_query, *by_entity, *by_scale;
};

// Queries `row` to `row + kQueries` against all entities of the tile, in kLanes dimensions.
template <int64_t kReduction, bool kScaled, int kQueries>
void gradient_rows(const Gradients& g, int64_t row) {
  constexpr int kParts = kReduction == kComplexL1 ? 2 : 1, kStride = kParts * kLanes;
  V q[kQueries][kParts], s[kQueries][kParts], by_q[kQueries][kParts] = {}, by_s[kQueries][kParts] = {};
  for (int r = 0; r < kQueries; ++r)
    for (int p = 0; p < kParts; ++p) {
      q[r][p] = load(g.query + (row + r) * kStride + p * kLanes);
      s[r][p] = kScaled ? load(g.scale + (row + r) * kStride + p * kLanes) : all(1.0f);
    }
  for (int64_t e = 0; e < g.entities; ++e) {
    V x[kParts], by_x[kParts];
    for (int p = 0; p < kParts; ++p) x[p] = load(g.entity + e * kStride + p * kLanes), by_x[p] = load(g.by_entity + e * kStride + p * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
      const float w = g.weight[(row + r) * g.entities + e];
      V d[kParts];
      for (int p = 0; p < kParts; ++p) d[p] = kScaled ? q[r][p] - s[r][p] * x[p] : q[r][p] - x[p];
      // What the score loses per unit of d, times the weight; 0 where the difference is 0 or undefined, as torch's sign.
      if constexpr (kReduction == kL1) {
        d[0] = (V)((((I)all(w)) ^ ((I)d[0] & (int32_t)0x80000000)) & ((d[0] > 0.0f) | (d[0] < 0.0f)));
      } else if constexpr (kReduction == kL2) {
        d[0] *= w;
      } else {
        const V factor = w * inverse_root(d[0] * d[0] + (d[1] * d[1] + kTiny));
        d[0] *= factor;
        d[1] *= factor;
      }
      for (int p = 0; p < kParts; ++p) {
        by_q[r][p] -= d[p];
        by_x[p] += kScaled ? s[r][p] * d[p] : d[p];
        if (kScaled) by_s[r][p] += x[p] * d[p];
      }
    }
    for (int p = 0; p < kParts; ++p) store(g.by_entity + e * kStride + p * kLanes, by_x[p]);
  }
  for (int r = 0; r < kQueries; ++r)
    for (int p = 0; p < kParts; ++p) {
      store(g.by_query + (row + r) * kStride + p * kLanes, by_q[r][p]);
      if (kScaled) store(g.by_scale + (row + r) * kStride + p * kLanes, by_s[r][p]);
    }
}

// NaN if there is one.
float largest(const std::vector<float>& values) {
  float out = 0;
  for (float x : values) out = !(std::abs(x) <= out) && out == out ? std::abs(x) : out;
  return out;
}

// gradient_part for moduli whose squares a float may not hold, in double.
template <bool kScaled>
void large_moduli(const score::Gradients& t, int64_t first) {
  const int64_t half = t.dim / 2, last = std::min<int64_t>(first + kLanes, half);
  for (int64_t q = 0; q < t.queries; ++q)
    for (int64_t e = 0; e < t.entities; ++e)
      for (int64_t k = first; k < last; ++k) {
        const int64_t at[2] = {k, k + half};
        double d[2];
        for (int p = 0; p < 2; ++p) {
          const double s = kScaled ? t.scale[q * t.dim + at[p]] : 1;
          d[p] = t.query[q * t.dim + at[p]] - s * t.entity[e * t.dim + at[p]];
        }
        const double length = std::sqrt(d[0] * d[0] + d[1] * d[1]), w = t.weight[q * t.entities + e];
        for (int p = 0; p < 2; ++p) {
          const double g = length == 0 ? 0 : w * (d[p] / length);
          t.by_query[q * t.dim + at[p]] -= static_cast<float>(g);
          t.by_entity[e * t.dim + at[p]] += static_cast<float>(kScaled ? g * t.scale[q * t.dim + at[p]] : g);
          if (kScaled) t.by_scale[q * t.dim + at[p]] += static_cast<float>(g * t.entity[e * t.dim + at[p]]);
        }
      }
}

template <int64_t kReduction, bool kScaled>
void gradient_part(const score::Gradients& t, int64_t first) {
  constexpr int kParts = kReduction == kComplexL1 ? 2 : 1, kQueries = kParts == 2 || kScaled ? 2 : 4;
  const Lanes<kParts> query(t.query, t.queries, t.dim, first), entity(t.entity, t.entities, t.dim, first);
  const Lanes<kParts> scale(t.scale, kScaled ? t.queries : 0, t.dim, first);
  Lanes<kParts> by_query(nullptr, t.queries, t.dim, first), by_entity(nullptr, t.entities, t.dim, first);
  Lanes<kParts> by_scale(nullptr, kScaled ? t.queries : 0, t.dim, first);
  if constexpr (kReduction == kComplexL1)
    if (!(largest(query.values) + largest(entity.values) * (kScaled ? largest(scale.values) : 1.0f) < 1e18f))
      return large_moduli<kScaled>(t, first);
  const Gradients g{
      query.values.data(), entity.values.data(), scale.values.data(), t.weight, t.entities,
      by_query.values.data(), by_entity.values.data(), by_scale.values.data()};
  int64_t row = 0;
  for (; row + kQueries <= t.queries; row += kQueries) gradient_rows<kReduction, kScaled, kQueries>(g, row);
  for (; row < t.queries; ++row) gradient_rows<kReduction, kScaled, 1>(g, row);
  by_query.add_to(t.by_query, t.queries, t.dim, first);
  by_entity.add_to(t.by_entity, t.entities, t.dim, first);
  if (kScaled) by_scale.add_to(t.by_scale, t.queries, t.dim, first);
}
}  // namespace

void pack_entities(const float* const* entities, int64_t dim, float* panels) {
  for (int64_t column = 0; column < score::kColumns; column += kWidth, panels += kWidth * dim)
    for (int64_t k = 0; k < dim; ++k)
      for (int64_t j = 0; j < kWidth; ++j) panels[k * kWidth + j] = entities[column + j][k];
}

void score_block(
    int64_t reduction, const float* const* query, const float* const* scale, int64_t rows, const float* panels, int64_t dim, float* raw) {
  using Kernel = void (*)(const float* const*, const float* const*, int64_t, const float*, int64_t, float*);
  using namespace score;
  static constexpr Kernel kernels[4][2] = {
      {score_panels<kDot, false>, nullptr},  // the caller has multiplied the scale into the query
      {score_panels<kL2, false>, score_panels<kL2, true>},
      {score_panels<kL1, false>, score_panels<kL1, true>},
      {score_panels<kComplexL1, false>, score_panels<kComplexL1, true>}};
  kernels[reduction][scale != nullptr](query, scale, rows, panels, dim, raw);
}

int64_t gradient_parts(int64_t reduction, int64_t dim) {
  const int64_t lanes = reduction == kComplexL1 ? 2 * kLanes : kLanes;
  return (dim + lanes - 1) / lanes;
}

void add_gradients(const score::Gradients& tile, int64_t part) {
  using Kernel = void (*)(const score::Gradients&, int64_t);
  using namespace score;
  static constexpr Kernel kernels[4][2] = {
      {nullptr, nullptr},
      {gradient_part<kL2, false>, gradient_part<kL2, true>},
      {gradient_part<kL1, false>, gradient_part<kL1, true>},
      {gradient_part<kComplexL1, false>, gradient_part<kComplexL1, true>}};
  kernels[tile.reduction][tile.scale != nullptr](tile, part * kLanes);
}

void count_row(const float* raw, float goal, int64_t* counts) {
  I greater{}, equal{}, undefined{};
  for (int64_t j = 0; j < score::kColumns; j += kLanes) {
    const V x = load(raw + j);
    // A comparison is −1 in every lane where it holds.
    greater -= x > goal;
    equal -= x == goal;
    undefined -= x != x;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    counts[0] += greater[lane];
    counts[1] += equal[lane];
    counts[2] += undefined[lane];
  }
}

float greatest(const float* scores) {
  V best = load(scores);
  for (int64_t j = kLanes; j < score::kColumns; j += kLanes) {
    const V x = load(scores + j);
    // Negated, so that a NaN on either side is kept.
    const I keep = ~(x > best) & (x == x);
    best = (V)(((I)best & keep) | ((I)x & ~keep));
  }
  float out = best[0];
  for (int lane = 1; lane < kLanes && out == out; ++lane)
    if (!(best[lane] <= out)) out = best[lane];
  return out;
}

bool any_above(const float* scores, float bound) {
  I above{};
  for (int64_t j = 0; j < score::kColumns; j += kLanes) above |= load(scores + j) > bound;
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= above[lane];
  return any != 0;
}

float sum_exp(const float* scores, float shift) {
  V sum{};
  for (int64_t j = 0; j < score::kColumns; j += kLanes) sum += exponential(load(scores + j) - shift);
  float out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += sum[lane];
  return out;
}

// factor·eˣ, or 0 for probabilities below 2⁻¹⁰⁰: no gradient of float32 has digits for them, and products with numbers that small fall below
// the normal range, where some processors are slow (one_vs_all of B 2663, E 15000, D 256 on Sapphire Rapids: 2.5 s with them, 0.39 without).
// NaN stays NaN.
inline V share(V x, float factor) {
  const V least = V{} - 69.3f;
  return (V)((I)(factor * exponential(x)) & ~(I)(x < least));
}

void softmax_row(const float* scores, int64_t count, float shift, float factor, float* out) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(out + j, share(load(scores + j) - shift, factor));
  if (j < count) {
    V rest{};
    std::memcpy(&rest, scores + j, (count - j) * sizeof(float));
    rest = share(rest - shift, factor);
    std::memcpy(out + j, &rest, (count - j) * sizeof(float));
  }
}

void finish_row(int64_t reduction, float* raw, int64_t count) {
  if (reduction == kL2)
    for (int64_t j = 0; j < count; ++j) raw[j] = -std::sqrt(-raw[j]);
}
}  // namespace dhns::kernels
