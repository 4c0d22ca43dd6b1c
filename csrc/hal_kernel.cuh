// The losses on the GPU. hal_embeddings: a block takes a few rows, one after the other; see hal_cpu.cpp for the same computation in words and
// dhns_fast/loss.py for the formula. Sums go through fixed trees: the result is the same each time.
//
// A thread has 16 bytes of every vector of a row (of complex numbers 16 of each half) all the way through, so that threads meet for sums alone: of the logits of all levels and modalities at once, of all scores, of all slopes. Each of these rounds is one barrier; normalisation adds
// one or two of its own. The row's vectors are on their way to shared memory before the first is used, as many of them as fit, and those of the next
// row follow each into its place as soon as it has been used for the last time; what does not fit is read again, from the cache.
//
// Bytes of a row: 2·L·M·D of generated vectors, three of real ones and three gradients, each once.
//
// The code needs threads, barriers, sums over a warp and copies, and so runs as ordinary threads in a test where there is no GPU.
#pragma once

#include <cstdint>

#include "hal_cpu.h"
#include "interactions.h"

// On the GPU alone, unlike DHNS_FN: the barrier has no host form, and nvcc refuses it in a function that the host could call.
#if defined(__CUDACC__)
#define DHNS_ROW_FN __device__ __forceinline__
#define DHNS_ROW_UNROLL _Pragma("unroll")
#define DHNS_ROW_LOOP _Pragma("unroll 1")
#else
#define DHNS_ROW_FN inline
#define DHNS_ROW_UNROLL
#define DHNS_ROW_LOOP
#endif

namespace dhns::kernels {

// Numbers of a vector that a thread has, of complex ones in each half.
template <class T>
constexpr int kUnit = 16 / sizeof(T);

// Threads that a row of `dim` numbers takes.
template <class T>
inline int64_t hal_threads(int64_t dim, int64_t parts) {
  return (dim / parts + kUnit<T> - 1) / kUnit<T>;
}

// What a block has in shared memory beside vectors, in numbers: sums of each warp, two turns of them, and each warp's own copy of what is made of the
// sums. dhns_fast/ops/hal.py has the same.
struct HalTables {
  int64_t shares, factors, scores, sums;  // shares and their slopes; factors and what goes along; coefficients; the longest of them

  DHNS_FN HalTables(int64_t levels, int64_t modalities, bool attention, bool normalize) {
    const int64_t pairs = attention ? 1 : modalities;
    shares = attention ? 2 * modalities * (1 + levels) : 0;
    factors = normalize ? 3 + 2 * levels * pairs : 0;
    scores = 1 + 3 * levels * pairs;
    sums = shares > scores ? shares : scores;
    sums = factors > sums ? factors : sums;
  }
  DHNS_FN int64_t numbers(int64_t warps) const { return warps * (2 * shares + 2 * factors + scores + 2 * sums); }
};

// Vectors that a row reads.
template <class S, class T>
inline int64_t hal_vectors(const HalEmbeddings<S, T>& a) {
  return 2 * a.modalities * (a.levels + (a.attention ? 1 : 0));
}

namespace {

// Sums over a warp of up to four values, to[0], to[1], ...: at each of the first two steps a lane keeps half of the values and gives the others away,
// so that four take six exchanges and not twenty.
template <class T, int K>
DHNS_ROW_FN void warp_sums(const Threads& threads, T (&values)[K], T* to) {
  static_assert(K <= 4);
  constexpr int kHalves = K > 2 ? 2 : K - 1;
  T x[1 << kHalves] = {};
  DHNS_ROW_UNROLL
  for (int k = 0; k < K; ++k) x[k] = values[k];
  int step = Threads::lanes() / 2;
  DHNS_ROW_UNROLL
  for (int n = 1 << kHalves >> 1; n; n /= 2, step /= 2) {
    const bool upper = threads.lane() & step;
    DHNS_ROW_UNROLL
    for (int k = 0; k < n; ++k) {
      const T kept = upper ? x[k + n] : x[k], given = upper ? x[k] : x[k + n];
      x[k] = kept + threads.exchange(given, step);
    }
  }
  DHNS_ROW_UNROLL
  for (; step; step /= 2) x[0] += threads.exchange(x[0], step);
  constexpr int kGroup = Threads::lanes() >> kHalves;
  const int k = threads.lane() / kGroup;
  if (threads.lane() % kGroup == 0 && k < K) to[k] = x[0];
}
template <class T>
DHNS_ROW_FN T warp_sum(const Threads& threads, T x) {
  for (int step = Threads::lanes() / 2; step; step /= 2) x += threads.exchange(x, step);
  return x;
}
template <class T>
DHNS_ROW_FN T warp_max(const Threads& threads, T x) {
  for (int step = Threads::lanes() / 2; step; step /= 2) {
    const T other = threads.exchange(x, step);
    x = other > x ? other : x;
  }
  return x;
}

// I: interaction, S: type in memory, T: of the arithmetic; kFused: with attention.
template <class I, class S, class T, bool kFused>
class Row {
  static constexpr int kParts = I::kParts, kWide = kUnit<T>;

  // A thread's part of a vector.
  struct Unit {
    T at[kParts][kWide];
  };
  struct alignas(kWide * sizeof(S)) Packed {
    S at[kWide];
  };
  struct alignas(16) Wide {
    T at[kWide];
  };
  // Where a thread finds its part of a vector, in shared or in global memory, and how far the halves are apart.
  struct Place {
    const S* at;
    int apart;
  };

 public:
  // shared: the tables, then `a.kept` vectors.
  DHNS_ROW_FN Row(const HalEmbeddings<S, T>& a, unsigned char* shared, Threads threads)
      : a_(a), threads_(threads), tables_(a.levels, a.modalities, kFused, a.normalize) {
    const int own = int(2 * (tables_.shares + tables_.factors) + tables_.scores);
    sums_ = reinterpret_cast<T*>(shared), share_ = sums_ + 2 * threads.warps() * tables_.sums + threads.warp() * own;
    slope_ = share_ + tables_.shares, factor_ = slope_ + tables_.shares, along_ = factor_ + tables_.factors, coefficient_ = along_ + tables_.factors;
    const int64_t bytes = tables_.numbers(threads.warps()) * int64_t(sizeof(T));
    kept_ = reinterpret_cast<S*>(shared + (bytes + 15) / 16 * 16) + threads.rank() * kWide;
    n_ = int(a.dim) / kParts, at_ = threads.rank() * kWide, inside_ = at_ < n_;
    levels_ = int(a.levels), modalities_ = int(a.modalities), pairs_ = kFused ? 1 : modalities_, kept_count_ = int(a.kept);
    int active = 0;
    for (int i = 0; i < levels_; ++i)
      if (a.weight[i] > 0) ++active, weight_ += a.weight[i];
    scale_ = active ? a.mu / (6 * T(active) * T(a.batch)) : T(0);
  }

  DHNS_ROW_FN void block(int64_t index) {
    partial_ = a_.partial + index * a_.columns;
    if (threads_.warp() == 0)
      for (int i = threads_.lane(); i < levels_; i += threads_.lanes()) partial_[1 + i] = 0;
    const int64_t end = index * a_.rows + a_.rows < a_.batch ? index * a_.rows + a_.rows : a_.batch;
    if constexpr (kFused) by_attention_ = {}, w_ = load({a_.attention + at_, n_});
    // The first turn has no row before it, and only sends for the first row's vectors.
    b_ = index * a_.rows - 1, more_ = b_ + 1 < end;
    if (more_) vectors([&](int v, int level, int m, int side) { fetch(v, level, m, side); });
    DHNS_ROW_LOOP
    while (more_) {
      threads_.wait();
      ++b_, more_ = b_ + 1 < end;
      row();
    }
    if constexpr (kFused) {
      each([&](int p, int j) {
        if (inside_) partial_[1 + levels_ + p * n_ + at_ + j] = by_attention_.at[p][j];
      });
    }
    loss_ = warp_sum(threads_, loss_);
    if (threads_.rank() == 0) partial_[0] = loss_;
  }

 private:
  // f(place among the row's, level, modality, 0 for heads and 1 for tails) of every vector; when fused level −1 has the real ones.
  template <class F>
  DHNS_ROW_FN void vectors(F f) const {
    int v = 0;
    DHNS_ROW_LOOP
    for (int level = kFused ? -1 : 0; level < levels_; ++level) {
      if (level >= 0 && !(a_.weight[level] > 0)) continue;
      DHNS_ROW_LOOP
      for (int i = 0; i < 2 * modalities_; ++i) f(v++, level, i >> 1, i & 1);
    }
  }
  // f(place of its first vector, level, pair) of what is scored together.
  template <class F>
  DHNS_ROW_FN void pairs(F f) const {
    int v = kFused ? 2 * modalities_ : 0;
    DHNS_ROW_LOOP
    for (int level = 0; level < levels_; ++level) {
      if (!(a_.weight[level] > 0)) continue;
      DHNS_ROW_LOOP
      for (int p = 0; p < pairs_; ++p) {
        f(v, level, p);
        v += kFused ? 2 * modalities_ : 2;
      }
    }
  }
  // Of the tables: shares and slopes of a level (−1: of the real vectors), norms of a pair.
  DHNS_ROW_FN int share_of(int level, int m, int side) const { return 2 * ((level + 1) * modalities_ + m) + side; }
  DHNS_ROW_FN int factor_of(int level, int p, int side) const { return 3 + 2 * (level * pairs_ + p) + side; }

  DHNS_ROW_FN const S* address(int level, int m, int side, int64_t b) const {
    if (level < 0) return (side ? a_.tail : a_.head) + (m * a_.batch + b) * a_.dim + at_;
    return (side ? a_.neg_tail : a_.neg_head) + ((int64_t(level) * modalities_ + m) * a_.batch + b) * a_.dim + at_;
  }
  DHNS_ROW_FN S* slot(int v) const { return kept_ + v * kParts * threads_.count() * kWide; }

  // The next row's vector on its way to where this row has its own.
  DHNS_ROW_FN void fetch(int v, int level, int m, int side) const {
    if (v >= kept_count_ || !inside_ || !more_) return;
    const S* const from = address(level, m, side, b_ + 1);
    DHNS_ROW_UNROLL
    for (int p = 0; p < kParts; ++p) threads_.template copy<kWide * sizeof(S)>(slot(v) + p * threads_.count() * kWide, from + p * n_);
  }

  DHNS_ROW_FN Place place(int v, int level, int m, int side) const {
    if (v < kept_count_) return {slot(v), threads_.count() * kWide};
    return {address(level, m, side, b_), n_};
  }
  // 0 for threads past the end.
  DHNS_ROW_FN Unit load(Place place) const {
    Unit x = {};
    if (inside_) {
      DHNS_ROW_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const Packed packed = *reinterpret_cast<const Packed*>(place.at + p * place.apart);
        DHNS_ROW_UNROLL
        for (int j = 0; j < kWide; ++j) x.at[p][j] = T(packed.at[j]);
      }
    }
    return x;
  }
  DHNS_ROW_FN Unit take(int v, int level, int m, int side) const { return load(place(v, level, m, side)); }
  DHNS_ROW_FN void store(T* row, const Unit& x) const {
    if (!inside_) return;
    DHNS_ROW_UNROLL
    for (int p = 0; p < kParts; ++p) {
      Wide wide;
      DHNS_ROW_UNROLL
      for (int j = 0; j < kWide; ++j) wide.at[j] = x.at[p][j];
      *reinterpret_cast<Wide*>(row + p * n_ + at_) = wide;
    }
  }

  // f(half, place) of all numbers of a unit.
  template <class F>
  static DHNS_ROW_FN void each(F f) {
    DHNS_ROW_UNROLL
    for (int p = 0; p < kParts; ++p) {
      DHNS_ROW_UNROLL
      for (int j = 0; j < kWide; ++j) f(p, j);
    }
  }
  static DHNS_ROW_FN T dot(const Unit& x, const Unit& y) {
    T sum = 0;
    each([&](int p, int j) { sum += x.at[p][j] * y.at[p][j]; });
    return sum;
  }
  static DHNS_ROW_FN auto element(const Unit& x, int j) {
    if constexpr (kParts == 2)
      return Complex<T>{x.at[0][j], x.at[1][j]};
    else
      return x.at[0][j];
  }
  static DHNS_ROW_FN void set(Unit& x, int j, T value) { x.at[0][j] = value; }
  static DHNS_ROW_FN void set(Unit& x, int j, Complex<T> value) { x.at[0][j] = value.re, x.at[1][j] = value.im; }
  static DHNS_ROW_FN void add(Unit& x, int j, T value) { x.at[0][j] += value; }
  static DHNS_ROW_FN void add(Unit& x, int j, Complex<T> value) { x.at[0][j] += value.re, x.at[1][j] += value.im; }

  // Warps' sums of some values, as numbers `at`, at + 1, ... of this round.
  template <int K>
  DHNS_ROW_FN void put(int at, T (&values)[K]) const {
    warp_sums(threads_, values, sums_ + (turn_ * threads_.warps() + threads_.warp()) * tables_.sums + at);
  }
  // Ends a round: the sums over the block, to this warp's own table. What one round has put is read before the next has ended, and only the one after
  // that puts into the same place.
  DHNS_ROW_FN void gather(T* table, int count) {
    threads_.barrier();
    const T* const from = sums_ + turn_ * threads_.warps() * tables_.sums;
    DHNS_ROW_LOOP
    for (int i = threads_.lane(); i < count; i += threads_.lanes()) {
      T sum = 0;
      DHNS_ROW_LOOP
      for (int w = 0; w < threads_.warps(); ++w) sum += from[w * tables_.sums + i];
      table[i] = sum;
    }
    turn_ ^= 1;
    threads_.warp_barrier();
  }

  static DHNS_ROW_FN T inverse_norm(T square) {
    const T norm = std::sqrt(square);
    return 1 / (norm > T(1e-12) ? norm : T(1e-12));
  }

  // A pair's head or tail: one vector, or the modalities fused.
  DHNS_ROW_FN Unit raw(int v, int level, int p, int side) const {
    if constexpr (!kFused) return take(v + side, level, p, side);
    Unit x = {};
    DHNS_ROW_LOOP
    for (int m = 0; m < modalities_; ++m) {
      const T share = share_[share_of(level, m, side)];
      // A share of 0 belongs to an absent modality, whose place may hold NaN.
      if (share == 0) continue;
      const Unit e = take(v + 2 * m + side, level, m, side);
      each([&](int q, int j) { x.at[q][j] += share * e.at[q][j]; });
    }
    return x;
  }
  // As scores see it: normalised.
  DHNS_ROW_FN Unit seen(int v, int level, int p, int side) const {
    Unit x = raw(v, level, p, side);
    if (normalizes()) {
      const T factor = factor_[factor_of(level, p, side)];
      each([&](int q, int j) { x.at[q][j] *= factor; });
    }
    return x;
  }

  // From logits to shares, a side of a level a lane.
  DHNS_ROW_FN void softmax() const {
    DHNS_ROW_LOOP
    for (int i = threads_.lane(); i < 2 * (1 + levels_); i += threads_.lanes()) {
      T* const logit = share_ + (i >> 1) * 2 * modalities_ + (i & 1);
      const bool* const present = i & 1 ? a_.tail_present : a_.head_present;
      T largest = -INFINITY, total = 0;
      DHNS_ROW_LOOP
      for (int m = 0; m < modalities_; ++m) {
        if (present && !present[m * a_.batch + b_]) logit[2 * m] = -INFINITY;
        const T x = logit[2 * m];
        largest = x > largest || x != x ? x : largest;
      }
      DHNS_ROW_LOOP
      for (int m = 0; m < modalities_; ++m) {
        const T x = logit[2 * m], share = x == -INFINITY ? T(0) : exponential(x - largest);
        logit[2 * m] = share, total += share;
      }
      DHNS_ROW_LOOP
      for (int m = 0; m < modalities_; ++m)
        if (logit[2 * m] != 0) logit[2 * m] /= total;
    }
    threads_.warp_barrier();
  }

  DHNS_ROW_FN void logits() {
    vectors([&](int v, int level, int m, int side) {
      const Unit e = take(v, level, m, side);
      T sum[1] = {0};
      each([&](int p, int j) { sum[0] += w_.at[p][j] * hyperbolic_tangent(e.at[p][j]); });
      put(share_of(level, m, side), sum);
    });
    gather(share_, int(tables_.shares));
    softmax();
  }

  DHNS_ROW_FN void norms() {
    T squares[3] = {dot(h_, h_), dot(t_, t_), dot(r_, r_)};
    put(0, squares);
    pairs([&](int v, int level, int p) {
      const Unit x = raw(v, level, p, 0), y = raw(v, level, p, 1);
      T both[2] = {dot(x, x), dot(y, y)};
      put(factor_of(level, p, 0), both);
    });
    gather(factor_, int(tables_.factors));
    for (int i = threads_.lane(); i < tables_.factors; i += threads_.lanes()) factor_[i] = inverse_norm(factor_[i]);
    threads_.warp_barrier();
    const T of_h = factor_[0], of_t = factor_[1], of_r = factor_[2];
    each([&](int p, int j) { h_.at[p][j] *= of_h, t_.at[p][j] *= of_t, r_.at[p][j] *= of_r; });
  }

  DHNS_ROW_FN void take_relation() {
    const S* const given = a_.relation + b_ * a_.width + at_;
    if constexpr (I::kPhases) {
      DHNS_ROW_UNROLL
      for (int j = 0; j < kWide; ++j) sine_and_cosine(inside_ ? T(given[j]) : T(0), r_.at[1][j], r_.at[0][j]);
    } else {
      r_ = load({given, n_});
    }
  }

  // The scores of all levels, before the margin; their sums become what each term's slope is multiplied by.
  DHNS_ROW_FN void scores() {
    T positive[1] = {0};
    DHNS_ROW_UNROLL
    for (int j = 0; j < kWide; ++j) positive[0] += I::term(I::compose(element(h_, j), element(r_, j)), element(t_, j));
    put(0, positive);
    pairs([&](int v, int level, int p) {
      const Unit x = seen(v, level, p, 0), y = seen(v, level, p, 1);
      T sums[3] = {0, 0, 0};
      DHNS_ROW_UNROLL
      for (int j = 0; j < kWide; ++j) {
        const auto q = I::compose(element(h_, j), element(r_, j)), qx = I::compose(element(x, j), element(r_, j));
        sums[0] += I::term(qx, element(t_, j)), sums[1] += I::term(q, element(y, j)), sums[2] += I::term(qx, element(y, j));
      }
      put(1 + 3 * (level * pairs_ + p), sums);
    });
    gather(coefficient_, int(tables_.scores));
    DHNS_ROW_LOOP
    for (int i = threads_.lane(); i <= levels_; i += threads_.lanes())
      if (i == 0 || a_.weight[i - 1] > 0) weigh(i - 1);
    threads_.warp_barrier();
  }
  // From sums of scores to coefficients, of the positive (level −1) or of a level.
  DHNS_ROW_FN void weigh(int level) {
    const bool is_positive = level < 0;
    const int kinds = is_positive ? 1 : 3, count = is_positive ? 1 : pairs_;
    T* const sums = is_positive ? coefficient_ : coefficient_ + 1 + 3 * level * pairs_;
    const T weight = is_positive ? scale_ * 3 * weight_ : scale_ * a_.weight[level], shift = is_positive ? a_.gamma : a_.margin[level];
    const T sign = is_positive ? T(-1) : T(1);
    T by_margin = 0;
    DHNS_ROW_LOOP
    for (int k = 0; k < kinds; ++k) {
      T value = 0, slope, sigmoid;
      DHNS_ROW_LOOP
      for (int p = 0; p < count; ++p) value += I::finish(sums[3 * p + k], slope) / T(count);
      loss_ += double(weight * softplus_sigmoid(sign * finite_or_nan(shift + value), sigmoid));
      by_margin += weight * sigmoid;
      DHNS_ROW_LOOP
      for (int p = 0; p < count; ++p) {
        I::finish(sums[3 * p + k], slope);
        sums[3 * p + k] = sign * weight * sigmoid / T(count) * slope;
      }
    }
    if (!is_positive && threads_.warp() == 0) partial_[1 + level] += by_margin;
  }

  // Gradients of a pair's x and y; those of h, r and t are added where `adds`.
  DHNS_ROW_FN void slopes(bool adds, int level, int p, const Unit& x, const Unit& y, Unit& gx, Unit& gy) {
    const T* const c = coefficient_ + 1 + 3 * (level * pairs_ + p);
    const T c0 = c[0], c1 = c[1], c2 = c[2];
    DHNS_ROW_UNROLL
    for (int j = 0; j < kWide; ++j) {
      const auto h = element(h_, j), r = element(r_, j), t = element(t_, j), ex = element(x, j), ey = element(y, j);
      const auto q = I::compose(h, r), qx = I::compose(ex, r);
      const auto head = I::slopes(qx, t, c0), tail = I::slopes(q, ey, c1), both = I::slopes(qx, ey, c2);
      const auto by_x = head.query + both.query;
      if (adds) add(gh_, j, I::to_head(r, tail.query)), add(gr_, j, I::to_relation(h, tail.query) + I::to_relation(ex, by_x)), add(gt_, j, head.entity);
      if constexpr (kFused) set(gx, j, I::to_head(r, by_x)), set(gy, j, tail.entity + both.entity);
    }
  }

  DHNS_ROW_FN void gradients() {
    gh_ = {}, gr_ = {}, gt_ = {};
    DHNS_ROW_UNROLL
    for (int j = 0; j < kWide; ++j) {
      const auto h = element(h_, j), r = element(r_, j), t = element(t_, j);
      const auto g = I::slopes(I::compose(h, r), t, coefficient_[0]);
      set(gh_, j, I::to_head(r, g.query)), set(gr_, j, I::to_relation(h, g.query)), set(gt_, j, g.entity);
    }
    // With norms a fused pair's gradients lead through its own, whose part along the vector has to be known first: a second sweep has them again.
    const int sweeps = kFused && normalizes() ? 2 : 1;
    DHNS_ROW_LOOP
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      pairs([&](int v, int level, int p) {
        const Unit x = seen(v, level, p, 0), y = seen(v, level, p, 1);
        Unit gx, gy;
        slopes(sweep == 0, level, p, x, y, gx, gy);
        if constexpr (kFused) {
          const int i = factor_of(level, p, 0);
          if (normalizes() && sweep == 0) {
            T both[2] = {dot(x, gx), dot(y, gy)};
            return put(i, both);
          }
          if (normalizes()) through_norm(gx, x, factor_[i], along_[i]), through_norm(gy, y, factor_[i + 1], along_[i + 1]);
          put_slopes(v, level, gx, gy);
        } else {
          renew(v, level, p);
        }
      });
      if (normalizes() && sweep == 0) {
        T along[3] = {dot(h_, gh_), dot(t_, gt_), dot(r_, gr_)};
        put(0, along);
        gather(along_, kFused ? int(tables_.factors) : 3);
        through_norm(gh_, h_, factor_[0], along_[0]);
        through_norm(gt_, t_, factor_[1], along_[1]);
        through_norm(gr_, r_, factor_[2], along_[2]);
      }
    }
    store_relation();
    if constexpr (kFused)
      through_shares();
    else
      store(a_.grad_head + b_ * a_.dim, gh_), store(a_.grad_tail + b_ * a_.dim, gt_);
  }

  // g becomes factor·(g − (g·x)·x), which is 0 along a vector that was too short to be normalised.
  static DHNS_ROW_FN void through_norm(Unit& g, const Unit& x, T factor, T along) {
    const T much = factor < T(1e12) ? along : T(0);
    each([&](int p, int j) { g.at[p][j] = factor * (g.at[p][j] - much * x.at[p][j]); });
  }

  // Slopes of a level's shares: the gradients of what was fused times each modality.
  DHNS_ROW_FN void put_slopes(int v, int level, const Unit& gx, const Unit& gy) const {
    DHNS_ROW_LOOP
    for (int m = 0; m < modalities_; ++m) {
      const int i = share_of(level, m, 0);
      T slope[2] = {0, 0};
      if (share_[i] != 0) slope[0] = dot(gx, take(v + 2 * m, level, m, 0));
      if (share_[i + 1] != 0) slope[1] = dot(gy, take(v + 2 * m + 1, level, m, 1));
      put(i, slope);
    }
  }
  // Back through the fusion: adds to the attention's gradient, and writes those of the real modalities.
  DHNS_ROW_FN void through_shares() {
    put_slopes(0, -1, gh_, gt_);
    gather(slope_, int(tables_.shares));
    DHNS_ROW_LOOP
    for (int i = threads_.lane(); i < 2 * (1 + levels_); i += threads_.lanes()) {
      const int first = (i >> 1) * 2 * modalities_ + (i & 1);
      T mean = 0;
      DHNS_ROW_LOOP
      for (int m = 0; m < modalities_; ++m) mean += share_[first + 2 * m] * slope_[first + 2 * m];
      DHNS_ROW_LOOP
      for (int m = 0; m < modalities_; ++m) slope_[first + 2 * m] = share_[first + 2 * m] * (slope_[first + 2 * m] - mean);
    }
    threads_.warp_barrier();
    vectors([&](int v, int level, int m, int side) {
      const int i = share_of(level, m, side);
      const T share = share_[i], slope = slope_[i];
      Unit out = {};
      if (share != 0) {
        const Unit e = take(v, level, m, side);
        each([&](int p, int j) {
          const T th = hyperbolic_tangent(e.at[p][j]), g = side ? gt_.at[p][j] : gh_.at[p][j];
          by_attention_.at[p][j] += slope * th;
          out.at[p][j] = share * g + slope * w_.at[p][j] * (1 - th * th);
        });
      }
      fetch(v, level, m, side);
      if (level < 0) store((side ? a_.grad_tail : a_.grad_head) + (m * a_.batch + b_) * a_.dim, out);
    });
  }

  DHNS_ROW_FN void store_relation() const {
    T* const out = a_.grad_relation + b_ * a_.width;
    if constexpr (I::kPhases) {
      DHNS_ROW_UNROLL
      for (int j = 0; j < kWide; ++j)
        if (inside_) out[at_ + j] = r_.at[0][j] * gr_.at[1][j] - r_.at[1][j] * gr_.at[0][j];
    } else {
      store(out, gr_);
    }
  }

  // The next row's vectors into the places of a pair that this row is done with.
  DHNS_ROW_FN void renew(int v, int level, int p) const { fetch(v, level, p, 0), fetch(v + 1, level, p, 1); }

  DHNS_ROW_FN void row() {
    take_relation();
    if constexpr (kFused) {
      logits();
      h_ = raw(0, -1, 0, 0), t_ = raw(0, -1, 0, 1);
    } else {
      h_ = load({a_.head + b_ * a_.dim + at_, n_}), t_ = load({a_.tail + b_ * a_.dim + at_, n_});
    }
    if (normalizes()) norms();
    scores();
    if (a_.grad_head) return gradients();
    vectors([&](int v, int level, int m, int side) { fetch(v, level, m, side); });
  }

  DHNS_ROW_FN bool normalizes() const { return I::kNormalizes && a_.normalize; }

  const HalEmbeddings<S, T>& a_;
  const Threads threads_;
  const HalTables tables_;
  T *sums_, *share_, *slope_, *factor_, *along_, *coefficient_;
  S* kept_;
  double* partial_;
  int64_t b_ = 0;  // this row
  int n_, at_, levels_, modalities_, pairs_, kept_count_, turn_ = 0;
  bool inside_, more_ = false;  // more_: another row of this block comes after this one
  double loss_ = 0;
  T weight_ = 0, scale_ = 0;
  Unit h_, t_, r_, gh_, gt_, gr_, w_, by_attention_;
};

// hal_scores: a block takes some rows of the batch, of all levels and kinds, and leaves loss and gradients of the margins in partial
// [blocks, 1 + L]. scratch: a double a warp.
template <class T>
class Scores {
 public:
  DHNS_ROW_FN Scores(const HalScores<T>& a, double* scratch, Threads threads) : a_(a), scratch_(scratch), threads_(threads) {}

  DHNS_ROW_FN void block(int64_t index, int64_t rows) {
    double* const partial = a_.partial + index * (1 + a_.levels);
    const int64_t first = index * rows, end = first + rows < a_.batch ? first + rows : a_.batch;
    int64_t active = 0;
    T weight = 0;
    for (int64_t i = 0; i < a_.levels; ++i)
      if (a_.weight[i] > 0) ++active, weight += a_.weight[i];
    const T scale = active ? a_.mu / (2 * T(a_.kinds) * T(active) * T(a_.batch)) : T(0);
    double slope;
    double loss = part(a_.positive, a_.grad_positive, first, end, T(0), T(-1), scale * T(a_.kinds) * weight, slope);
    for (int64_t i = 0; i < a_.levels; ++i) {
      double by_margin = 0;
      for (int64_t k = 0; k < a_.kinds; ++k) {
        const int64_t at = (i * a_.kinds + k) * a_.batch;
        T* const gradient = a_.grad_negative + at;
        if (a_.weight[i] > 0) {
          loss += part(a_.negative + at, gradient, first, end, a_.margin[i], T(1), scale * a_.weight[i], slope);
          by_margin += slope;
        } else {
          for (int64_t b = first + threads_.rank(); b < end; b += threads_.count()) gradient[b] = 0;
        }
      }
      by_margin = sum(by_margin);
      if (threads_.rank() == 0) partial[1 + i] = by_margin;
    }
    loss = sum(loss);
    if (threads_.rank() == 0) partial[0] = loss;
  }

 private:
  // This thread's share of the sums of scale·softplus(sign·(x + shift)) and of its derivative by x, which goes to `gradient`.
  DHNS_ROW_FN double part(const T* x, T* gradient, int64_t first, int64_t end, T shift, T sign, T scale, double& slope) const {
    double loss = 0;
    slope = 0;
    for (int64_t b = first + threads_.rank(); b < end; b += threads_.count()) {
      T sigmoid;
      loss += scale * softplus_sigmoid(sign * (finite_or_nan(x[b]) + shift), sigmoid);
      slope += gradient[b] = scale * sign * sigmoid;
    }
    return loss;
  }

  DHNS_ROW_FN double sum(double x) const {
    x = warp_sum(threads_, x);
    if (threads_.lane() == 0) scratch_[threads_.warp()] = x;
    threads_.barrier();
    x = 0;
    for (int w = 0; w < threads_.warps(); ++w) x += scratch_[w];
    threads_.barrier();
    return x;
  }

  const HalScores<T>& a_;
  double* const scratch_;
  const Threads threads_;
};

// self_adversarial: a warp takes a row of N corruptions and its positive.
template <class T>
DHNS_ROW_FN void self_adversarial_row(const SelfAdversarial<T>& a, int64_t b, Threads threads) {
  const int64_t n = a.corruptions;
  const T* const x = a.negative + b * n;
  T* const gradient = a.grad_negative + b * n;
  T largest = -INFINITY, total = 0;
  for (int64_t j = threads.lane(); j < n; j += threads.lanes()) largest = a.temperature * x[j] > largest ? a.temperature * x[j] : largest;
  largest = warp_max(threads, largest);
  for (int64_t j = threads.lane(); j < n; j += threads.lanes())
    total += gradient[j] = exponential(a.temperature * finite_or_nan(x[j]) - largest);
  total = warp_sum(threads, total);
  const T scale = T(0.5) / T(a.batch), share = scale / total;
  T loss = 0, sigmoid;
  for (int64_t j = threads.lane(); j < n; j += threads.lanes()) {
    const T weight = share * gradient[j];
    loss += weight * softplus_sigmoid(x[j], sigmoid);
    gradient[j] = weight * sigmoid;
  }
  loss = warp_sum(threads, loss);
  if (threads.lane()) return;
  a.partial[b] = loss + scale * softplus_sigmoid(-finite_or_nan(a.positive[b]), sigmoid);
  a.grad_positive[b] = -scale * sigmoid;
}

}  // namespace
}  // namespace dhns::kernels
