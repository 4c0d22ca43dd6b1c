// csrc/hal_kernel.cuh with ordinary threads for a block's: the computation and its barriers run where there is no GPU.
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#define DHNS_LEVEL emulated

namespace dhns::DHNS_LEVEL {
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const long turn = turn_;
    if (++waiting_ == count_) {
      waiting_ = 0, ++turn_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int count_, waiting_ = 0;
  long turn_ = 0;
};

struct Threads {  // warps of one thread
  int self, size;
  Barrier* all;
  int rank() const { return self; }
  int count() const { return size; }
  int warp() const { return self; }
  int warps() const { return size; }
  int lane() const { return 0; }
  int lanes() const { return 1; }
  bool is_first_of_warp() const { return true; }
  void barrier() const { all->wait(); }
  template <class T>
  T warp_sum(T x) const { return x; }
  template <class T>
  T warp_max(T x) const { return x; }
};
}  // namespace dhns::DHNS_LEVEL

#include "hal_kernel.cuh"

namespace {
using namespace dhns;

template <class I, class T>
void run(const HalEmbeddings<T>& a, long blocks, int threads) {
  std::vector<T> shared(emulated::hal_shared_bytes<T>(a.dim, a.modalities, threads) / sizeof(T), T(NAN));
  for (long block = 0; block < blocks; ++block) {
    emulated::Barrier barrier(threads);
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; ++rank)
      team.emplace_back([&, rank] { emulated::Row<I, T, T>(a, shared.data(), {rank, threads, &barrier}).block(block); });
    for (auto& thread : team) thread.join();
  }
}
}  // namespace

extern "C" void hal_embeddings(
    long interaction, const long* sizes, const double* scalars, void* const* pointers, double* partial, long blocks, int threads) {
  typedef const double* In;
  const HalEmbeddings<double> a{
      interaction, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], blocks, (sizes[0] + blocks - 1) / blocks, sizes[5] != 0, scalars[0],
      scalars[1], In(pointers[0]), In(pointers[1]), In(pointers[2]), In(pointers[3]), In(pointers[4]),
      In(pointers[5]), In(pointers[6]), In(pointers[7]), static_cast<const bool*>(pointers[8]), static_cast<const bool*>(pointers[9]),
      static_cast<double*>(pointers[10]), static_cast<double*>(pointers[11]), static_cast<double*>(pointers[12]), partial};
  emulated::with_interaction(interaction, [&](auto one) { run<typename decltype(one)::type>(a, blocks, threads); });
}

extern "C" void hal_scores(const long* sizes, double mu, void* const* pointers, long blocks, int threads) {
  typedef const double* In;
  typedef double* Out;
  const HalScores<double> a{sizes[0], sizes[1], sizes[2], mu, In(pointers[0]), In(pointers[1]), In(pointers[2]), In(pointers[3]),
                            Out(pointers[4]), Out(pointers[5]), Out(pointers[6])};
  std::vector<double> scratch(threads, NAN);
  for (long block = 0; block < blocks; ++block) {
    emulated::Barrier barrier(threads);
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; ++rank)
      team.emplace_back([&, rank] {
        emulated::Scores<double>(a, scratch.data(), {rank, threads, &barrier}).block(block, (a.batch + blocks - 1) / blocks);
      });
    for (auto& thread : team) thread.join();
  }
}

extern "C" void self_adversarial(const long* sizes, double temperature, void* const* pointers) {
  typedef const double* In;
  typedef double* Out;
  const SelfAdversarial<double> a{
      sizes[0], sizes[1], temperature, In(pointers[0]), In(pointers[1]), Out(pointers[2]), Out(pointers[3]), Out(pointers[4])};
  for (long b = 0; b < a.batch; ++b) emulated::self_adversarial_row(a, b, {0, 1, nullptr});
}
