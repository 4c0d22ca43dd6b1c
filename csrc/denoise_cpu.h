#pragma once
#include <cstdint>

namespace dhns {

// One side of the sampler: what fixes its condition, its start and its noise. N rows = modalities · batch; null pointers mean drawn noise.
struct DenoiseSide {
  const float* condition;  // [N, D]
  const float* start;      // [N, D]
  const float* noise;      // [T − 1, N, D], entry 0 for t = T
  float* const* out;       // a pointer [N, D] for each level
  uint32_t start_stream, noise_stream;
};

// A folded weight [n, k] by what it is made of: rows of `weight`, `stride` apart, times scale [k], less shift [n].
struct Factored {
  const float *weight, *scale, *shift;
  int64_t stride, n, k;
  float operator()(int64_t i, int64_t j) const { return weight[i * stride + j] * scale[j] - shift[i]; }
};

// What the operands of a chain's products are: float32 as it is or as digits (digits.h), bfloat16 as rounded floats or as itself (bf16_cpu.h).
enum class Form { kFloats, kDigits, kRounded, kHalves };

// A call of the sampler (dhns_fast/diffusion/folding.py has the formulas).
struct Denoise {
  int64_t D, T, N, batch;
  const float *state, *output;                  // Vx [4D, D] and G [D, 4D], packed
  Factored fixed;                               // Vc [4D, D]
  const float *time, *time_mean, *time_var;     // [T, 4D], [T], [T]
  const float *bias1, *bias2;                   // [4D], [D]
  const double *mean_scale, *noise_scale, *sigma;  // [T]
  const double *slope, *width;                     // [T] both, or null: between which lines of x the predicted noise stays
  const int64_t* levels;                        // [count]
  int64_t count, last;                          // last: the least level
  uint64_t seed, row_offset;
  bool release;
  Form form;
  DenoiseSide tail, head;
};
}  // namespace dhns

namespace dhns::kernels {
// What this processor multiplies fastest.
Form best_form(bool bf16);
// Whether rows first .. last − 1 of a weight are fit for digits: of numbers of one order, so that those share a scale.
bool even(const Factored& weight, int64_t first, int64_t last);
// Columns of a packed panel, and floats of memory that one of depth k takes.
int64_t panel();
int64_t packed_panel(int64_t k, Form form);
// Rows that a block should be a multiple of.
int64_t tile_rows(Form form);
// Panels first .. last − 1 of a weight, in the form that products read.
void pack(float* out, const Factored& weight, int64_t first, int64_t last, Form form);
// Floats of scratch memory that denoise_block needs for so many rows.
int64_t scratch(int64_t D, int64_t rows, Form form, bool release);
// The whole chain of rows begin .. end − 1. A row's result does not depend on the block it is in.
void denoise_block(const Denoise& call, int64_t begin, int64_t end, float* memory);
}  // namespace dhns::kernels
