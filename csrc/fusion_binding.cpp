#include "binding.h"
#include "fusion_cpu.h"

namespace {
using dhns::data;
using dhns::Tensor;
using Maybe = std::optional<Tensor>;

template <class T>
void run(const dhns::Fusions<T>& a) {
  const int64_t blocks = (a.rows + dhns::kFusedRows - 1) / dhns::kFusedRows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { DHNS_CALL(fuse, a, first, last); });
}

template <class T>
dhns::Fusions<T> inputs(const Tensor& embeddings, const Tensor& attention, const Maybe& present) {
  return {embeddings.size(0), embeddings.size(1), embeddings.size(2), data<T>(embeddings), data<T>(attention), present ? data<bool>(*present) : nullptr,
          nullptr,            nullptr,            nullptr,            nullptr};
}

template <class T>
void fuse_as(const Tensor& embeddings, const Tensor& attention, const Maybe& present, const Tensor& joint) {
  auto a = inputs<T>(embeddings, attention, present);
  a.joint = data<T>(joint);
  run(a);
}

template <class T>
void gradient_as(
    const Tensor& grad, const Tensor& embeddings, const Tensor& attention, const Maybe& present, const Tensor& grad_embeddings,
    const Tensor& partial) {
  auto a = inputs<T>(embeddings, attention, present);
  a.grad = data<T>(grad), a.grad_embeddings = data<T>(grad_embeddings), a.partial = data<double>(partial);
  run(a);
}

bool is_double(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }

void fuse(Tensor embeddings, Tensor attention, Maybe present, Tensor joint) {
  (is_double(joint) ? fuse_as<double> : fuse_as<float>)(embeddings, attention, present, joint);
}

void fuse_gradient(Tensor grad, Tensor embeddings, Tensor attention, Maybe present, Tensor grad_embeddings, Tensor partial) {
  (is_double(grad) ? gradient_as<double> : gradient_as<float>)(grad, embeddings, attention, present, grad_embeddings, partial);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("fuse(Tensor embeddings, Tensor attention, Tensor? present, Tensor(a!) joint) -> ()");
  m.def(
      "fuse_gradient(Tensor grad, Tensor embeddings, Tensor attention, Tensor? present, Tensor(a!) grad_embeddings, Tensor(b!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("fuse", TORCH_BOX(&fuse));
  m.impl("fuse_gradient", TORCH_BOX(&fuse_gradient));
}
