#include "binding.h"
#include "noise_cpu.h"

namespace {
using dhns::Tensor;

// out float32 [rows, columns], seed int64 [1], last: the counter word c3.
void philox_normal(Tensor out, const Tensor seed, int64_t last, int64_t row_offset) {
  const int64_t rows = out.size(0), columns = out.size(1);
  const auto key = static_cast<uint64_t>(*dhns::data<int64_t>(seed));
  float* const values = dhns::data<float>(out);
  // A normal takes about a nanosecond: rows enough for some 20 µs a thread.
  const int64_t grain = 1 + 16384 / (columns + 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    dhns::kernels::philox_normal(
        values + begin * columns, key, static_cast<uint32_t>(last), static_cast<uint64_t>(row_offset + begin), end - begin, columns);
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("philox_normal(Tensor(a!) out, Tensor seed, int last, int row_offset) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}
