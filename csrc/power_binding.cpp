#include "binding.h"
#include "power_cpu.h"

namespace {
using dhns::data;
using dhns::is_double;
using dhns::Tensor;

template <class T>
void run(const dhns::Powers<T>& a) {
  const int64_t blocks = (a.count + dhns::kPowersPerBlock - 1) / dhns::kPowersPerBlock;
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) { dhns::kernels::power_sum(a, first, last); });
}

template <class T>
void sum_as(const Tensor& x, int64_t exponent, const Tensor& partial) {
  run<T>({x.numel(), exponent, data<T>(x), data<double>(partial), T(0), nullptr});
}

template <class T>
void gradient_as(const Tensor& x, int64_t exponent, double factor, const Tensor& out) {
  run<T>({x.numel(), exponent, data<T>(x), nullptr, static_cast<T>(factor), data<T>(out)});
}

void power_sum(Tensor x, int64_t exponent, Tensor partial) { (is_double(x) ? sum_as<double> : sum_as<float>)(x, exponent, partial); }

void power_gradient(Tensor x, int64_t exponent, double factor, Tensor out) {
  (is_double(x) ? gradient_as<double> : gradient_as<float>)(x, exponent, factor, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("power_sum(Tensor x, int exponent, Tensor(a!) partial) -> ()");
  m.def("power_gradient(Tensor x, int exponent, float factor, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("power_sum", TORCH_BOX(&power_sum));
  m.impl("power_gradient", TORCH_BOX(&power_gradient));
}
