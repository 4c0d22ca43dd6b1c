// Products of bfloat16 matrices with float32 sums, on processors that multiply it: by tiles (AMX) or by pairs in vectors (AVX-512 BF16).
//
// Both read the same layouts. The left operand a [rows, k] lies in blocks of 16 rows by 32 columns, each a kilobyte in a row, the right one in
// panels of 32 columns as pairs along k: [k / 2][32][2]. k is padded to blocks with zeros, rows are padded with anything.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define DHNS_HAS_BF16 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>
#endif

namespace dhns::kernels {
namespace {

using Half = uint16_t;
enum Bf16Unit { kNoBf16, kPairs, kTiles };
constexpr int64_t kBlockRows = 16, kBlockDepth = 32, kBlock = kBlockRows * kBlockDepth, kHalfPanel = 32;
// Rows of a product are padded to two blocks, which go together.
constexpr int64_t kHalfRows = 2 * kBlockRows;

inline int64_t blocks_of(int64_t k) { return (k + kBlockDepth - 1) / kBlockDepth; }

#if defined(DHNS_HAS_BF16)
#define DHNS_BF16 __attribute__((target("avx512bf16")))
#define DHNS_AMX __attribute__((target("amx-tile,amx-bf16")))

inline Bf16Unit bf16_unit() {
  static const Bf16Unit unit = [] {
    const char* const set = std::getenv("DHNS_FAST_ISA");
    const std::string_view most = set ? set : "";
    unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0;
    if (!__get_cpuid_count(7, 1, &a1, &b, &c, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kNoBf16;
    if (!(a1 >> 5 & 1) || most == "avx512") return kNoBf16;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: the system gives a process tile registers on request
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1) && most != "avx512_bf16" && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return tiles ? kTiles : kPairs;
  }();
  return unit;
}

// 32 numbers, rounded to nearest even: a row of a block. The instruction by name: only functions compiled for it may have its intrinsic inlined,
// and the loops around it are not among them. Never called where the processor lacks it.
inline void put_halves(Half* to, __m512 low, __m512 high) {
  __m512i out;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  _mm512_storeu_si512(to, out);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of this thread, for as long as one lives; nothing where tiles are not what is used.
class TileRegisters {
 public:
  explicit TileRegisters(bool used) : used_(used) {
    if (used_) configure();
  }
  ~TileRegisters() {
    if (used_) release();
  }

 private:
  DHNS_AMX static void configure() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  DHNS_AMX static void release() { _tile_release(); }
  const bool used_;
};

// c [32, 32] (+)= a·panel, `next` elements from one block of 16 rows to the other.
// Not inlined: compilers do not know that these instructions touch memory, only that calls may.
DHNS_AMX __attribute__((noinline)) void half_tile_amx(const Half* a, int64_t next, const Half* panel, int64_t blocks, float* c, int64_t stride_c, bool add) {
  const int64_t bytes = 4 * stride_c;
  if (add) {
    _tile_loadd(0, c, bytes); _tile_loadd(1, c + 16, bytes);
    _tile_loadd(2, c + 16 * stride_c, bytes); _tile_loadd(3, c + 16 * stride_c + 16, bytes);
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  for (; blocks; --blocks, a += kBlock, panel += kBlockDepth * kHalfPanel) {
    _tile_loadd(6, panel, 4 * kHalfPanel); _tile_loadd(7, panel + kHalfPanel, 4 * kHalfPanel);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + next, 64);
    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes); _tile_stored(1, c + 16, bytes);
  _tile_stored(2, c + 16 * stride_c, bytes); _tile_stored(3, c + 16 * stride_c + 16, bytes);
}

// c [8, 32] (+)= a·panel for 8 rows of a block.
DHNS_BF16 void half_rows_pairs(const Half* a, const Half* panel, int64_t blocks, float* c, int64_t stride_c, bool add) {
  constexpr int rows = 8;
  __m512 sums[rows][2];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    sums[r][0] = add ? _mm512_loadu_ps(c + r * stride_c) : _mm512_setzero_ps();
    sums[r][1] = add ? _mm512_loadu_ps(c + r * stride_c + 16) : _mm512_setzero_ps();
  }
  for (; blocks; --blocks, a += kBlock) {
    for (int64_t pair = 0; pair < kBlockDepth / 2; ++pair, panel += 2 * kHalfPanel) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(panel), high = (__m512bh)_mm512_loadu_si512(panel + kHalfPanel);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        int both;
        __builtin_memcpy(&both, a + r * kBlockDepth + 2 * pair, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, low);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, high);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    _mm512_storeu_ps(c + r * stride_c, sums[r][0]);
    _mm512_storeu_ps(c + r * stride_c + 16, sums[r][1]);
  }
}

// 32 rows of a from block `first` on, times so many blocks of a panel.
inline void half_tile(const Half* a, int64_t next, const Half* panel, int64_t blocks, float* c, int64_t stride_c, bool add) {
  if (bf16_unit() == kTiles) return half_tile_amx(a, next, panel, blocks, c, stride_c, add);
  for (int64_t row = 0; row < kHalfRows; row += 8)
    half_rows_pairs(a + row / kBlockRows * next + row % kBlockRows * kBlockDepth, panel, blocks, c + row * stride_c, stride_c, add);
}
#else
inline Bf16Unit bf16_unit() { return kNoBf16; }
struct TileRegisters {
  explicit TileRegisters(bool) {}
};
inline void half_tile(const Half*, int64_t, const Half*, int64_t, float*, int64_t, bool) {}
#endif

}  // namespace
}  // namespace dhns::kernels
