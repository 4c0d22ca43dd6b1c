// Distances of queries to all entities, and what is taken from a tile of them while it is in registers.
//
//     l1 Σ |q − s·e|    l2 Σ (q − s·e)²    complex_l1 Σ √((Δre)² + (Δim)²)      (a raw score is the negative of it; l2's root comes later)
//
// A block takes 8·kTy queries through one share of the entities, 8·kTx at a time; a thread has 8 × 8 sums, as in a product of matrices, and reads
// both operands from shared memory. A sum runs through the dimensions one after the other, each step rounded as written: a score has the same bits
// wherever its pair stands, in every tile and for every consumer.
//
// Threads give rank, barrier, any, exchange and copies to shared memory, and so the code runs as ordinary threads in a test where there is no GPU.
#pragma once

#include <cstdint>

#include "reductions.h"
#include "vector_math.h"

#if defined(__CUDACC__)
#define DHNS_TILE_FN __device__ __forceinline__
#define DHNS_UNROLL _Pragma("unroll")
#define DHNS_NO_UNROLL _Pragma("unroll 1")
#else
#define DHNS_TILE_FN inline
#define DHNS_UNROLL
#define DHNS_NO_UNROLL
#endif

namespace dhns::kernels {

// rank       goal: raw scores at the target;        out int32 [shares, 3, B]: greater, equal, NaN, of rivals
// doubt      slot int32 [B, slots]: a bit a pair;   as rank, of the pairs whose bit is set, l2 without a scale alone
// maxima                                            out int64 [B, tiles]: the greatest key of each tile; more float32 [B, tiles·columns] or null:
//                                                   raw scores, −inf where they do not count
// again      slot int32 [B, tiles], or −1;          more float32 [B, slots, columns]: raw scores of the tiles that have one
// logsumexp                                         out, more float32 [shares, B]: greatest score m, Σ exp(score − m)
// scores                                            more float32 [B, E]
enum Consumer : int64_t { kRank, kMaxima, kAgain, kLogSumExp, kScores, kDoubt };

template <class E>
struct SweepArguments {
  bool aligned;  // rows, and their halves where a number has two, begin at multiples of 16 bytes
  int64_t queries, entities, dim, base, share, slots;  // known answers and targets count from 0 of the whole table, this one begins at `base`
  const float *query, *scale;                          // [B, D]; scale may be null where a template says that there is none
  const E* entity;                                     // [E, D]
  const int64_t *offsets, *ids;                        // known answers, ids null: none
  const int64_t* target;                               // [B], kRank and kDoubt alone
  const int32_t* slot;
  const float* goal;
  void* out;
  float* more;
};

namespace {

constexpr int kSums = 8;    // a thread's rows and columns
constexpr int kDepth = 32;  // numbers of a row in shared memory at a time
// Pairs in doubt that a row of a tile may have: a thread takes a row's, one after the other, each as long as the memory takes to answer some sixteen
// times, 5 µs; beyond this the whole tile is summed, 40 to 80 µs.
constexpr int kFewPairs = 8;

// Rows in shared memory lie 16 bytes further apart than they are long: eight of them fill all banks.
template <class T>
constexpr int kPitch = kDepth + 16 / sizeof(T);

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

DHNS_TILE_FN float as_float(float x) { return x; }
#if defined(__CUDACC__)
DHNS_TILE_FN float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DHNS_TILE_FN float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DHNS_TILE_FN float product(float a, float b) { return __fmul_rn(a, b); }
// One instruction, off by a unit in the last place; squares below 1e-38 count as 0.
DHNS_TILE_FN float modulus(float square) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(square));
  return root;
}
DHNS_TILE_FN float natural_exponential(float x) { return __expf(x); }
#else
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float product(float a, float b) { return a * b; }
inline float modulus(float square) { return std::sqrt(square); }
inline float natural_exponential(float x) { return std::exp(x); }
#endif

// One more dimension, or pair of them, of a sum.
template <bool kScaled>
DHNS_TILE_FN float difference(float q, float s, float e) {
  return kScaled ? fused(-s, e, q) : q - e;
}
template <int64_t kReduction>
DHNS_TILE_FN float add_term(float sum, float d, float imaginary) {
  if constexpr (kReduction == kL1)
    return sum + std::fabs(d);
  else if constexpr (kReduction == kL2)
    return fused(d, d, sum);
  else
    return sum + modulus(fused(imaginary, imaginary, product(d, d)));
}

// A modulus whose squares a float may not hold; infinite where a part is, whatever the other is.
DHNS_TILE_FN float wide_modulus(float real, float imaginary) {
  const float a = std::fabs(real), b = std::fabs(imaginary);
  if (a == INFINITY || b == INFINITY) return INFINITY;
  // Powers of two: nothing is rounded but what is too small to count.
  const bool huge = a > 1e18f || b > 1e18f;
  const float down = huge ? 5.421010862427522e-20f : 1.0f, up = huge ? 18446744073709551616.0f : 1.0f;
  real *= down, imaginary *= down;
  return up * modulus(fused(imaginary, imaginary, product(real, real)));
}

// int64 that orders by score, then by smaller id; −0 counts as 0.
DHNS_TILE_FN int64_t key_of(float raw, int32_t id) {
  const int32_t bits = bits_of<int32_t>(raw + 0.0f);
  const int32_t order = bits ^ ((bits >> 31) & 0x7fffffff);
  return (int64_t(order) << 32) | int64_t(0xffffffffu - uint32_t(id));
}

// Bytes of shared memory of a block.
template <class E, bool kScaled, int kTx, int kTy>
constexpr int64_t sweep_shared_bytes() {
  constexpr int64_t rows = kSums * kTy, columns = kSums * kTx;
  // Two stages of the operands; a bit for each score; what consumers keep of a row.
  return 2 * (rows * kPitch<float> * 4 * (1 + kScaled) + columns * kPitch<E> * int64_t(sizeof(E))) + rows * ((columns + 31) / 32) * 4 + rows * 32;
}

// Σ of moduli of any size.
template <bool kScaled, class E>
DHNS_TILE_FN float wide_sum(const float* q, const float* s, const E* e, int64_t dim) {
  const int64_t half = dim / 2;
  float sum = 0;
  DHNS_NO_UNROLL for (int64_t k = 0; k < half; ++k) {
    const int64_t i = k + half;
    sum += wide_modulus(difference<kScaled>(q[k], kScaled ? s[k] : 1.0f, as_float(e[k])), difference<kScaled>(q[i], kScaled ? s[i] : 1.0f, as_float(e[i])));
  }
  return sum;
}

// The raw score of query b and entity e, by the same steps as a tile's.
template <int64_t kReduction, bool kScaled, class E>
DHNS_TILE_FN float pair_score(const float* q, const float* s, const E* e, int64_t dim) {
  constexpr int kParts = kReduction == kComplexL1 ? 2 : 1;
  const int64_t steps = dim / kParts;
  float sum = 0;
  for (int64_t k = 0; k < steps; ++k) {
    const float d0 = difference<kScaled>(q[k], kScaled ? s[k] : 1.0f, as_float(e[k]));
    const int64_t i = k + (kParts - 1) * steps;
    const float d1 = kParts == 2 ? difference<kScaled>(q[i], kScaled ? s[i] : 1.0f, as_float(e[i])) : 0.0f;
    sum = add_term<kReduction>(sum, d0, d1);
  }
  if (kReduction == kComplexL1 && sum == INFINITY) sum = wide_sum<kScaled>(q, s, e, dim);
  return -sum;
}

// −Σ (q − e)², by the same steps; aligned rows sixteen numbers at a time, so that as many are on their way at once.
template <class E>
DHNS_TILE_FN float pair_in_doubt(const SweepArguments<E>& a, int64_t b, int64_t column) {
  constexpr int kPack = 16 / sizeof(E), kAhead = 16;
  const float* const q = a.query + b * a.dim;
  const E* const e = a.entity + column * a.dim;
  float sum = 0;
  int64_t k = 0;
  if (a.aligned) {
    DHNS_NO_UNROLL for (; k + kAhead <= a.dim; k += kAhead) {
      Pack<float, 4> x[kAhead / 4];
      Pack<E, kPack> y[kAhead / kPack];
      DHNS_UNROLL for (int i = 0; i < kAhead / 4; ++i) x[i] = *reinterpret_cast<const Pack<float, 4>*>(q + k + 4 * i);
      DHNS_UNROLL for (int i = 0; i < kAhead / kPack; ++i) y[i] = *reinterpret_cast<const Pack<E, kPack>*>(e + k + kPack * i);
      DHNS_UNROLL for (int i = 0; i < kAhead; ++i)
        sum = add_term<kL2>(sum, difference<false>(x[i / 4].at[i % 4], 1.0f, as_float(y[i / kPack].at[i % kPack])), 0.0f);
    }
  }
  DHNS_NO_UNROLL for (; k < a.dim; ++k) sum = add_term<kL2>(sum, difference<false>(q[k], 1.0f, as_float(e[k])), 0.0f);
  return -sum;
}

template <class Threads, class E, int64_t kReduction, int64_t kConsumer, bool kScaled, int kTx, int kTy>
class Sweep {
  static constexpr int kRows = kSums * kTy, kColumns = kSums * kTx, kThreads = kTx * kTy, kWords = (kColumns + 31) / 32;
  static constexpr int kParts = kReduction == kComplexL1 ? 2 : 1;  // halves of a vector that are read side by side
  static constexpr int kSteps = kDepth / kParts;
  static constexpr int kWide = kParts == 1 && !kScaled ? 2 : 1;  // dimensions that a thread holds of eight rows: 16 registers
  static constexpr bool kRanks = kConsumer == kRank || kConsumer == kDoubt;
  static constexpr bool kFilters = kRanks || kConsumer == kMaxima || kConsumer == kAgain;

 public:
  DHNS_TILE_FN Sweep(const SweepArguments<E>& a, void* shared, const Threads& threads)
      : a_(a), threads_(threads), shared_(static_cast<float*>(shared)) {
    tx_ = threads.rank() % kTx, ty_ = threads.rank() / kTx;
  }

  DHNS_TILE_FN void run(int64_t block, int64_t i_share) {
    first_row_ = block * kRows;
    const int64_t tiles = (a_.entities + kColumns - 1) / kColumns, first = i_share * a_.share;
    const int64_t last = first + a_.share < tiles ? first + a_.share : tiles;
    begin(first);
    for (int64_t tile = first; tile < last; ++tile) {
      if constexpr (kConsumer == kAgain) {
        bool wanted = false;
        for (int r = threads_.rank(); r < kRows; r += kThreads) {
          slot()[r] = row(r) < a_.queries ? a_.slot[row(r) * tiles + tile] : -1;
          wanted |= slot()[r] >= 0;
        }
        if (!threads_.any(wanted)) continue;
      }
      if constexpr (kConsumer == kDoubt) {
        const int pairs = leave_out(tile * kColumns);
        if (!threads_.any(pairs > 0)) continue;
        if (!threads_.any(pairs > kFewPairs)) {
          settle(tile * kColumns);
          continue;
        }
      }
      float sums[kSums][kSums];
      distances(tile * kColumns, sums);
      if constexpr (kReduction == kComplexL1) mend(tile * kColumns, sums);
      if constexpr (kFilters && kConsumer != kDoubt) leave_out(tile * kColumns);
      consume(tile, tiles, sums);
    }
    end(i_share);
  }

 private:
  DHNS_TILE_FN int64_t row(int r) const { return first_row_ + r; }

  // Shared memory: two stages of each operand, a bit for each score, four numbers, a position and a slot for each row.
  DHNS_TILE_FN float* query() const { return shared_; }
  DHNS_TILE_FN float* scale() const { return query() + 2 * kRows * kPitch<float>; }
  DHNS_TILE_FN E* entity() const { return reinterpret_cast<E*>(kScaled ? scale() + 2 * kRows * kPitch<float> : scale()); }
  DHNS_TILE_FN uint32_t* left_out() const { return reinterpret_cast<uint32_t*>(entity() + 2 * kColumns * kPitch<E>); }
  DHNS_TILE_FN float* state() const { return reinterpret_cast<float*>(left_out() + kRows * kWords); }
  DHNS_TILE_FN int32_t* counts_of_rows() const { return reinterpret_cast<int32_t*>(state()); }
  DHNS_TILE_FN int64_t* position() const { return reinterpret_cast<int64_t*>(state() + 4 * kRows); }
  DHNS_TILE_FN int32_t* slot() const { return reinterpret_cast<int32_t*>(position() + kRows); }

  // Rows first .. first + count − 1 of x [rows, dim], dimensions from `start` on, to shared memory; 0 beyond the matrix.
  template <class T>
  DHNS_TILE_FN void stage(T* to, const T* x, int64_t first, int count, int64_t rows, int64_t start) const {
    constexpr int kPack = 16 / sizeof(T), kPacks = kDepth / kPack;
    const int64_t steps = a_.dim / kParts;
    // Unrolled, its addresses would be kept beside the sums for all of the loop around it.
    DHNS_NO_UNROLL for (int p = threads_.rank(); p < count * kPacks; p += kThreads) {
      const int r = p / kPacks, place = p % kPacks * kPack, part = place / kSteps;
      const int64_t k = start + place % kSteps;
      int64_t valid = first + r < rows ? steps - k : 0;
      valid = valid < 0 ? 0 : valid > kPack ? kPack : valid;
      const T* const from = x + (valid ? (first + r) * a_.dim + part * steps + k : 0);
      T* const at = to + r * kPitch<T> + place;
      if (a_.aligned) {
        threads_.copy16(at, from, static_cast<int>(valid * sizeof(T)));
      } else {
        for (int v = 0; v < kPack; ++v) at[v] = v < valid ? from[v] : T(0.0f);
      }
    }
  }

  DHNS_TILE_FN void stage_all(int buffer, int64_t first_column, int64_t start) const {
    stage(query() + buffer * kRows * kPitch<float>, a_.query, first_row_, kRows, a_.queries, start);
    if constexpr (kScaled) stage(scale() + buffer * kRows * kPitch<float>, a_.scale, first_row_, kRows, a_.queries, start);
    stage(entity() + buffer * kColumns * kPitch<E>, a_.entity, first_column, kColumns, a_.entities, start);
    threads_.commit();
  }

  DHNS_TILE_FN void distances(int64_t first_column, float (&sums)[kSums][kSums]) const {
    DHNS_UNROLL for (int i = 0; i < kSums; ++i) DHNS_UNROLL for (int j = 0; j < kSums; ++j) sums[i][j] = 0;
    const int64_t steps = a_.dim / kParts;
    stage_all(0, first_column, 0);
    int buffer = 0;
    DHNS_NO_UNROLL for (int64_t start = 0; start < steps; start += kSteps, buffer ^= 1) {
      threads_.wait();
      // After it a stage is there for all, and the one before it is read by nobody.
      threads_.barrier();
      if (start + kSteps < steps) stage_all(buffer ^ 1, first_column, start + kSteps);
      add(buffer, sums);
    }
    threads_.barrier();
  }

  // The hot loop.
  DHNS_TILE_FN void add(int buffer, float (&sums)[kSums][kSums]) const {
    const float* const q_at = query() + (buffer * kRows + ty_) * kPitch<float>;
    const float* const s_at = scale() + (buffer * kRows + ty_) * kPitch<float>;
    const E* const e_at = entity() + (buffer * kColumns + tx_) * kPitch<E>;
    DHNS_NO_UNROLL for (int k = 0; k < kSteps; k += kWide) {
      Pack<float, kWide> q[kSums][kParts], s[kSums][kParts];
      DHNS_UNROLL for (int i = 0; i < kSums; ++i) DHNS_UNROLL for (int p = 0; p < kParts; ++p) {
        q[i][p] = *reinterpret_cast<const Pack<float, kWide>*>(q_at + i * kTy * kPitch<float> + p * kSteps + k);
        if constexpr (kScaled) s[i][p] = *reinterpret_cast<const Pack<float, kWide>*>(s_at + i * kTy * kPitch<float> + p * kSteps + k);
      }
      DHNS_UNROLL for (int j = 0; j < kSums; ++j) {
        Pack<E, kWide> e[kParts];
        DHNS_UNROLL for (int p = 0; p < kParts; ++p)
          e[p] = *reinterpret_cast<const Pack<E, kWide>*>(e_at + j * kTx * kPitch<E> + p * kSteps + k);
        DHNS_UNROLL for (int w = 0; w < kWide; ++w) {
          const float e0 = as_float(e[0].at[w]), e1 = as_float(e[kParts - 1].at[w]);
          DHNS_UNROLL for (int i = 0; i < kSums; ++i) {
            const float s0 = kScaled ? s[i][0].at[w] : 1.0f, s1 = kScaled ? s[i][kParts - 1].at[w] : 1.0f;
            const float d0 = difference<kScaled>(q[i][0].at[w], s0, e0);
            const float d1 = kParts == 2 ? difference<kScaled>(q[i][kParts - 1].at[w], s1, e1) : 0.0f;
            sums[i][j] = add_term<kReduction>(sums[i][j], d0, d1);
          }
        }
      }
    }
  }

  // Moduli whose squares a float does not hold leave their sums infinite: those pairs are summed again, one after the other. Tiles without them, all
  // but few, pay 64 comparisons.
  DHNS_TILE_FN void mend(int64_t first_column, float (&sums)[kSums][kSums]) const {
    bool finite = true;
    DHNS_UNROLL for (int i = 0; i < kSums; ++i) DHNS_UNROLL for (int j = 0; j < kSums; ++j) finite &= sums[i][j] != INFINITY;
    if (finite) return;
    DHNS_NO_UNROLL for (int place = 0; place < kSums * kSums; ++place) {
      const int64_t b = row(ty_ + place / kSums * kTy), column = first_column + tx_ + place % kSums * kTx;
      float sum = 0;
      // Sums are in registers, which have no numbers at run time.
      DHNS_UNROLL for (int i = 0; i < kSums; ++i) DHNS_UNROLL for (int j = 0; j < kSums; ++j) sum = place == i * kSums + j ? sums[i][j] : sum;
      if (sum != INFINITY || b >= a_.queries || column >= a_.entities) continue;
      sum = wide_sum<kScaled>(a_.query + b * a_.dim, a_.scale + (kScaled ? b * a_.dim : 0), a_.entity + column * a_.dim, a_.dim);
      DHNS_UNROLL for (int i = 0; i < kSums; ++i) DHNS_UNROLL for (int j = 0; j < kSums; ++j) sums[i][j] = place == i * kSums + j ? sum : sums[i][j];
    }
  }

  DHNS_TILE_FN void begin(int64_t first) {
    for (int r = threads_.rank(); r < kRows; r += kThreads) {
      if (kFilters && a_.ids && row(r) < a_.queries) {
        int64_t low = a_.offsets[row(r)], high = a_.offsets[row(r) + 1];
        const int64_t bound = a_.base + first * kColumns;
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          if (a_.ids[middle] < bound) low = middle + 1; else high = middle;
        }
        position()[r] = low;
      }
      int32_t* const counts = counts_of_rows();
      if constexpr (kRanks) counts[r] = counts[kRows + r] = counts[2 * kRows + r] = 0;
      if constexpr (kConsumer == kLogSumExp) state()[r] = -INFINITY, state()[kRows + r] = 0;
    }
    threads_.barrier();
  }

  // A bit for each score that does not count: known answers, the target among rivals, what lies beyond the table, what is not in doubt. How many
  // pairs in doubt are left of the row among this thread's that has most.
  DHNS_TILE_FN int leave_out(int64_t first_column) {
    int most = 0;
    for (int r = threads_.rank(); r < kRows; r += kThreads) {
      uint32_t* const words = left_out() + r * kWords;
      for (int w = 0; w < kWords; ++w) {
        const int64_t inside = a_.entities - first_column - 32 * w;
        words[w] = inside >= 32 ? 0 : inside <= 0 ? 0xffffffffu : 0xffffffffu << inside;
        if constexpr (kConsumer == kDoubt)
          if (inside > 0 && row(r) < a_.queries) words[w] |= ~(static_cast<uint32_t>(a_.slot[row(r) * a_.slots + first_column / 32 + w]) >> first_column % 32);
      }
      if (row(r) >= a_.queries) continue;
      if (a_.ids) {
        const int64_t end = a_.offsets[row(r) + 1];
        int64_t at = position()[r];
        for (; at < end; ++at) {
          const int64_t place = a_.ids[at] - a_.base - first_column;
          if (place >= kColumns) break;
          if (place >= 0) words[place / 32] |= 1u << (place % 32);
        }
        position()[r] = at;
      }
      if constexpr (kRanks) {
        const int64_t place = a_.target[row(r)] - a_.base - first_column;
        if (place >= 0 && place < kColumns) words[place / 32] |= 1u << (place % 32);
      }
      if constexpr (kConsumer == kDoubt) {
        int pairs = 0;
        for (int w = 0; w < kWords; ++w)
          for (uint32_t left = in_doubt(words[w]); left; left &= left - 1) ++pairs;
        most = pairs > most ? pairs : most;
      }
    }
    threads_.barrier();
    return most;
  }

  // Of a word of what does not count, what does, of tiles of fewer columns than a word has bits too.
  static DHNS_TILE_FN uint32_t in_doubt(uint32_t word) { return ~word & (kColumns < 32 ? (1u << kColumns % 32) - 1 : 0xffffffffu); }

  // The few pairs in doubt of a tile, a row a thread.
  DHNS_TILE_FN void settle(int64_t first_column) {
    int32_t* const totals = counts_of_rows();
    for (int r = threads_.rank(); r < kRows && row(r) < a_.queries; r += kThreads) {
      const float goal = a_.goal[row(r)];
      for (int w = 0; w < kWords; ++w) {
        uint32_t left = in_doubt(left_out()[r * kWords + w]);
        for (int column = 0; left; ++column, left >>= 1) {
          if (!(left & 1)) continue;
          const float raw = pair_in_doubt(a_, row(r), first_column + 32 * w + column);
          totals[r] += raw > goal || goal != goal ? 1 : 0;
          totals[kRows + r] += raw == goal ? 1 : 0;
          totals[2 * kRows + r] += raw != raw ? 1 : 0;
        }
      }
    }
    // The bits are of the next tile from here on, and a row's counts another thread's.
    threads_.barrier();
  }

  DHNS_TILE_FN bool counts(const uint32_t* words, int column) const { return !(words[column / 32] >> (column % 32) & 1); }

  DHNS_TILE_FN void consume(int64_t tile, int64_t tiles, const float (&sums)[kSums][kSums]) {
    DHNS_UNROLL for (int i = 0; i < kSums; ++i) {
      const int r = ty_ + i * kTy;
      const int64_t b = row(r);
      const bool inside = b < a_.queries;
      const uint32_t* const words = left_out() + r * kWords;
      if constexpr (kRanks) {
        const float goal = inside ? a_.goal[b] : 0.0f;
        const bool lost = goal != goal;
        // Counts of a row of one tile, in ten bits each.
        int32_t packed = 0;
        DHNS_UNROLL for (int j = 0; j < kSums; ++j) {
          const float raw = -sums[i][j];
          const bool rival = counts(words, tx_ + j * kTx);
          packed += rival && (raw > goal || lost) ? 1 : 0;
          packed += rival && raw == goal ? 1 << 10 : 0;
          packed += rival && raw != raw ? 1 << 20 : 0;
        }
        for (int step = 1; step < kTx; step *= 2) packed += threads_.exchange(packed, step);
        int32_t* const totals = counts_of_rows();
        if (tx_ == 0) totals[r] += packed & 1023, totals[kRows + r] += packed >> 10 & 1023, totals[2 * kRows + r] += packed >> 20;
      } else if constexpr (kConsumer == kMaxima) {
        float greatest = -INFINITY;
        int32_t id = 0x7fffffff;
        DHNS_UNROLL for (int j = 0; j < kSums; ++j) {
          const int column = tx_ + j * kTx;
          const float raw = counts(words, column) && !(sums[i][j] != sums[i][j]) ? -sums[i][j] : -INFINITY;
          if (raw > greatest) greatest = raw, id = static_cast<int32_t>(tile * kColumns + column);
          if (a_.more && inside) a_.more[(b * tiles + tile) * kColumns + column] = raw;
        }
        for (int step = 1; step < kTx; step *= 2) {
          const float other = threads_.exchange(greatest, step);
          const int32_t other_id = threads_.exchange(id, step);
          if (other > greatest || (other == greatest && other_id < id)) greatest = other, id = other_id;
        }
        if (tx_ == 0 && inside) static_cast<int64_t*>(a_.out)[b * tiles + tile] = key_of(greatest, id);
      } else if constexpr (kConsumer == kAgain) {
        if (slot()[r] >= 0) {
          float* const to = a_.more + (b * a_.slots + slot()[r]) * kColumns;
          DHNS_UNROLL for (int j = 0; j < kSums; ++j) {
            const int column = tx_ + j * kTx;
            to[column] = counts(words, column) && !(sums[i][j] != sums[i][j]) ? -sums[i][j] : -INFINITY;
          }
        }
      } else if constexpr (kConsumer == kLogSumExp) {
        float shift = -INFINITY, total = 0;
        float score[kSums];
        DHNS_UNROLL for (int j = 0; j < kSums; ++j) {
          score[j] = tile * kColumns + tx_ + j * kTx < a_.entities ? finish(sums[i][j]) : -INFINITY;
          shift = score[j] > shift || score[j] != score[j] ? score[j] : shift;
        }
        for (int step = 1; step < kTx; step *= 2) {
          const float other = threads_.exchange(shift, step);
          shift = other > shift || other != other ? other : shift;
        }
        const float before = state()[r], here = before > shift || before != before ? before : shift;
        // Where all is −inf so far there is nothing to rescale, and −inf − −inf would be NaN.
        const float safe = here == -INFINITY ? 0.0f : here;
        DHNS_UNROLL for (int j = 0; j < kSums; ++j) total += natural_exponential(score[j] - safe);
        for (int step = 1; step < kTx; step *= 2) total += threads_.exchange(total, step);
        if (tx_ == 0) state()[kRows + r] = state()[kRows + r] * natural_exponential(before - safe) + total, state()[r] = here;
      } else if (inside) {
        DHNS_UNROLL for (int j = 0; j < kSums; ++j) {
          const int64_t column = tile * kColumns + tx_ + j * kTx;
          if (column < a_.entities) a_.more[b * a_.entities + column] = finish(sums[i][j]);
        }
      }
    }
    // What is kept of a row, and the bits, are of the next tile from here on.
    threads_.barrier();
  }

  static DHNS_TILE_FN float finish(float sum) { return kReduction == kL2 ? -std::sqrt(sum) : -sum; }

  DHNS_TILE_FN void end(int64_t i_share) {
    for (int r = threads_.rank(); r < kRows && row(r) < a_.queries; r += kThreads) {
      const int32_t* const counts = counts_of_rows();
      if constexpr (kRanks)
        for (int kind = 0; kind < 3; ++kind)
          static_cast<int32_t*>(a_.out)[(i_share * 3 + kind) * a_.queries + row(r)] = counts[kind * kRows + r];
      if constexpr (kConsumer == kLogSumExp) {
        static_cast<float*>(a_.out)[i_share * a_.queries + row(r)] = state()[r];
        a_.more[i_share * a_.queries + row(r)] = state()[kRows + r];
      }
    }
  }

  const SweepArguments<E>& a_;
  const Threads threads_;
  float* const shared_;
  int tx_, ty_;
  int64_t first_row_ = 0;
};

}  // namespace
}  // namespace dhns::kernels
