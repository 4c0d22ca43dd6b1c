// Products of float32 matrices in whole numbers, on processors whose tiles multiply bytes (AMX-INT8) at twice the rate of bfloat16.
//
// Numbers that share a scale, those of a row or of a part of one, are s·n with whole n below 2²³, the largest of them at the edge. n has three
// digits to the base 256, from −128 to 127:
//     x = s·(2¹⁶·a₁ + 2⁸·a₂ + a₃)
// Sums of products of digits are exact; the six of most weight count, what is left out is as small as what n rounds away: 2⁻²⁴ of the largest number
// of a row. So an error is float32's relative to the largest number that shares a scale, not to each.
//
// The left operand lies in blocks of 16 rows by 64 columns, a kilobyte for each digit, the right one in panels of 32 columns: for each 64 of k and
// each half of the columns the digits' tiles, [16][16][4] along (k, column, k); after them the columns' scales. Both have columns of k in an order of
// their own, as they come out of put_digits.
#pragma once

#include <type_traits>

#include "bf16_cpu.h"

namespace dhns::kernels {
namespace {

constexpr int64_t kDigits = 3, kDigitDepth = 64, kDigitTile = 1024;
constexpr int64_t kDigitBlock = kDigits * kDigitTile;  // bytes of 16 rows, or columns of a panel, by 64 of k

inline int64_t digit_blocks(int64_t k) { return (k + kDigitDepth - 1) / kDigitDepth; }
// Bytes of a packed panel.
inline int64_t digit_panel(int64_t k) { return digit_blocks(k) * 2 * kDigitBlock + kHalfPanel * static_cast<int64_t>(sizeof(float)); }

template <class Byte>
inline auto digit_scales(Byte* panel, int64_t k) {
  using Scales = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  return reinterpret_cast<Scales*>(panel + digit_blocks(k) * 2 * kDigitBlock);
}

#if defined(DHNS_HAS_BF16)
#define DHNS_BYTES __attribute__((target("amx-tile,amx-int8")))

// Scale and factor of numbers whose largest this is, by its bits: 2¹⁶ units, and units a number. NaN and infinity make everything NaN.
struct Scale {
  float scale, factor;
  explicit Scale(uint32_t largest) {
    // 127·(2¹⁶ + 2⁸ + 1), less what rounding could add. Numbers below 1e-30 count as 0, and so have a finite factor.
    constexpr float kUnits = 8355600.0f;
    float top;
    __builtin_memcpy(&top, &largest, sizeof top);
    if (top < 1e-30f) top = 1e-30f;
    factor = kUnits / top;
    scale = largest < 0x7f800000u ? top * (65536.0f / kUnits) : __builtin_nanf("");
  }
};

inline __m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

// 64 numbers as digits, those of each weight 64 bytes, `next` bytes apart, most weight first. Of columns 16·i + 4·j + l, l runs fastest, then i, then j.
inline void put_digits(int8_t* to, int64_t next, const __m512* x, __m512 factor) {
  // With 128 added to each digit none is negative, and bytes are digits; exclusive or takes it from them again.
  const __m512i half = _mm512_set1_epi32(0x808080);
  const __m512i by_digit = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i n = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], factor)), half);
    v[i] = _mm512_shuffle_epi8(_mm512_xor_si512(n, half), by_digit);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), low23 = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(v[0], v[1]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi64(high01, high23));
  _mm512_store_si512(to + next, _mm512_unpackhi_epi64(low01, low23));
  _mm512_store_si512(to + 2 * next, _mm512_unpacklo_epi64(low01, low23));
}

// n numbers as a row of blocks from `to` on, filled up with zeros; returns their scale.
inline float put_digit_row(int8_t* to, const float* x, int64_t n) {
  const auto load = [=](int64_t j) {
    return n - j >= 16 ? _mm512_loadu_ps(x + j) : _mm512_maskz_loadu_ps(n > j ? static_cast<__mmask16>((1u << (n - j)) - 1) : 0, x + j);
  };
  __m512i largest = _mm512_setzero_si512();
  for (int64_t j = 0; j < n; j += 16) largest = _mm512_max_epu32(largest, magnitude(load(j)));
  const Scale scale(_mm512_reduce_max_epu32(largest));
  const __m512 factor = _mm512_set1_ps(scale.factor);
  for (int64_t j = 0; j < n; j += kDigitDepth, to += kDigitBlock) {
    const __m512 line[4] = {load(j), load(j + 16), load(j + 32), load(j + 48)};
    put_digits(to, kDigitTile, line, factor);
  }
  return scale.scale;
}

// Sums of 32 rows by 16 columns as they leave the tiles: by weight 2³², 2²⁴ and 2¹⁶, for each two blocks of rows.
struct alignas(64) DigitSums {
  int32_t by_weight[3][kHalfRows][16];
};

// Such sums on their way into c [32, 16], some rows at a time while the tiles make the next: nothing but the last of several is waited for.
struct Pending {
  const DigitSums* sums;
  const float *scale_a, *scale_b;
  float* c;
  int64_t rows, row;

  __attribute__((always_inline)) inline void settle(int64_t stride_c, bool add, int64_t count) {
    const __m512 columns = _mm512_loadu_ps(scale_b), second = _mm512_set1_ps(0x1p-8f), third = _mm512_set1_ps(0x1p-16f);
    for (const int64_t last = rows - row < count ? rows : row + count; row < last; ++row) {
      const auto sum = [&](int weight) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums->by_weight[weight][row])); };
      const __m512 total = _mm512_fmadd_ps(sum(2), third, _mm512_fmadd_ps(sum(1), second, sum(0)));
      const __m512 scale = _mm512_mul_ps(columns, _mm512_set1_ps(scale_a[row]));
      float* const to = c + row * stride_c;
      _mm512_storeu_ps(to, add ? _mm512_fmadd_ps(total, scale, _mm512_loadu_ps(to)) : _mm512_mul_ps(total, scale));
    }
  }
};

// c [rows, 32] (+)= a·panel for whole 32 rows, `next` bytes from one block of 16 to the other. Sapphire Rapids, GFLOP/s a core at k 512 and
// 2048 with operands in the second-level cache: 480; 400 where each product settles its own sums before the next; bfloat16 in three parts 320.
// Not inlined: compilers do not know that these instructions touch memory, only that calls may.
DHNS_BYTES __attribute__((noinline)) void digits_product(const int8_t* a, int64_t next, int64_t rows, const int8_t* panel, int64_t blocks,
                                                         const float* scale_a, const float* scale_b, float* c, int64_t stride_c, bool add) {
  DigitSums sums[2];
  Pending pending{nullptr, scale_a, scale_b, c, 0, 0};
  const int64_t share = (kHalfRows + blocks - 1) / blocks;
  int turn = 0;
  for (int half = 0; half < 2; ++half) {
    for (int64_t first = 0; first < rows; first += kHalfRows, turn ^= 1) {
      const int8_t *x = a + first / kBlockRows * next, *y = panel + half * kDigitBlock;
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5);
#define DHNS_PRODUCTS(digit, upper, lower)                           \
  _tile_loadd(6, x + (digit)*kDigitTile, 64); _tile_dpbssd(upper, 6, 7); \
  _tile_loadd(6, x + next + (digit)*kDigitTile, 64); _tile_dpbssd(lower, 6, 7)
      for (int64_t block = 0; block < blocks; ++block, x += kDigitBlock, y += 2 * kDigitBlock) {
        _tile_loadd(7, y, 64);
        DHNS_PRODUCTS(0, 0, 1); DHNS_PRODUCTS(1, 2, 3); DHNS_PRODUCTS(2, 4, 5);
        pending.settle(stride_c, add, share);
        _tile_loadd(7, y + kDigitTile, 64);
        DHNS_PRODUCTS(0, 2, 3); DHNS_PRODUCTS(1, 4, 5);
        _tile_loadd(7, y + 2 * kDigitTile, 64);
        DHNS_PRODUCTS(0, 4, 5);
      }
#undef DHNS_PRODUCTS
      auto& to = sums[turn].by_weight;
      _tile_stored(0, to[0], 64); _tile_stored(1, to[0][kBlockRows], 64);
      _tile_stored(2, to[1], 64); _tile_stored(3, to[1][kBlockRows], 64);
      _tile_stored(4, to[2], 64); _tile_stored(5, to[2][kBlockRows], 64);
      pending = {&sums[turn], scale_a + first, scale_b + 16 * half, c + first * stride_c + 16 * half, kHalfRows, 0};
    }
  }
  pending.settle(stride_c, add, kHalfRows);
}
#else
inline float put_digit_row(int8_t*, const float*, int64_t) { return 0; }
inline void digits_product(const int8_t*, int64_t, int64_t, const int8_t*, int64_t, const float*, const float*, float*, int64_t, bool) {}
#endif

}  // namespace
}  // namespace dhns::kernels
