// Linear views of features, see dhns_fast/ops/project.py.
#include <algorithm>

#include "product.h"

namespace {
using dhns::data;
using dhns::Product;
using dhns::Tensor;
using Maybe = std::optional<Tensor>;

// Whether all are rows of a table of so many; where they are not, nothing is written.
bool inside(const Maybe& ids, int64_t rows) {
  if (!ids) return true;
  const auto* const id = data<int64_t>(*ids);
  return std::all_of(id, id + ids->numel(), [=](int64_t i) { return i >= 0 && i < rows; });
}

const int64_t* places(const Maybe& ids) { return ids ? data<int64_t>(*ids) : nullptr; }

template <class T>
void project_as(const Tensor& features, const Maybe& ids, const Tensor& weight, const Tensor& bias, const Tensor& out) {
  const int64_t K = weight.size(0), D = weight.size(1);
  dhns::add_product<T>(
      {data<T>(features), places(ids), nullptr, data<T>(bias), out.size(0), K, D, K, false, false, data<T>(out), nullptr}, data<T>(weight));
}

// weight [K, D], the transpose of what the operator takes.
bool project(Tensor features, Maybe ids, Tensor weight, Tensor bias, Tensor out) {
  if (!inside(ids, features.size(0))) return false;
  if (out.size(0)) (dhns::is_double(out) ? project_as<double> : project_as<float>)(features, ids, weight, bias, out);
  return true;
}

template <class T>
void by_weight_as(const Tensor& grad, const Tensor& features, const Maybe& ids, const Tensor& by_weight, const Tensor& by_bias) {
  const int64_t n = grad.size(0), D = grad.size(1), K = features.size(1);
  dhns::add_product<T>(
      {data<T>(grad), nullptr, nullptr, nullptr, D, n, K, D, true, false, data<T>(by_weight), data<T>(by_bias)}, data<T>(features), places(ids));
}

// by_weight [D, K]; by_bias [D], zeros before.
bool project_by_weight(Tensor grad, Tensor features, Maybe ids, Tensor by_weight, Tensor by_bias) {
  if (!inside(ids, features.size(0))) return false;
  if (grad.size(0)) (dhns::is_double(grad) ? by_weight_as<double> : by_weight_as<float>)(grad, features, ids, by_weight, by_bias);
  return true;
}

template <class T>
void by_rows_as(const Tensor& grad, const Tensor& weight, const Tensor& out) {
  const int64_t n = grad.size(0), D = grad.size(1), K = weight.size(1);
  dhns::add_product<T>({data<T>(grad), nullptr, nullptr, nullptr, n, D, K, D, false, false, data<T>(out), nullptr}, data<T>(weight));
}

// out [n, K] of the looked-up rows, weight [D, K].
void project_by_rows(Tensor grad, Tensor weight, Tensor out) {
  if (grad.size(0)) (dhns::is_double(grad) ? by_rows_as<double> : by_rows_as<float>)(grad, weight, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("project(Tensor features, Tensor? ids, Tensor weight, Tensor bias, Tensor(a!) out) -> bool");
  m.def("project_by_weight(Tensor grad, Tensor features, Tensor? ids, Tensor(a!) by_weight, Tensor(b!) by_bias) -> bool");
  m.def("project_by_rows(Tensor grad, Tensor weight, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_by_weight", TORCH_BOX(&project_by_weight));
  m.impl("project_by_rows", TORCH_BOX(&project_by_rows));
}
