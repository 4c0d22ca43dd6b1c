// The sampling chain for a block of rows, float32: all T steps while the block's activations stay in this core's cache.
//
// A step is two matrix products with packed weights, and between them passes over one row at a time, which cost 1/D of the products:
//     h = relu((x·Vxᵀ + c·Vcᵀ + τ·Vτᵀ)/σ + b₁′), centred        x ← mean_scale·x − noise_scale·(h·Gᵀ/σ₂ + b₂′) + sigma·z
// A row's sums run in one fixed order whatever the block around it, so results are the same bits for every split of a batch. Processors with
// matrix tiles compute both precisions on them (bf16_cpu.h), others float32 in vectors; bfloat16 operands are rounded floats where nothing
// multiplies them.
#include "denoise_cpu.h"

#include <cmath>
#include <cstring>

#include "bf16_cpu.h"
#include "noise_cpu.h"

namespace dhns::DHNS_LEVEL {
namespace {

// A tile of MR rows and two vectors of columns fills the registers: 12 of AVX2's 16, 24 of AVX-512's 32.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 12;
#elif defined(__AVX__)
constexpr int kWidth = 8, kRows = 6;
#else
constexpr int kWidth = 4, kRows = 6;
#endif
constexpr int64_t kPanel = 2 * kWidth;
// Depth of a product before the accumulators are put down: a panel of the weights is then 32 KB (AVX2), read from the second-level cache.
// Measured on Zen 3, one thread: 128 is 15 % slower, 256 and 1024 the same.
constexpr int64_t kDepth = 512;
// Of bfloat16: 32 rows and a panel are 16 KB each, and stay in the first-level cache (Sapphire Rapids: 5 % faster than 512). Floats in three
// parts do not fit there at any depth worth its sums' way to memory and back: 512 is 10 % faster than 256 and 1024.
constexpr int64_t kHalfDepth = 256;
constexpr float kEpsilon = 1e-5f;

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float Loose __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Vec load(const float* p) { return (Vec) * reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

inline float round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  float y;
  std::memcpy(&y, &rounded, 4);
  return x == x ? y : x;
}

inline Half half(float x) {
  const float rounded = round_bf16(x);
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  return static_cast<Half>(bits >> 16);
}

// c [R, kPanel] (+)= a [R, depth] · panel [depth, kPanel].
template <int R>
void tile(const float* a, int64_t stride_a, const float* panel, int64_t depth, float* c, int64_t stride_c, bool add) {
  Vec sums[R][2];
  for (int r = 0; r < R; ++r) {
    sums[r][0] = add ? load(c + r * stride_c) : Vec{};
    sums[r][1] = add ? load(c + r * stride_c + kWidth) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const Vec first = load(panel), second = load(panel + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(a[r * stride_a + k]);
      sums[r][0] += x * first;
      sums[r][1] += x * second;
    }
  }
  for (int r = 0; r < R; ++r) {
    store(c + r * stride_c, sums[r][0]);
    store(c + r * stride_c + kWidth, sums[r][1]);
  }
}

template <int R>
void tile_of(int64_t rows, const float* a, int64_t stride_a, const float* panel, int64_t depth, float* c, int64_t stride_c, bool add) {
  if (rows == R) return tile<R>(a, stride_a, panel, depth, c, stride_c, add);
  if constexpr (R > 1) tile_of<R - 1>(rows, a, stride_a, panel, depth, c, stride_c, add);
}

// Floats between rows of n: whole panels, and a line so that the rows of a tile do not all fall into one set of the cache.
int64_t stride_of(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel + 16; }

// bfloat16 numbers for each of an operand; 0: floats, which are rounded where bf16 is asked for and nothing multiplies it.
int parts_of(bool bf16) {
  if (bf16) return bf16_unit() != kNoBf16;
  return bf16_unit() == kTiles ? kParts : 0;
}

// The left operand of a product: rows of floats, or blocks of bfloat16.
struct Operand {
  const float* floats;
  int64_t stride;
  const Half* halves;
  int parts;
};

// c [rows, stride_c] (+)= columns k0 .. k0 + depth − 1 of a, times that part of a panel.
void by_panel(const Operand& a, const float* panel, float* c, int64_t stride_c, int64_t rows, int64_t k, int64_t k0, int64_t depth) {
  if (a.parts) {
    const int64_t next = blocks_of(k) * kBlock * a.parts, first = k0 / kBlockDepth * kBlock * a.parts;
    const auto multiply = a.parts == kParts ? parts_tile : half_tile;
    for (int64_t row = 0; row < rows; row += kHalfRows)
      multiply(a.halves + row / kBlockRows * next + first, next, reinterpret_cast<const Half*>(panel) + k0 * kHalfPanel * a.parts,
               blocks_of(depth), c + row * stride_c, stride_c, k0 > 0);
  } else {
    for (int64_t row = 0; row < rows; row += kRows)
      tile_of<kRows>(rows - row < kRows ? rows - row : kRows, a.floats + row * a.stride + k0, a.stride, panel + k0 * kPanel, depth,
                     c + row * stride_c, stride_c, k0 > 0);
  }
}

// Floats of memory that a packed panel of k columns takes.
int64_t panel_size(int64_t k, int parts) { return parts ? blocks_of(k) * kBlockDepth * kHalfPanel / 2 * parts : k * kPanel; }

// c [rows, stride_of(n)] = a [rows, k] · packed weightᵀ.
void product(const Operand& a, const float* packed, float* c, int64_t rows, int64_t n, int64_t k) {
  const int64_t stride_c = stride_of(n), panel = panel_size(k, a.parts), most = a.parts == 1 ? kHalfDepth : kDepth;
  for (int64_t k0 = 0; k0 < k; k0 += most)
    for (int64_t column = 0; column < n; column += kPanel)
      by_panel(a, packed + column / kPanel * panel, c + column, stride_c, rows, k, k0, k - k0 < most ? k - k0 : most);
}

// 16 numbers of a row as bfloat16, `stride` elements of `to` between pairs and `next` between parts.
#if defined(DHNS_HAS_BF16)
void scatter_pairs(Half* to, const float* from, int64_t stride, int64_t next, int parts) {
  Vec x = load(from);
  for (int part = 0; part < parts; ++part, to += next) {
    alignas(64) Half line[32];
    const __m512 leading = parts > 1 ? leading_part((__m512)x) : (__m512)x;
    put_halves(line, leading, leading);
    for (int64_t pair = 0; pair < 8; ++pair) std::memcpy(to + pair * stride, line + 2 * pair, 4);
    x -= (Vec)leading;
  }
}
#else
void scatter_pairs(Half*, const float*, int64_t, int64_t, int) {}
#endif

// Weights [n, k] as panel number `panel`: floats [k][kPanel], or bfloat16 as bf16_cpu.h has them; zero beyond n.
void pack_panel(float* out, const float* weight, int64_t n, int64_t k, int64_t panel, bool bf16) {
  constexpr int64_t kLine = 16;  // of a row of weights at a time: a cache line is read whole
  const int64_t first = panel * kPanel;
  if (const int parts = parts_of(bf16)) {
    constexpr int64_t kPart = kBlockDepth * kHalfPanel;
    Half* const to = reinterpret_cast<Half*>(out);
    for (int64_t j = 0; j < blocks_of(k) * kBlockDepth; j += kLine)
      for (int64_t i = 0; i < kPanel; ++i) {
        float line[kLine] = {};
        const int64_t count = first + i < n ? k - j : 0;
        const float* const from = weight + (first + i) * k + j;
        if (count > 0 && count < kLine) std::memcpy(line, from, static_cast<size_t>(count) * sizeof(float));
        scatter_pairs(to + j / kBlockDepth * kPart * parts + j % kBlockDepth * kHalfPanel + 2 * i, count < kLine ? line : from,
                      2 * kHalfPanel, kPart, parts);
      }
    return;
  }
  for (int64_t j0 = 0; j0 < k; j0 += kLine)
    for (int64_t i = 0; i < kPanel; ++i)
      for (int64_t j = j0; j < k && j < j0 + kLine; ++j) {
        const float w = first + i < n ? weight[(first + i) * k + j] : 0.0f;
        out[j * kPanel + i] = bf16 ? round_bf16(w) : w;
      }
}

struct Moments {
  float mean, var;
};

// Mean and variance of a row in two passes: E[x²] − E[x]² would cancel.
Moments moments(const float* x, int64_t n) {
  Vec a{}, b{};
  float rest = 0;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) a += load(x + i), b += load(x + i + kWidth);
  for (; i < n; ++i) rest += x[i];
  const float mean = (sum(a + b) + rest) / static_cast<float>(n);
  const Vec shift = splat(mean);
  a = b = Vec{};
  rest = 0;
  for (i = 0; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec d = load(x + i) - shift, e = load(x + i + kWidth) - shift;
    a += d * d, b += e * e;
  }
  for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return {mean, (sum(a + b) + rest) / static_cast<float>(n)};
}

// 1/√(variance + eps) over the concatenation of three equally wide parts.
float merged_rstd(Moments a, Moments b, Moments c) {
  const float mean = (a.mean + b.mean + c.mean) / 3.0f;
  const float da = a.mean - mean, db = b.mean - mean, dc = c.mean - mean;
  return 1.0f / std::sqrt((a.var + b.var + c.var + da * da + db * db + dc * dc) / 3.0f + kEpsilon);
}

// A row of the hidden layer from its product h, centred for the second one; its 1/σ. n = 4D is a multiple of 8. centred(i, v, w) takes two
// vectors of it, centred(i, x) one number; h may be overwritten by them.
template <class Centred>
float hidden(const float* h, const float* fixed, const float* time, const float* bias, float rstd, int64_t n, Centred centred) {
  const Vec scale = splat(rstd);
  // NaN stays NaN.
  const auto vector = [=](int64_t i) {
    const Vec v = (load(h + i) + load(fixed + i) + load(time + i)) * scale + load(bias + i);
    return v < Vec{} ? Vec{} : v;
  };
  const auto number = [=](int64_t i) {
    const float x = (h[i] + fixed[i] + time[i]) * rstd + bias[i];
    return x < 0 ? 0 : x;
  };
  Vec a{}, b{};
  float rest = 0;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) a += vector(i), b += vector(i + kWidth);
  for (; i < n; ++i) rest += number(i);
  const float mean = (sum(a + b) + rest) / static_cast<float>(n);
  const Vec shift = splat(mean);
  a = b = Vec{};
  rest = 0;
  // Computed again rather than kept: rows stay in the first-level cache, and what h holds may serve another step.
  for (i = 0; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec v = vector(i) - shift, w = vector(i + kWidth) - shift;
    centred(i, v, w);
    a += v * v, b += w * w;
  }
  for (; i < n; ++i) {
    const float x = number(i) - mean;
    centred(i, x);
    rest += x * x;
  }
  return 1.0f / std::sqrt((sum(a + b) + rest) / static_cast<float>(n) + kEpsilon);
}

// A row in blocks of bfloat16: where it begins, and a vector pair or a number of it.
template <int kCount>
struct Row {
  Half* begin;
  Row(Half* blocks, int64_t row, int64_t k)
      : begin(blocks + row / kBlockRows * blocks_of(k) * kBlock * kCount + row % kBlockRows * kBlockDepth) {}
  void operator()(int64_t j, float x) const {
    Half* to = begin + j / kBlockDepth * kBlock * kCount + j % kBlockDepth;
    for (int part = 0; part < kCount; ++part, to += kBlock) {
      const float rounded = round_bf16(x);
      *to = half(x);
      x -= rounded;
    }
  }
  void operator()(int64_t j, Vec low, Vec high) const {
#if defined(DHNS_HAS_BF16)
    static_assert(kBlockDepth == 2 * kWidth, "two vectors are a row of a block");
    Half* const to = begin + j / kBlockDepth * kBlock * kCount;
    if constexpr (kCount == kParts)
      put_parts(to, (__m512)low, (__m512)high);
    else
      put_halves(to, (__m512)low, (__m512)high);
#endif
  }
};

template <int kCount>
void put_row(const float* x, Row<kCount> out, int64_t n) {
  int64_t i = 0;
  for (; i + kBlockDepth <= n; i += kBlockDepth) out(i, load(x + i), load(x + i + kWidth));
  for (; i < n; ++i) out(i, x[i]);
}

float hidden_floats(float* h, const float* fixed, const float* time, const float* bias, float rstd, int64_t n, bool bf16) {
  struct {
    float* h;
    void operator()(int64_t i, Vec v, Vec w) const { store(h + i, v), store(h + i + kWidth, w); }
    void operator()(int64_t i, float x) const { h[i] = x; }
  } const centred{h};
  const float rstd2 = hidden(h, fixed, time, bias, rstd, n, centred);
  for (int64_t i = 0; bf16 && i < n; ++i) h[i] = round_bf16(h[i]);
  return rstd2;
}

// The rows of one side of a block.
struct Side {
  const DenoiseSide& call;
  float *fixed, *x;  // c·Vcᵀ [rows, stride_of(4D)], state [rows, D]
  Moments *condition, *state;
};

struct Block {
  const Denoise& call;
  const int64_t begin, rows, D = call.D, hidden_stride = stride_of(4 * D), out_stride = stride_of(D);
  float *h, *e, *z, *rounded, *panel;
  int parts;
  Half *state_halves, *hidden_halves;  // for operands in parts

  // Operand of a product: x itself, or a copy in bfloat16.
  Operand operand(const float* x, Half* blocks, float* floats) const {
    if (parts) {
      for (int64_t r = 0; r < rows; ++r)
        parts == kParts ? put_row(x + r * D, Row<kParts>(blocks, r, D), D) : put_row(x + r * D, Row<1>(blocks, r, D), D);
      return {nullptr, 0, blocks, parts};
    }
    if (!call.bf16) return {x, D, nullptr, 0};
    for (int64_t i = 0; i < rows * D; ++i) floats[i] = round_bf16(x[i]);
    return {floats, D, nullptr, 0};
  }

  void draw(float* out, int64_t r, uint32_t stream, int64_t t) const {
    const int64_t row = begin + r, modality = row / call.batch;
    const auto last = static_cast<uint32_t>(modality << 18 | t << 2 | stream);
    philox_normal(out, call.seed, last, call.row_offset + static_cast<uint64_t>(row - modality * call.batch), 1, D);
  }

  // The conditions' products happen once: their weights are packed on the way, panel by panel, and take no memory.
  void conditions(const Side& tail, const Side& head) const {
    // What the first step overwrites has room for the second operand.
    const Operand operands[] = {operand(tail.call.condition + begin * D, state_halves, rounded),
                                operand(head.call.condition + begin * D, hidden_halves, h)};
    float* const out[] = {tail.fixed, head.fixed};
    for (int64_t column = 0; column < 4 * D; column += kPanel) {
      pack_panel(panel, call.fixed, 4 * D, D, column / kPanel, call.bf16);
      for (int side = 0; side < 2; ++side)
        for (int64_t k0 = 0; k0 < D; k0 += kDepth)
          by_panel(operands[side], panel, out[side] + column, hidden_stride, rows, D, k0, D - k0 < kDepth ? D - k0 : kDepth);
    }
  }

  void start(const Side& side, bool with_state) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* const x = side.x + r * D;
      side.condition[r] = moments(side.call.condition + (begin + r) * D, D);
      if (!with_state) continue;
      if (side.call.start)
        std::memcpy(x, side.call.start + (begin + r) * D, static_cast<size_t>(D) * sizeof(float));
      else
        draw(x, r, side.call.start_stream, 0);
      side.state[r] = moments(x, D);
    }
  }

  // One denoising step at time t from x, whose moments `from` holds. `known`: h has x·Vxᵀ already.
  void step(const Side& side, const float* x, const Moments* from, int64_t t, bool known = false) const {
    const int64_t i = t - 1;
    if (!known) product(operand(x, state_halves, rounded), call.state, h, rows, 4 * D, D);
    const Moments time{call.time_mean[i], call.time_var[i]};
    float* const rstd = z + D;
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = h + r * hidden_stride;
      const float *const fixed = side.fixed + r * hidden_stride, *const step = call.time + i * 4 * D;
      const float scale = merged_rstd(from[r], time, side.condition[r]);
      rstd[r] = parts == kParts ? hidden(row, fixed, step, call.bias1, scale, 4 * D, Row<kParts>(hidden_halves, r, 4 * D))
          : parts               ? hidden(row, fixed, step, call.bias1, scale, 4 * D, Row<1>(hidden_halves, r, 4 * D))
                                : hidden_floats(row, fixed, step, call.bias1, scale, 4 * D, call.bf16);
    }
    product({h, hidden_stride, hidden_halves, parts}, call.output, e, rows, D, 4 * D);
    const auto keep = static_cast<float>(call.mean_scale[i]), take = static_cast<float>(call.noise_scale[i]);
    const auto spread = static_cast<float>(call.sigma[i]);
    for (int64_t r = 0; r < rows; ++r) {
      float* const out = side.x + r * D;
      const float *const in = x + r * D, *const noise = e + r * out_stride, scale = rstd[r];
      const float* const bias = call.bias2;
      for (int64_t j = 0; j < D; ++j) out[j] = keep * in[j] - take * (noise[j] * scale + bias[j]);
      if (t > 1) {
        const float* fresh = z;
        if (side.call.noise)
          fresh = side.call.noise + ((call.T - t) * call.N + begin + r) * D;
        else
          draw(z, r, side.call.noise_stream, t);
        for (int64_t j = 0; j < D; ++j) out[j] += spread * fresh[j];
      }
      side.state[r] = moments(out, D);
    }
  }

  void keep(const Side& side, int64_t level) const {
    std::memcpy(side.call.out[level] + begin * D, side.x, static_cast<size_t>(rows * D) * sizeof(float));
  }
};

}  // namespace

int64_t panel() { return kPanel; }
int64_t tile_rows(bool bf16) { return parts_of(bf16) ? kHalfRows : kRows; }
int64_t packed_panel(int64_t k, bool bf16) { return panel_size(k, parts_of(bf16)); }

void pack(float* out, const float* weight, int64_t n, int64_t k, int64_t first, int64_t last, bool bf16) {
  for (int64_t panel = first; panel < last; ++panel) pack_panel(out + panel * packed_panel(k, bf16), weight, n, k, panel, bf16);
}

int64_t scratch(int64_t D, int64_t rows, bool bf16) {
  const int64_t padded = (rows + kHalfRows - 1) / kHalfRows * kHalfRows;
  // h and both sides' fixed part, the output, both states, four pairs of moments, 1/σ₂, a row of noise, a panel, and room to begin at a line.
  const int64_t floats = padded * (3 * stride_of(4 * D) + stride_of(D) + 2 * D + 9) + D + packed_panel(D, bf16) + 7 * 16;
  if (const int parts = parts_of(bf16)) return floats + padded / kBlockRows * (blocks_of(D) + blocks_of(4 * D)) * kBlock / 2 * parts;
  return floats + (bf16 ? rows * D : 0);
}

void denoise_block(const Denoise& call, int64_t begin, int64_t end, float* memory) {
  const int parts = parts_of(call.bf16);
  const TileRegisters registers(parts && bf16_unit() == kTiles);
  const int64_t rows = end - begin, D = call.D, padded = (rows + kHalfRows - 1) / kHalfRows * kHalfRows, wide = padded * stride_of(4 * D);
  const auto take = [&memory](int64_t count) {
    memory = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    return memory += count, memory - count;
  };
  const auto take_halves = [&](int64_t k) {
    const int64_t count = padded / kBlockRows * blocks_of(k) * kBlock * parts;
    Half* const out = reinterpret_cast<Half*>(take(count / 2));
    // What pads k is multiplied by zeros, which takes it to be a number.
    std::memset(out, 0, static_cast<size_t>(count) * sizeof(Half));
    return out;
  };
  float *const h = take(wide), *const tail_fixed = take(wide), *const head_fixed = take(wide), *const e = take(padded * stride_of(D));
  Half *const state_halves = take_halves(D), *const hidden_halves = take_halves(4 * D);
  float *const panel = take(panel_size(D, parts)), *const rounded = take(call.bf16 && !parts ? rows * D : 0);
  const auto pairs = [&memory, rows] { return memory += 2 * rows, reinterpret_cast<Moments*>(memory - 2 * rows); };
  const auto plain = [&memory](int64_t count) { return memory += count, memory - count; };
  Side tail{call.tail, tail_fixed, plain(rows * D), pairs(), pairs()};
  Side head{call.head, head_fixed, plain(rows * D), pairs(), pairs()};
  float* const z = plain(D + rows);
  const Block block{call, begin, rows, D, stride_of(4 * D), stride_of(D), h, e, z, rounded, panel, parts, state_halves, hidden_halves};
  block.conditions(tail, head);
  block.start(tail, true);
  block.start(head, !call.release);
  bool known = false;
  for (int64_t t = call.T; t > call.last; --t) {
    block.step(tail, tail.x, tail.state, t, known);
    bool wanted = false;
    for (int64_t k = 0; k < call.count; ++k) wanted |= call.levels[k] == t - 1;
    // "release": the head is one more step from the tail's new state. "corrected": it has a chain of its own.
    const Side& from = call.release ? tail : head;
    if (wanted || !call.release) block.step(head, from.x, from.state, t);
    // Then the tail's next step begins where the head's has. Products of floats are overwritten by what is made of them.
    known = call.release && wanted && parts;
    for (int64_t k = 0; k < call.count; ++k)
      if (call.levels[k] == t - 1) block.keep(tail, k), block.keep(head, k);
  }
}

}  // namespace dhns::DHNS_LEVEL
