// csrc/score_kernel.cuh with four fibers for a block's 256 threads: the computation, its barriers and exchanges run where there is no GPU.
#include <cmath>
#include <cstring>
#include <vector>

#include "fibers.h"

#include "score_kernel.cuh"

namespace {
using namespace dhns;
using namespace dhns::kernels;
constexpr int kTx = 2, kTy = 2, kCount = kTx * kTy;

struct Block {
  Fibers fibers;
  Barrier all{fibers, kCount};
  int64_t held[kCount] = {};
  bool flags[kCount] = {};
  void wait() { all.wait(); }
};

struct Threads {
  int self;
  Block* block;
  int rank() const { return self; }
  void barrier() const { block->wait(); }
  bool any(bool x) const {
    block->flags[self] = x;
    block->wait();
    bool found = false;
    for (bool flag : block->flags) found |= flag;
    block->wait();
    return found;
  }
  template <class T>
  T exchange(T x, int step) const {
    std::memcpy(&block->held[self], &x, sizeof x);
    block->wait();
    std::memcpy(&x, &block->held[self ^ step], sizeof x);
    block->wait();
    return x;
  }
  void copy16(void* to, const void* from, int bytes) const {
    std::memset(to, 0, 16);
    std::memcpy(to, from, bytes);
  }
  void commit() const {}
  void wait() const {}
};

template <int64_t kReduction, int64_t kConsumer, bool kScaled>
void run(const SweepArguments<float>& a, int64_t shares) {
  const int64_t rows = kSums * kTy;
  for (int64_t block = 0; block * rows < a.queries; ++block)
    for (int64_t share = 0; share < shares; ++share) {
      std::vector<Pack<double, 2>> shared(sweep_shared_bytes<float, kScaled, kTx, kTy>() / 16 + 1, {NAN, NAN});
      Block state;
      state.fibers.run(kCount, [&](int self) {
        Sweep<Threads, float, kReduction, kConsumer, kScaled, kTx, kTy>(a, shared.data(), {self, &state}).run(block, share);
      });
    }
}

template <int64_t kReduction, bool kScaled>
void run_consumer(int64_t consumer, const SweepArguments<float>& a, int64_t shares) {
  switch (consumer) {
    case kRank: return run<kReduction, kRank, kScaled>(a, shares);
    case kMaxima: return run<kReduction, kMaxima, kScaled>(a, shares);
    case kAgain: return run<kReduction, kAgain, kScaled>(a, shares);
    case kLogSumExp: return run<kReduction, kLogSumExp, kScaled>(a, shares);
    case kScores: return run<kReduction, kScores, kScaled>(a, shares);
    case kDoubt:
      if constexpr (kReduction == kL2 && !kScaled) run<kL2, kDoubt, false>(a, shares);
  }
}

template <bool kScaled>
void run_reduction(int64_t reduction, int64_t consumer, const SweepArguments<float>& a, int64_t shares) {
  switch (reduction) {
    case kL1: return run_consumer<kL1, kScaled>(consumer, a, shares);
    case kL2: return run_consumer<kL2, kScaled>(consumer, a, shares);
    case kComplexL1: return run_consumer<kComplexL1, kScaled>(consumer, a, shares);
  }
}

template <bool kScaled>
float pair(long reduction, const float* q, const float* s, const float* e, long dim) {
  switch (reduction) {
    case kL1: return pair_score<kL1, kScaled>(q, s, e, dim);
    case kL2: return pair_score<kL2, kScaled>(q, s, e, dim);
    default: return pair_score<kComplexL1, kScaled>(q, s, e, dim);
  }
}
}  // namespace

// sizes: queries, entities, dim, base, shares, slots. pointers: query, scale, entity, offsets, ids, target, slot, goal, out, more.
extern "C" void distance_sweep(long reduction, long consumer, const long* sizes, void* const* p) {
  typedef const float* In;
  typedef const int64_t* Ids;
  const int64_t tiles = (sizes[1] + kSums * kTx - 1) / (kSums * kTx);
  const bool aligned = sizes[2] / (reduction == kComplexL1 ? 2 : 1) % 4 == 0;
  const SweepArguments<float> a{
      aligned, sizes[0], sizes[1], sizes[2], sizes[3], (tiles + sizes[4] - 1) / sizes[4], sizes[5], In(p[0]), In(p[1]), In(p[2]), Ids(p[3]),
      Ids(p[4]), Ids(p[5]), static_cast<const int32_t*>(p[6]), In(p[7]), p[8], static_cast<float*>(p[9])};
  a.scale ? run_reduction<true>(reduction, consumer, a, sizes[4]) : run_reduction<false>(reduction, consumer, a, sizes[4]);
}

extern "C" void distance_targets(long reduction, const long* sizes, void* const* p) {
  const auto q = static_cast<const float*>(p[0]), s = static_cast<const float*>(p[1]), e = static_cast<const float*>(p[2]);
  const auto target = static_cast<const int64_t*>(p[3]);
  for (long b = 0; b < sizes[0]; ++b) {
    const long at = b * sizes[1];
    static_cast<float*>(p[4])[b] =
        s ? pair<true>(reduction, q + at, s + at, e + target[b] * sizes[1], sizes[1]) : pair<false>(reduction, q + at, q, e + target[b] * sizes[1], sizes[1]);
  }
}
