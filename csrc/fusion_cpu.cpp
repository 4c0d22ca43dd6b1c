// Fusion of modalities by attention, see dhns_fast/ops/fusion.py.
//
// A row's modalities are read once for its joint embedding. For the gradients they are read again and the weights made anew: that takes less
// than writing the hyperbolic tangents, which are as large as all modalities together, and reading them back.
#include "fusion_cpu.h"

#include "attention.h"

namespace dhns::kernels {
namespace {

template <class T>
void fuse_blocks(const Fusions<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  const int64_t n = a.dim;
  // What no cache holds until somebody reads it goes past all of them.
  const bool past = a.modalities * a.rows * n * static_cast<int64_t>(sizeof(T)) >= 4 << 20;
  Fusion<T> fusion(a.modalities, n);
  Buffer<T> grad_attention(n);
  for (int64_t block = first; block < last; ++block) {
    std::fill(grad_attention.begin(), grad_attention.end(), T(0));
    for (int64_t row = block * kFusedRows, end = std::min(row + kFusedRows, a.rows); row < end; ++row) {
      fusion.forward(
          [&](int64_t m) { return a.embeddings[m] + row * n; }, a.present ? a.present + row : nullptr, a.rows, a.attention, n);
      if (a.joint) {
        std::copy_n(fusion.joint(), n, a.joint + row * n);
      } else {
        std::copy_n(a.grad + row * n, n, fusion.gradient());
        fusion.backward(a.attention, grad_attention.data(), [&](int64_t m) { return a.grad_embeddings[m] + row * n; }, past);
      }
    }
    if (!a.joint) std::copy(grad_attention.begin(), grad_attention.end(), a.partial + block * n);
  }
  fence();
}

}  // namespace

void fuse(const Fusions<float>& a, int64_t first, int64_t last) { fuse_blocks(a, first, last); }
void fuse(const Fusions<double>& a, int64_t first, int64_t last) { fuse_blocks(a, first, last); }

}  // namespace dhns::kernels
