#pragma once
#include <cstdint>

namespace dhns {

// Of which a partial sum is made, whatever the number of threads: one result.
constexpr int64_t kPowersPerBlock = 4096;

// Σ|x|^exponent, exponent 2 or 3; or its gradient, where `out` is not null.
template <class T>
struct Powers {
  int64_t count, exponent;
  const T* x;
  double* partial;  // [blocks]
  T factor;         // of the gradient
  T* out;           // as x
};

}  // namespace dhns

namespace dhns::kernels {
// Blocks of kPowersPerBlock numbers first .. last − 1.
void power_sum(const Powers<float>& a, int64_t first, int64_t last);
void power_sum(const Powers<double>& a, int64_t first, int64_t last);
}  // namespace dhns::kernels
