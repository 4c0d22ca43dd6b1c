// csrc/hal_kernel.cuh with fibers for a block's threads, four a warp: the computation, its barriers and exchanges run where there is no GPU.
#include <algorithm>
#include <deque>

#include "fibers.h"

namespace dhns::kernels {
constexpr int kLanes = 4;

struct Warp {
  explicit Warp(Fibers& fibers) : barrier(fibers, kLanes) {}
  Barrier barrier;
  int64_t held[kLanes] = {};
};

struct Block {
  explicit Block(int warps) : all(fibers, kLanes * warps) {
    for (int i = 0; i < warps; ++i) this->warps.emplace_back(fibers);
  }
  Fibers fibers;
  Barrier all;
  std::deque<Warp> warps;
};

struct Threads {
  int self;
  Block* block;
  int rank() const { return self; }
  int count() const { return kLanes * warps(); }
  int warp() const { return self / kLanes; }
  int warps() const { return static_cast<int>(block->warps.size()); }
  int lane() const { return self % kLanes; }
  static constexpr int lanes() { return kLanes; }
  void barrier() const { block->all.wait(); }
  void warp_barrier() const { block->warps[warp()].barrier.wait(); }
  template <class T>
  T exchange(T x, int step) const {
    Warp& own = block->warps[warp()];
    std::memcpy(&own.held[lane()], &x, sizeof x);
    own.barrier.wait();
    std::memcpy(&x, &own.held[lane() ^ step], sizeof x);
    own.barrier.wait();
    return x;
  }
  template <int kBytes>
  void copy(void* to, const void* from) const { std::memcpy(to, from, kBytes); }
  void commit() const {}
  void wait() const {}
};
}  // namespace dhns::kernels

#include "hal_kernel.cuh"

namespace {
using namespace dhns;

// Barriers that all the blocks went through.
template <class F>
long for_blocks(long blocks, int warps, F f) {
  long barriers = 0;
  for (long index = 0; index < blocks; ++index) {
    kernels::Block block(warps);
    block.fibers.run(kernels::kLanes * warps, [&](int rank) { f(index, kernels::Threads{rank, &block}); });
    barriers += block.all.turns();
  }
  return barriers;
}

template <class T>
long hal_embeddings(const long* sizes, const double* scalars, void* const* pointers, double* partial, long blocks, long kept) {
  typedef const T* In;
  HalEmbeddings<T> a{
      sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], blocks, (sizes[1] + blocks - 1) / blocks, sizes[6] != 0, T(scalars[0]),
      T(scalars[1]), In(pointers[0]), In(pointers[1]), In(pointers[2]), In(pointers[3]), In(pointers[4]),
      In(pointers[5]), In(pointers[6]), In(pointers[7]), static_cast<const bool*>(pointers[8]), static_cast<const bool*>(pointers[9]),
      static_cast<T*>(pointers[10]), static_cast<T*>(pointers[11]), static_cast<T*>(pointers[12]), partial, sizes[7]};
  long barriers = 0;
  kernels::with_interaction(a.interaction, [&](auto one) {
    using I = typename decltype(one)::type;
    const int warps = (kernels::hal_threads<T>(a.dim, I::kParts) + kernels::kLanes - 1) / kernels::kLanes;
    a.kept = std::min<int64_t>(kept, kernels::hal_vectors(a));
    const int64_t tables = kernels::HalTables(a.levels, a.modalities, a.attention, a.normalize).numbers(warps) * int64_t(sizeof(T));
    const int64_t bytes = (tables + 15) / 16 * 16 + a.kept * I::kParts * 16 * kernels::kLanes * warps;
    struct alignas(16) Line {
      double at[2];
    };
    std::vector<Line> shared(bytes / 16 + 1);
    barriers = for_blocks(blocks, warps, [&](long index, kernels::Threads threads) {
      if (threads.rank() == 0) std::fill(shared.begin(), shared.end(), Line{{NAN, NAN}});
      threads.barrier();
      const auto bytes = reinterpret_cast<unsigned char*>(shared.data());
      a.attention ? kernels::Row<I, T, T, true>(a, bytes, threads).block(index) : kernels::Row<I, T, T, false>(a, bytes, threads).block(index);
    });
  });
  return barriers - blocks;
}
}  // namespace

extern "C" long hal_embeddings_double(const long* sizes, const double* scalars, void* const* pointers, double* partial, long blocks, long kept) {
  return hal_embeddings<double>(sizes, scalars, pointers, partial, blocks, kept);
}
extern "C" long hal_embeddings_float(const long* sizes, const double* scalars, void* const* pointers, double* partial, long blocks, long kept) {
  return hal_embeddings<float>(sizes, scalars, pointers, partial, blocks, kept);
}
extern "C" long hal_table_numbers(long levels, long modalities, bool attention, bool normalize, long warps) {
  return kernels::HalTables(levels, modalities, attention, normalize).numbers(warps);
}

extern "C" void hal_scores(const long* sizes, double mu, void* const* pointers, long blocks, int warps) {
  typedef const double* In;
  typedef double* Out;
  const HalScores<double> a{sizes[0], sizes[1], sizes[2], mu, In(pointers[0]), In(pointers[1]), In(pointers[2]), In(pointers[3]),
                            Out(pointers[4]), Out(pointers[5]), Out(pointers[6])};
  std::vector<double> scratch(warps, NAN);
  for_blocks(blocks, warps, [&](long index, kernels::Threads threads) {
    kernels::Scores<double>(a, scratch.data(), threads).block(index, (a.batch + blocks - 1) / blocks);
  });
}

extern "C" void self_adversarial(const long* sizes, double temperature, void* const* pointers) {
  typedef const double* In;
  typedef double* Out;
  const SelfAdversarial<double> a{
      sizes[0], sizes[1], temperature, In(pointers[0]), In(pointers[1]), Out(pointers[2]), Out(pointers[3]), Out(pointers[4])};
  for_blocks(a.batch, 1, [&](long b, kernels::Threads threads) { kernels::self_adversarial_row(a, b, threads); });
}
