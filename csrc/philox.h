// Philox-4x32-10 (Salmon et al., SC 2011), counter by counter along a row: what CPU kernels draw their random words from.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dhns::kernels {
namespace {

constexpr int kChunk = 64;  // counters at a time: 64·4 words and as many normals stay in the first-level cache
constexpr int kGroup = 16;  // a row's last chunk is cut to groups: at D = 64 a whole one is four times too many

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
constexpr int kStreams = sizeof(Lanes) / 8;

// The four words of counters (first .. first + groups·kGroup − 1, c1, c2, last), word by word. A word lives in the lower half of a 64-bit
// lane; what gathers in the upper half is never masked off, as the multiplication does not see it.
inline void philox_chunk(uint32_t (&words)[4][kChunk], int groups, uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t last) {
  Lanes count;
  for (int i = 0; i < kStreams; ++i) count[i] = first + static_cast<uint32_t>(i);
  const Lanes zero = count - count, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  for (int chunk = 0; chunk < groups * kGroup; chunk += 2 * kStreams) {
    // Two independent sets hide the latency of the multiplication.
    Lanes x[2][4] = {{count, zero + c1, zero + c2, zero + last}, {count + kStreams, zero + c1, zero + c2, zero + last}};
    count += 2 * kStreams;
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
        for (int i = 0; i < kStreams; ++i) words[word][chunk + set * kStreams + i] = static_cast<uint32_t>(x[set][word][i]);
  }
}

}  // namespace
}  // namespace dhns::kernels
