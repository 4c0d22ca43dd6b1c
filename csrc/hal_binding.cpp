#include "hal_arguments.h"

namespace {
struct OnCpu {
  using Narrow = float;  // the operator widens what is narrower

  template <class T>
  static void run(const dhns::HalEmbeddings<T>& a, const dhns::Tensor&) {
    torch::stable::parallel_for(0, a.blocks, 1, [&](int64_t first, int64_t last) { dhns::kernels::hal_embeddings(a, first, last); });
  }
  template <class T>
  static void run(const dhns::HalScores<T>& a, int64_t blocks, const dhns::Tensor&) {
    torch::stable::parallel_for(0, blocks, 8, [&](int64_t first, int64_t last) { dhns::kernels::hal_scores(a, first, last); });
  }
  template <class T>
  static void run(const dhns::SelfAdversarial<T>& a, const dhns::Tensor&) {
    // Some 5 ns a score: rows enough for 20 µs a thread.
    torch::stable::parallel_for(
        0, a.batch, 1 + 4096 / a.corruptions, [&](int64_t first, int64_t last) { dhns::kernels::self_adversarial(a, first, last); });
  }
};
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def(
      "hal_embeddings(int interaction, Tensor head, Tensor relation, Tensor tail, Tensor neg_head, Tensor neg_tail, Tensor margin, "
      "Tensor weight, float mu, float gamma, Tensor? attention, bool normalize, Tensor? head_present, Tensor? tail_present, "
      "Tensor(a!)? grad_head, Tensor(b!)? grad_relation, Tensor(c!)? grad_tail, Tensor(d!) partial) -> ()");
  m.def(
      "hal_scores(Tensor positive, Tensor negative, Tensor margin, Tensor weight, float mu, Tensor(a!) grad_positive, "
      "Tensor(b!) grad_negative, Tensor(c!) partial) -> ()");
  m.def(
      "self_adversarial(Tensor positive, Tensor negative, float temperature, Tensor(a!) grad_positive, Tensor(b!) grad_negative, "
      "Tensor(c!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("hal_embeddings", TORCH_BOX(&dhns::hal_embeddings<OnCpu>));
  m.impl("hal_scores", TORCH_BOX(&dhns::hal_scores<OnCpu>));
  m.impl("self_adversarial", TORCH_BOX(&dhns::self_adversarial<OnCpu>));
}
