#include <optional>

#include "binding.h"
#include "hal_cpu.h"

namespace {
using dhns::data;
using dhns::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
T* data_or_null(const Optional& x) {
  return x ? data<T>(*x) : nullptr;
}

bool is_double(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }

template <class T>
void hal_embeddings_as(
    int64_t interaction, const Tensor& head, const Tensor& relation, const Tensor& tail, const Tensor& neg_head, const Tensor& neg_tail,
    const Tensor& margin, const Tensor& weight, double mu, double gamma, const Optional& attention, bool normalize,
    const Optional& head_present, const Optional& tail_present, const Optional& grad_head, const Optional& grad_relation,
    const Optional& grad_tail, const Tensor& partial) {
  const dhns::HalEmbeddings<T> a{
      interaction, relation.size(0), neg_head.size(3), relation.size(1), neg_head.size(0), neg_head.size(1), normalize,
      static_cast<T>(mu), static_cast<T>(gamma), data<T>(head), data<T>(relation), data<T>(tail), data<T>(neg_head), data<T>(neg_tail),
      data<T>(margin), data<T>(weight), data_or_null<T>(attention), data_or_null<bool>(head_present), data_or_null<bool>(tail_present),
      data_or_null<T>(grad_head), data_or_null<T>(grad_relation), data_or_null<T>(grad_tail), data<double>(partial)};
  torch::stable::parallel_for(0, partial.size(0), 1, [&](int64_t first, int64_t last) { DHNS_CALL(hal_embeddings, a, first, last); });
}

void hal_embeddings(
    int64_t interaction, Tensor head, Tensor relation, Tensor tail, Tensor neg_head, Tensor neg_tail, Tensor margin, Tensor weight, double mu,
    double gamma, Optional attention, bool normalize, Optional head_present, Optional tail_present, Optional grad_head,
    Optional grad_relation, Optional grad_tail, Tensor partial) {
  (is_double(head) ? hal_embeddings_as<double> : hal_embeddings_as<float>)(
      interaction, head, relation, tail, neg_head, neg_tail, margin, weight, mu, gamma, attention, normalize, head_present, tail_present,
      grad_head, grad_relation, grad_tail, partial);
}

template <class T>
void hal_scores_as(
    const Tensor& positive, const Tensor& negative, const Tensor& margin, const Tensor& weight, double mu, const Tensor& grad_positive,
    const Tensor& grad_negative, const Tensor& partial) {
  const dhns::HalScores<T> a{positive.size(0), negative.size(0), negative.size(1), static_cast<T>(mu), data<T>(positive), data<T>(negative),
                             data<T>(margin), data<T>(weight), data<T>(grad_positive), data<T>(grad_negative), data<double>(partial)};
  torch::stable::parallel_for(0, partial.size(0), 8, [&](int64_t first, int64_t last) { DHNS_CALL(hal_scores, a, first, last); });
}

void hal_scores(
    Tensor positive, Tensor negative, Tensor margin, Tensor weight, double mu, Tensor grad_positive, Tensor grad_negative, Tensor partial) {
  (is_double(positive) ? hal_scores_as<double> : hal_scores_as<float>)(
      positive, negative, margin, weight, mu, grad_positive, grad_negative, partial);
}

template <class T>
void self_adversarial_as(
    const Tensor& positive, const Tensor& negative, double temperature, const Tensor& grad_positive, const Tensor& grad_negative,
    const Tensor& partial) {
  const dhns::SelfAdversarial<T> a{positive.size(0), negative.size(1), static_cast<T>(temperature), data<T>(positive), data<T>(negative),
                                   data<T>(grad_positive), data<T>(grad_negative), data<double>(partial)};
  // Some 5 ns a score: rows enough for 20 µs a thread.
  torch::stable::parallel_for(0, a.batch, 1 + 4096 / a.corruptions, [&](int64_t first, int64_t last) { DHNS_CALL(self_adversarial, a, first, last); });
}

void self_adversarial(Tensor positive, Tensor negative, double temperature, Tensor grad_positive, Tensor grad_negative, Tensor partial) {
  (is_double(positive) ? self_adversarial_as<double> : self_adversarial_as<float>)(
      positive, negative, temperature, grad_positive, grad_negative, partial);
}
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
  m.impl("hal_embeddings", TORCH_BOX(&hal_embeddings));
  m.impl("hal_scores", TORCH_BOX(&hal_scores));
  m.impl("self_adversarial", TORCH_BOX(&self_adversarial));
}
