#pragma once
#include <cstdint>

namespace dhns::kernels {
// Normals of rows row .. row + rows − 1 into out [rows, columns]; last is the counter word c3.
void philox_normal(float* out, uint64_t seed, uint32_t last, uint64_t row, int64_t rows, int64_t columns);
}  // namespace dhns::kernels
