#pragma once
#include <cstdint>

namespace dhns {

// Of which a partial sum of the attention's gradient is made, whatever the number of threads: one result.
constexpr int64_t kFusedRows = 64;

// Modalities, each [n, D], fused to [n, D]; present [M, n] or null. For the gradients `joint` is null, and what follows it is set.
template <class T>
struct Fusions {
  int64_t modalities, rows, dim;
  const T* const* embeddings;  // [M]
  const T* attention;          // [D]
  const bool* present;
  T* joint;
  const T* grad;              // of joint
  T* const* grad_embeddings;  // [M]
  double* partial;            // [blocks, D], of the attention
};

}  // namespace dhns

namespace dhns::kernels {
// Blocks of kFusedRows rows first .. last − 1.
void fuse(const Fusions<float>& a, int64_t first, int64_t last);
void fuse(const Fusions<double>& a, int64_t first, int64_t last);
}  // namespace dhns::kernels
