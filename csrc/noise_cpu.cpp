// Counter-based normals, float32 [rows, columns]: Philox-4x32-10 (Salmon et al., SC 2011) and Box–Muller, see dhns_fast/ops/noise.py.
// Plain loops over a chunk of counters, which the compiler turns into vectors of the level at hand: the integer rounds, then the
// logarithm and the sine and cosine as polynomials.
#include "noise_cpu.h"
#include "vector_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dhns::DHNS_LEVEL {
namespace {

constexpr int kChunk = 64;  // counters at a time: 64·4 words and as many normals stay in the first-level cache
constexpr int kGroup = 16;  // a row's last chunk is cut to groups: at D = 64 a whole one is four times too many

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

// Philox multiplies 32-bit words to 64-bit products. Left alone, the compiler turns the multiplication by a constant into shifts and
// additions and takes three times as long: the instruction is named.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes multiply_low_words(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes multiply_low_words(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply_low_words(Lanes a, Lanes b) { return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
inline Lanes multiply_low_words(Lanes a, Lanes b) { return (a & 0xffffffffu) * b; }
#endif
constexpr int kLanes = sizeof(Lanes) / 8;

// The four words of counters (first .. first + groups·kGroup − 1, c1, c2, last), word by word. A word lives in the lower half of a 64-bit
// lane; what gathers in the upper half is never masked off, as the multiplication does not see it.
inline void philox_chunk(uint32_t (&words)[4][kChunk], int groups, uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t last) {
  Lanes count;
  for (int i = 0; i < kLanes; ++i) count[i] = first + static_cast<uint32_t>(i);
  const Lanes zero = count - count, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  for (int chunk = 0; chunk < groups * kGroup; chunk += 2 * kLanes) {
    // Two independent sets hide the latency of the multiplication.
    Lanes x[2][4] = {{count, zero + c1, zero + c2, zero + last}, {count + kLanes, zero + c1, zero + c2, zero + last}};
    count += 2 * kLanes;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      for (auto& set : x) {
        const Lanes p0 = multiply_low_words(set[0], m0), p1 = multiply_low_words(set[2], m1);
        set[0] = (p1 >> 32) ^ set[1] ^ (zero + k0);
        set[2] = (p0 >> 32) ^ set[3] ^ (zero + k1);
        set[1] = p1;
        set[3] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int set = 0; set < 2; ++set)
      for (int word = 0; word < 4; ++word)
        for (int i = 0; i < kLanes; ++i) words[word][chunk + set * kLanes + i] = static_cast<uint32_t>(x[set][word][i]);
  }
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

}  // namespace dhns::DHNS_LEVEL
