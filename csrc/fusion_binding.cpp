#include <optional>
#include <vector>

#include "binding.h"
#include "fusion_cpu.h"

namespace {
using dhns::data;
using dhns::is_double;
using dhns::Tensor;
using Maybe = std::optional<Tensor>;

template <class T>
void run(const dhns::Fusions<T>& a) {
  const int64_t blocks = (a.rows + dhns::kFusedRows - 1) / dhns::kFusedRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { dhns::kernels::fuse(a, first, last); });
}

using Tensors = std::vector<Tensor>;

template <class T>
std::vector<T*> pointers(const Tensors& tensors) {
  std::vector<T*> out;
  for (const Tensor& x : tensors) out.push_back(data<T>(x));
  return out;
}

template <class T>
void fuse_as(const Tensors& embeddings, const Tensor& attention, const Maybe& present, const Tensor& joint) {
  const auto from = pointers<T>(embeddings);
  run<T>(
      {static_cast<int64_t>(from.size()), joint.size(0), joint.size(1), from.data(), data<T>(attention), present ? data<bool>(*present) : nullptr,
       data<T>(joint), nullptr, nullptr, nullptr});
}

template <class T>
void gradient_as(
    const Tensor& grad, const Tensors& embeddings, const Tensor& attention, const Maybe& present, const Tensors& by_embeddings,
    const Tensor& partial) {
  const auto from = pointers<T>(embeddings), to = pointers<T>(by_embeddings);
  run<T>(
      {static_cast<int64_t>(from.size()), grad.size(0), grad.size(1), from.data(), data<T>(attention), present ? data<bool>(*present) : nullptr,
       nullptr, data<T>(grad), to.data(), data<double>(partial)});
}

void fuse(Tensors embeddings, Tensor attention, Maybe present, Tensor joint) {
  (is_double(joint) ? fuse_as<double> : fuse_as<float>)(embeddings, attention, present, joint);
}

void fuse_gradient(Tensor grad, Tensors embeddings, Tensor attention, Maybe present, Tensors by_embeddings, Tensor partial) {
  (is_double(grad) ? gradient_as<double> : gradient_as<float>)(grad, embeddings, attention, present, by_embeddings, partial);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("fuse(Tensor[] embeddings, Tensor attention, Tensor? present, Tensor(a!) joint) -> ()");
  m.def(
      "fuse_gradient(Tensor grad, Tensor[] embeddings, Tensor attention, Tensor? present, Tensor(a!)[] by_embeddings, Tensor(b!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("fuse", TORCH_BOX(&fuse));
  m.impl("fuse_gradient", TORCH_BOX(&fuse_gradient));
}
