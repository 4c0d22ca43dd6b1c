// The losses as operators: their arguments, once for C++ and for CUDA. `On` is what runs them:
//   On::run(HalEmbeddings<S, T>, head), On::run(HalScores<T>, blocks, positive), On::run(SelfAdversarial<T>, positive), and On::Narrow, the type of
//   narrow tensors that it reads (float where it reads none).
#pragma once

#include <optional>

#include "binding.h"
#include "hal_cpu.h"

namespace dhns {
using Optional = std::optional<Tensor>;

template <class T>
T* data_or_null(const Optional& x) {
  return x ? data<T>(*x) : nullptr;
}

// Calls f(S, T) with numbers of the type in memory and of the type of the arithmetic.
template <class Narrow, class F>
void with_types(const Tensor& x, F f) {
  using torch::headeronly::ScalarType;
  const auto type = x.scalar_type();
  if (type == ScalarType::Double) return f(double(), double());
  if (type == ScalarType::BFloat16) return f(Narrow(), float());
  f(float(), float());
}

template <class On>
void hal_embeddings(
    int64_t interaction, Tensor head, Tensor relation, Tensor tail, Tensor neg_head, Tensor neg_tail, Tensor margin, Tensor weight, double mu,
    double gamma, Optional attention, bool normalize, Optional head_present, Optional tail_present, Optional grad_head,
    Optional grad_relation, Optional grad_tail, Tensor partial) {
  with_types<typename On::Narrow>(head, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const int64_t batch = relation.size(0), blocks = partial.size(0);
    const HalEmbeddings<S, T> a{
        interaction, batch, neg_head.size(3), relation.size(1), neg_head.size(0), neg_head.size(1), blocks, (batch + blocks - 1) / blocks,
        normalize, static_cast<T>(mu), static_cast<T>(gamma), data<S>(head), data<S>(relation), data<S>(tail), data<S>(neg_head),
        data<S>(neg_tail), data<T>(margin), data<T>(weight), data_or_null<S>(attention), data_or_null<bool>(head_present),
        data_or_null<bool>(tail_present), data_or_null<T>(grad_head), data_or_null<T>(grad_relation), data_or_null<T>(grad_tail),
        data<double>(partial), partial.size(1)};
    On::run(a, head);
  });
}

template <class On>
void hal_scores(
    Tensor positive, Tensor negative, Tensor margin, Tensor weight, double mu, Tensor grad_positive, Tensor grad_negative, Tensor partial) {
  with_types<float>(positive, [&](auto, auto t) {
    using T = decltype(t);
    const HalScores<T> a{
        positive.size(0), negative.size(0), negative.size(1), static_cast<T>(mu), data<T>(positive), data<T>(negative), data<T>(margin),
        data<T>(weight), data<T>(grad_positive), data<T>(grad_negative), data<double>(partial)};
    On::run(a, partial.size(0), positive);
  });
}

template <class On>
void self_adversarial(Tensor positive, Tensor negative, double temperature, Tensor grad_positive, Tensor grad_negative, Tensor partial) {
  with_types<float>(positive, [&](auto, auto t) {
    using T = decltype(t);
    const SelfAdversarial<T> a{
        positive.size(0), negative.size(1), static_cast<T>(temperature), data<T>(positive), data<T>(negative), data<T>(grad_positive),
        data<T>(grad_negative), data<double>(partial)};
    On::run(a, positive);
  });
}
}  // namespace dhns
