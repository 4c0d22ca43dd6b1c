// Counter-based normals, float32 [rows, columns]: Philox-4x32-10 (Salmon et al., SC 2011) and Box–Muller, see dhns_fast/ops/noise.py.
// Plain loops over a chunk of counters, which the compiler turns into vectors of the level at hand: the integer rounds, then the
// logarithm and the sine and cosine as polynomials.
#include "noise_cpu.h"
#include "philox.h"
#include "vector_math.h"

namespace dhns::kernels {
namespace {

// ln(n·2⁻²⁴) for n in 1 .. 2²⁴. n is exact in float, so that the result keeps its relative accuracy next to ln 1, where the radius is small.
inline float log_unit(uint32_t n) {
  const float x = static_cast<float>(static_cast<int32_t>(n));
  const int32_t exponent = exponent_of(x);
  return log_from_parts(scaled_down(x, exponent) - 1.0f, static_cast<float>(exponent - 24));
}

// cos(2πu) and sin(2πu) for u = n·2⁻²⁴: quarter turns and a rest within an eighth, split on the integer and therefore exactly.
inline void cos_sin_turn(int32_t n, float& cosine, float& sine) {
  const int32_t quarter = (n + (1 << 21)) >> 22;
  const float x = static_cast<float>(n - (quarter << 22)) * 3.7450704e-7f;  // (π/2)·2⁻²²
  const float z = x * x, s = sine_of_eighth(x, z), c = cosine_of_eighth(z);
  const bool odd = quarter & 1;
  const float a = odd ? s : c, b = odd ? c : s;
  cosine = (quarter + 1) & 2 ? -a : a;
  sine = quarter & 2 ? -b : b;
}

inline void box_muller_chunk(const uint32_t* first, const uint32_t* second, int groups, float* cosine, float* sine) {
  for (const float* const end = cosine + groups * kGroup; cosine < end; first += kGroup, second += kGroup, cosine += kGroup, sine += kGroup) {
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      const float radius = std::sqrt(-2.0f * log_unit((first[i] >> 8) + 1));
      float c, s;
      cos_sin_turn(static_cast<int32_t>(second[i] >> 8), c, s);
      cosine[i] = radius * c;
      sine[i] = radius * s;
    }
  }
}

inline void interleave(const float (&normals)[4][kChunk], int count, float* out) {
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < 4; ++k) out[4 * i + k] = normals[k][i];
}

}  // namespace

void philox_normal(float* out, uint64_t seed, uint32_t last, uint64_t row, int64_t rows, int64_t columns) {
  uint32_t words[4][kChunk];
  float normals[4][kChunk];
  for (int64_t r = 0; r < rows; ++r, ++row, out += columns) {
    for (int64_t column = 0; column < columns; column += 4 * kChunk) {
      const int wanted = static_cast<int>(columns - column < 4 * kChunk ? columns - column : 4 * kChunk), whole = wanted / 4;
      const int groups = (wanted + 4 * kGroup - 1) / (4 * kGroup);
      philox_chunk(words, groups, seed, static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), last);
      box_muller_chunk(words[0], words[1], groups, normals[0], normals[1]);
      box_muller_chunk(words[2], words[3], groups, normals[2], normals[3]);
      interleave(normals, whole, out + column);
      for (int i = 4 * whole; i < wanted; ++i) out[column + i] = normals[i % 4][whole];
    }
  }
}

}  // namespace dhns::kernels
