// The sampling chain for a block of rows, float32: all T steps while the block's activations stay in this core's cache.
//
// A step is two matrix products with packed weights, and between them passes over one row at a time, which cost 1/D of the products:
//     h = relu((x·Vxᵀ + c·Vcᵀ + τ·Vτᵀ)/σ + b₁′), centred        x ← mean_scale·x − noise_scale·(h·Gᵀ/σ₂ + b₂′) + sigma·z
// A row's sums run in one fixed order whatever the block around it, so results are the same bits for every split of a batch.
#include "denoise_cpu.h"

#include <cmath>
#include <cstring>

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

// Floats between rows of n: whole panels.
int64_t stride_of(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// c [rows, stride_of(n)] = a [rows, k] · packed weightᵀ.
void product(const float* a, int64_t stride_a, const float* packed, float* c, int64_t rows, int64_t n, int64_t k) {
  const int64_t stride_c = stride_of(n);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = k - k0 < kDepth ? k - k0 : kDepth;
    for (int64_t column = 0; column < n; column += kPanel) {
      const float* const panel = packed + column * k + k0 * kPanel;
      for (int64_t row = 0; row < rows; row += kRows)
        tile_of<kRows>(rows - row < kRows ? rows - row : kRows, a + row * stride_a + k0, stride_a, panel, depth,
                       c + row * stride_c + column, stride_c, k0 > 0);
    }
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

// A row of the hidden layer from its product, centred for the second; its 1/σ. n = 4D is a multiple of 8.
float hidden(float* h, const float* fixed, const float* time, const float* bias, float rstd, int64_t n, bool bf16) {
  const auto activate = [](auto v, auto zero) { return v < zero ? zero : v; };  // NaN stays NaN
  const Vec scale = splat(rstd);
  Vec a{}, b{};
  float rest = 0;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec v = activate((load(h + i) + load(fixed + i) + load(time + i)) * scale + load(bias + i), Vec{});
    const int64_t j = i + kWidth;
    const Vec w = activate((load(h + j) + load(fixed + j) + load(time + j)) * scale + load(bias + j), Vec{});
    store(h + i, v), store(h + j, w);
    a += v, b += w;
  }
  for (; i < n; ++i) rest += h[i] = activate((h[i] + fixed[i] + time[i]) * rstd + bias[i], 0.0f);
  const float mean = (sum(a + b) + rest) / static_cast<float>(n);
  const Vec shift = splat(mean);
  a = b = Vec{};
  rest = 0;
  for (i = 0; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec v = load(h + i) - shift, w = load(h + i + kWidth) - shift;
    store(h + i, v), store(h + i + kWidth, w);
    a += v * v, b += w * w;
  }
  for (; i < n; ++i) {
    h[i] -= mean;
    rest += h[i] * h[i];
  }
  if (bf16)
    for (i = 0; i < n; ++i) h[i] = round_bf16(h[i]);
  return 1.0f / std::sqrt((sum(a + b) + rest) / static_cast<float>(n) + kEpsilon);
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
  float *h, *e, *z, *rounded;

  // Operands of a product: x itself, or a copy rounded to bf16.
  const float* operand(const float* x) const {
    if (!call.bf16) return x;
    for (int64_t i = 0; i < rows * D; ++i) rounded[i] = round_bf16(x[i]);
    return rounded;
  }

  void draw(float* out, int64_t r, uint32_t stream, int64_t t) const {
    const int64_t row = begin + r, modality = row / call.batch;
    const auto last = static_cast<uint32_t>(modality << 18 | t << 2 | stream);
    philox_normal(out, call.seed, last, call.row_offset + static_cast<uint64_t>(row - modality * call.batch), 1, D);
  }

  void start(const Side& side, bool with_state) const {
    product(operand(side.call.condition + begin * D), D, call.fixed, side.fixed, rows, 4 * D, D);
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

  // out = one denoising step at time t from x; `from` holds the moments of x, `to` those of the result.
  void step(const Side& side, const float* x, const Moments* from, int64_t t) const {
    const int64_t i = t - 1;
    product(operand(x), D, call.state, h, rows, 4 * D, D);
    const Moments time{call.time_mean[i], call.time_var[i]};
    float* const rstd = z + D;
    for (int64_t r = 0; r < rows; ++r)
      rstd[r] = hidden(h + r * hidden_stride, side.fixed + r * hidden_stride, call.time + i * 4 * D, call.bias1,
                       merged_rstd(from[r], time, side.condition[r]), 4 * D, call.bf16);
    product(h, hidden_stride, call.output, e, rows, D, 4 * D);
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
int64_t tile_rows() { return kRows; }

void pack(float* out, const float* weight, int64_t n, int64_t k, int64_t first, int64_t last, bool bf16) {
  constexpr int64_t kLine = 16;  // of a row of weights at a time: a cache line is read whole
  for (int64_t column = first * kPanel; column < last * kPanel; column += kPanel)
    for (int64_t j0 = 0; j0 < k; j0 += kLine)
      for (int64_t i = 0; i < kPanel; ++i)
        for (int64_t j = j0; j < k && j < j0 + kLine; ++j) {
          const float w = column + i < n ? weight[(column + i) * k + j] : 0.0f;
          out[column * k + j * kPanel + i] = bf16 ? round_bf16(w) : w;
        }
}

int64_t scratch(int64_t D, int64_t rows) {
  // h and both sides' fixed part, the output, both states, the rounded operand, four pairs of moments, 1/σ₂ and a row of noise.
  return rows * (3 * stride_of(4 * D) + stride_of(D) + 3 * D + 9) + D;
}

void denoise_block(const Denoise& call, int64_t begin, int64_t end, float* memory) {
  const int64_t rows = end - begin, D = call.D, wide = rows * stride_of(4 * D);
  const auto take = [&memory](int64_t count) { return memory += count, memory - count; };
  const auto pairs = [&] { return reinterpret_cast<Moments*>(take(2 * rows)); };
  Side tail{call.tail, take(wide), take(rows * D), pairs(), pairs()};
  Side head{call.head, take(wide), take(rows * D), pairs(), pairs()};
  float *const h = take(wide), *const e = take(rows * stride_of(D)), *const rounded = take(rows * D), *const z = take(D + rows);
  const Block block{call, begin, rows, D, stride_of(4 * D), stride_of(D), h, e, z, rounded};
  block.start(tail, true);
  block.start(head, !call.release);
  for (int64_t t = call.T; t > call.last; --t) {
    block.step(tail, tail.x, tail.state, t);
    bool wanted = false;
    for (int64_t k = 0; k < call.count; ++k) wanted |= call.levels[k] == t - 1;
    // "release": the head is one more step from the tail's new state. "corrected": it has a chain of its own.
    const Side& from = call.release ? tail : head;
    if (wanted || !call.release) block.step(head, from.x, from.state, t);
    for (int64_t k = 0; k < call.count; ++k)
      if (call.levels[k] == t - 1) block.keep(tail, k), block.keep(head, k);
  }
}

}  // namespace dhns::DHNS_LEVEL
