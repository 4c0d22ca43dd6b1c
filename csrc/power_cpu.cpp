// Sums of powers of a whole table and their gradients, see dhns_fast/ops/power.py: memory is read once for either, and the gradient goes past the
// caches.
#include "power_cpu.h"

#include <algorithm>

#include "vectors.h"

namespace dhns::kernels {
namespace {

template <bool kCube, class T>
void block(const T* x, int64_t n, double& partial) {
  Sum<T> sum;
  each<T>(n, [&](int64_t i, auto v) {
    const auto y = load_as<decltype(v)>(x + i);
    sum.add(kCube ? y * y * absolute(y) : y * y);
  });
  partial = sum.total();
}

template <bool kCube, class T>
void gradient(const T* x, int64_t n, T factor, T* out) {
  write(out, n, true, [&](int64_t i, auto v) {
    const auto y = load_as<decltype(v)>(x + i);
    return kCube ? factor * 3 * y * absolute(y) : factor * 2 * y;
  });
}

template <class T>
void blocks(const Powers<T>& a, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = b * kPowersPerBlock, n = std::min(kPowersPerBlock, a.count - begin);
    if (a.out)
      (a.exponent == 3 ? gradient<true, T> : gradient<false, T>)(a.x + begin, n, a.factor, a.out + begin);
    else
      (a.exponent == 3 ? block<true, T> : block<false, T>)(a.x + begin, n, a.partial[b]);
  }
  fence();
}

}  // namespace

void power_sum(const Powers<float>& a, int64_t first, int64_t last) { blocks(a, first, last); }
void power_sum(const Powers<double>& a, int64_t first, int64_t last) { blocks(a, first, last); }

}  // namespace dhns::kernels
