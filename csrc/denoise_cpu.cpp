// The sampling chain for a block of rows, float32: all T steps while the block's activations stay in this core's cache.
//
// A step is two matrix products with packed weights, and passes over rows beside them, which cost 1/D of the products:
//     h = relu((x·Vxᵀ + c·Vcᵀ + τ·Vτᵀ)/σ + b₁′) − p        x ← mean_scale·x − noise_scale·(h·Gᵀ/σ₂ + b₂′) + sigma·z
// h is made from a panel's columns of the first product while these are in the first-level cache, and written once, as the second one reads it.
// G's rows are centred, so that what is taken from all of a row of h does not matter: p, the mean of the row's first columns, keeps its sums
// from cancelling.
// A row's sums run in one fixed order whatever the block around it, so results are the same bits for every split of a batch. Processors with
// matrix tiles compute both precisions on them (bf16_cpu.h, digits.h), others float32 in vectors; bfloat16 operands are rounded floats where
// nothing multiplies them.
#include "denoise_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "digits.h"
#include "noise_cpu.h"

namespace dhns::kernels {
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
// Of bfloat16: 32 rows and a panel are 16 KB each, and stay in the first-level cache (Sapphire Rapids: 5 % faster than 512).
constexpr int64_t kHalfDepth = 256;
// Of digits: columns that share a scale, which their largest number has to be known for. Sapphire Rapids, two threads, ms for D 512 and 1024: 512
// columns 181 and 700, 1024 180 and 650, 2048 178 and 660.
constexpr int64_t kDigitColumns = 1024;
constexpr float kEpsilon = 1e-5f;

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float Loose __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

inline Vec load(const float* p) { return (Vec) * reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

// By halves: one lane after the other waits for 15 additions, five times a row and step.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
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

bool in_blocks(Form form) { return form == Form::kHalves || form == Form::kDigits; }

// Columns of an operand that go into a product before its sums are put down.
int64_t depth_of(Form form) { return form == Form::kDigits ? kDigitColumns : form == Form::kHalves ? kHalfDepth : kDepth; }

// Blocks of digits of some rows, and the scales of these, [parts of kDigitColumns, rows].
struct Digits {
  int8_t* blocks;
  float* scales;
  int64_t rows, next;  // bytes from one block of rows to the next

  static int64_t bytes(int64_t rows, int64_t k) { return rows / kBlockRows * digit_blocks(k) * kDigitBlock; }
  static int64_t parts(int64_t k) { return (k + kDigitColumns - 1) / kDigitColumns; }
  int8_t* at(int64_t row, int64_t column) const {
    return blocks + row / kBlockRows * next + row % kBlockRows * kDigitDepth + column / kDigitDepth * kDigitBlock;
  }
  // Columns `first`, which begins a part, to n − 1 of row r, from x on.
  void put(int64_t r, const float* x, int64_t first, int64_t n) const {
    for (; first < n; first += kDigitColumns, x += kDigitColumns)
      scales[first / kDigitColumns * rows + r] = put_digit_row(at(r, first), x, n - first < kDigitColumns ? n - first : kDigitColumns);
  }
};

// The left operand of a product: rows of floats, or blocks.
struct Operand {
  Form form;
  const float* floats;
  int64_t stride;
  const Half* halves;
  Digits digits;
};

// c [rows, stride_c] (+)= columns k0 .. k0 + depth − 1 of a, times that part of a panel.
void by_panel(const Operand& a, const float* panel, float* c, int64_t stride_c, int64_t rows, int64_t k, int64_t k0, int64_t depth) {
  if (a.form == Form::kDigits) {
    const int8_t* const bytes = reinterpret_cast<const int8_t*>(panel);
    digits_product(a.digits.at(0, k0), a.digits.next, rows, bytes + k0 / kDigitDepth * 2 * kDigitBlock, digit_blocks(depth),
                   a.digits.scales + k0 / kDigitColumns * a.digits.rows, digit_scales(bytes, k), c, stride_c, k0 > 0);
  } else if (a.form == Form::kHalves) {
    const int64_t next = blocks_of(k) * kBlock, first = k0 / kBlockDepth * kBlock;
    for (int64_t row = 0; row < rows; row += kHalfRows)
      half_tile(a.halves + row / kBlockRows * next + first, next, reinterpret_cast<const Half*>(panel) + k0 * kHalfPanel, blocks_of(depth),
                c + row * stride_c, stride_c, k0 > 0);
  } else {
    for (int64_t row = 0; row < rows; row += kRows)
      tile_of<kRows>(rows - row < kRows ? rows - row : kRows, a.floats + row * a.stride + k0, a.stride, panel + k0 * kPanel, depth,
                     c + row * stride_c, stride_c, k0 > 0);
  }
}

// Floats of memory that a packed panel of k columns takes.
int64_t panel_size(int64_t k, Form form) {
  if (form == Form::kDigits) return digit_panel(k) / static_cast<int64_t>(sizeof(float));
  return form == Form::kHalves ? blocks_of(k) * kBlockDepth * kHalfPanel / 2 : k * kPanel;
}

// c [rows, stride_of(n)] = a [rows, k] · packed weightᵀ.
void product(const Operand& a, const float* packed, float* c, int64_t rows, int64_t n, int64_t k) {
  const int64_t stride_c = stride_of(n), panel = panel_size(k, a.form), most = depth_of(a.form);
  for (int64_t k0 = 0; k0 < k; k0 += most)
    for (int64_t column = 0; column < n; column += kPanel)
      by_panel(a, packed + column / kPanel * panel, c + column, stride_c, rows, k, k0, k - k0 < most ? k - k0 : most);
}

// strip [rows, kPanel] = a [rows, k] · panel.
void product_strip(const Operand& a, const float* panel, float* strip, int64_t rows, int64_t k) {
  const int64_t most = depth_of(a.form);
  for (int64_t k0 = 0; k0 < k; k0 += most) by_panel(a, panel, strip, kPanel, rows, k, k0, k - k0 < most ? k - k0 : most);
}

// A column of a panel, row i of a weight, as blocks of it have it: f(j, x) puts numbers j .. j + n − 1. Zero beyond the weight.
template <int64_t n, class F>
void each_line(const Factored& w, int64_t i, int64_t padded, F f) {
  for (int64_t j = 0; j < padded; j += n) {
    alignas(64) float line[n] = {};
    const int64_t count = i >= w.n ? 0 : w.k - j < n ? w.k - j : n;
    for (int64_t l = 0; l < count; ++l) line[l] = w(i, j + l);
    f(j, line);
  }
}

#if defined(DHNS_HAS_BF16)
void pack_halves(Half* to, const Factored& w, int64_t first) {
  for (int64_t i = 0; i < kPanel; ++i)
    each_line<kBlockDepth>(w, first + i, blocks_of(w.k) * kBlockDepth, [=](int64_t j, const float* x) {
      alignas(64) Half line[kBlockDepth];
      put_halves(line, _mm512_load_ps(x), _mm512_load_ps(x + kWidth));
      for (int64_t pair = 0; pair < kBlockDepth / 2; ++pair) std::memcpy(to + (j / 2 + pair) * 2 * kHalfPanel + 2 * i, line + 2 * pair, 4);
    });
}

void pack_digits(int8_t* to, const Factored& w, int64_t first) {
  const int64_t padded = digit_blocks(w.k) * kDigitDepth;
  float* const scales = digit_scales(to, w.k);
  for (int64_t i = 0; i < kPanel; ++i) {
    __m512i largest = _mm512_setzero_si512();
    each_line<16>(w, first + i, padded, [&](int64_t, const float* x) { largest = _mm512_max_epu32(largest, magnitude(_mm512_load_ps(x))); });
    const Scale scale(_mm512_reduce_max_epu32(largest));
    scales[i] = scale.scale;
    each_line<kDigitDepth>(w, first + i, padded, [=](int64_t j, const float* x) {
      alignas(64) int8_t digits[kDigits * kDigitDepth];
      const __m512 line[4] = {_mm512_load_ps(x), _mm512_load_ps(x + 16), _mm512_load_ps(x + 32), _mm512_load_ps(x + 48)};
      put_digits(digits, kDigitDepth, line, _mm512_set1_ps(scale.factor));
      int8_t* const block = to + (j / kDigitDepth * 2 + i / kBlockRows) * kDigitBlock + i % kBlockRows * 4;
      for (int64_t four = 0; four < kDigits * kDigitDepth / 4; ++four) std::memcpy(block + four * kDigitDepth, digits + 4 * four, 4);
    });
  }
}
#else
void pack_halves(Half*, const Factored&, int64_t) {}
void pack_digits(int8_t*, const Factored&, int64_t) {}
#endif

// Folded weights as panel number `panel`: floats [k][kPanel], or blocks as bf16_cpu.h and digits.h have them; zero beyond n.
void pack_panel(float* out, const Factored& w, int64_t panel, Form form) {
  constexpr int64_t kLine = 16;  // of a row of weights at a time: a cache line is read whole
  const int64_t first = panel * kPanel;
  if (form == Form::kHalves) return pack_halves(reinterpret_cast<Half*>(out), w, first);
  if (form == Form::kDigits) return pack_digits(reinterpret_cast<int8_t*>(out), w, first);
  for (int64_t j0 = 0; j0 < w.k; j0 += kLine)
    for (int64_t i = 0; i < kPanel; ++i)
      for (int64_t j = j0; j < w.k && j < j0 + kLine; ++j) {
        const float x = first + i < w.n ? w(first + i, j) : 0.0f;
        out[j * kPanel + i] = form == Form::kRounded ? round_bf16(x) : x;
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

// Where a row of an operand goes, two vectors or a number at a time: floats, rounded or not, or blocks of bfloat16.
template <bool kRounded>
struct Floats {
  float* begin;
  void operator()(int64_t j, float x) const { begin[j] = kRounded ? round_bf16(x) : x; }
  void operator()(int64_t j, Vec low, Vec high) const {
    store(begin + j, low), store(begin + j + kWidth, high);
    for (int64_t i = j; kRounded && i < j + kPanel; ++i) begin[i] = round_bf16(begin[i]);
  }
};
struct Halves {
  Half* begin;
  Halves(Half* blocks, int64_t row, int64_t k) : begin(blocks + row / kBlockRows * blocks_of(k) * kBlock + row % kBlockRows * kBlockDepth) {}
  void operator()(int64_t j, float x) const { begin[j / kBlockDepth * kBlock + j % kBlockDepth] = half(x); }
  void operator()(int64_t j, Vec low, Vec high) const {
#if defined(DHNS_HAS_BF16)
    static_assert(kBlockDepth == 2 * kWidth, "two vectors are a row of a block");
    put_halves(begin + j / kBlockDepth * kBlock, (__m512)low, (__m512)high);
#endif
  }
};

template <class Row>
void put_row(const float* x, Row out, int64_t n) {
  int64_t i = 0;
  for (; i + kPanel <= n; i += kPanel) out(i, load(x + i), load(x + i + kWidth));
  for (; i < n; ++i) out(i, x[i]);
}

// Sums over a row of the hidden layer, of h − pivot and of its square, and 1/σ of what the layer is made of.
struct alignas(64) Sums {
  Vec first, second;
  float rstd, pivot;
};

// The rows of one side of a block.
struct Side {
  const DenoiseSide& call;
  float *fixed, *x;  // c·Vcᵀ in strips [panels, padded rows, kPanel], state [rows, D]
  Moments *condition, *state;
};

// Memory of a block, taken in lines of the cache.
class Lines {
 public:
  explicit Lines(float* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    float* const out = memory_ ? memory_ + taken_ : nullptr;
    taken_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return reinterpret_cast<T*>(out);
  }
  int64_t taken() const { return taken_; }

 private:
  float* const memory_;
  int64_t taken_ = 0;
};

// What a block of rows keeps. Without memory: how much that is.
struct Room {
  Lines lines;
  Form form;
  int64_t padded, part, blocks_state, blocks_hidden;  // part: columns of the hidden layer that are made at once
  float *tail_fixed, *head_fixed, *tail_x, *head_x, *h, *e, *z, *rounded, *panel, *strip;
  Moments *tail_condition, *tail_state, *head_condition, *head_state;
  Sums* sums;
  Half *state, *hidden;
  Digits state_digits, hidden_digits;

  Room(float* memory, int64_t D, int64_t rows, Form form, bool release)
      : lines(memory), form(form), padded((rows + kHalfRows - 1) / kHalfRows * kHalfRows),
        part(form == Form::kDigits && kDigitColumns < 4 * D ? kDigitColumns : 4 * D),
        blocks_state(form == Form::kHalves ? padded / kBlockRows * blocks_of(D) * kBlock : 0),
        blocks_hidden(form == Form::kHalves ? padded / kBlockRows * blocks_of(4 * D) * kBlock : 0) {
    const auto floats = [this](int64_t count) { return lines.take<float>(count); };
    const auto digits = [this, form](int64_t k) {
      const int64_t parts = form == Form::kDigits ? Digits::parts(k) : 0;
      return Digits{lines.take<int8_t>(parts ? Digits::bytes(padded, k) : 0), lines.take<float>(parts * padded), padded,
                    digit_blocks(k) * kDigitBlock};
    };
    const int64_t wide = (4 * D + kPanel - 1) / kPanel * kPanel * padded;
    tail_fixed = floats(wide), head_fixed = floats(wide), tail_x = floats(rows * D), head_x = floats(release ? 0 : rows * D);
    z = floats(D), rounded = floats(form == Form::kRounded ? rows * D : 0), strip = floats(padded * kPanel);
    for (auto pairs : {&tail_condition, &tail_state, &head_condition, &head_state}) *pairs = lines.take<Moments>(rows);
    sums = lines.take<Sums>(rows), state = lines.take<Half>(blocks_state), hidden = lines.take<Half>(blocks_hidden);
    state_digits = digits(D), hidden_digits = digits(4 * D);
    // Where the hidden layer itself is not what the second product reads, it is gone by then, and not there yet while conditions are multiplied.
    const int64_t sizes[] = {form == Form::kHalves ? 0 : rows * stride_of(part), padded * stride_of(D), panel_size(D, form)};
    if (form == Form::kDigits) {
      h = e = panel = floats(*std::max_element(sizes, sizes + 3));
    } else {
      h = floats(sizes[0]), e = floats(sizes[1]), panel = floats(sizes[2]);
    }
  }
};

struct Block : Room {
  const Denoise& call;
  const int64_t begin, rows, D = call.D, hidden_stride = stride_of(part), out_stride = stride_of(D);

  Block(const Room& room, const Denoise& call, int64_t begin, int64_t rows) : Room(room), call(call), begin(begin), rows(rows) {}

  // put(r, where row r of an operand goes), by what the operand is made of: `blocks` of k columns, or `floats`.
  template <class Put>
  void each_row(Half* blocks, float* floats, int64_t stride, int64_t k, Put put) const {
    const auto all = [&](auto row) {
      for (int64_t r = 0; r < rows; ++r) put(r, row(r));
    };
    if (form == Form::kHalves)
      all([=](int64_t r) { return Halves(blocks, r, k); });
    else if (form == Form::kRounded)
      all([=](int64_t r) { return Floats<true>{floats + r * stride}; });
    else
      all([=](int64_t r) { return Floats<false>{floats + r * stride}; });
  }

  // x [rows, D] itself, or as digits or in bfloat16.
  Operand operand(const float* x, Half* blocks, const Digits& digits, float* floats) const {
    if (form == Form::kDigits)
      for (int64_t r = 0; r < rows; ++r) digits.put(r, x + r * D, 0, D);
    else if (form != Form::kFloats)
      each_row(blocks, floats, D, D, [=](int64_t r, auto row) { put_row(x + r * D, row, D); });
    return {form, form == Form::kFloats ? x : floats, D, blocks, digits};
  }

  void draw(float* out, int64_t r, uint32_t stream, int64_t t) const {
    const int64_t row = begin + r, modality = row / call.batch;
    const auto last = static_cast<uint32_t>(modality << 18 | t << 2 | stream);
    philox_normal(out, call.seed, last, call.row_offset + static_cast<uint64_t>(row - modality * call.batch), 1, D);
  }

  // The conditions' products happen once: their weights are packed on the way, panel by panel, and take no memory.
  void conditions(const Side& tail, const Side& head) const {
    // What the first step overwrites has room for the second operand.
    Digits second = hidden_digits;
    second.next = state_digits.next;
    const Operand operands[] = {operand(tail.call.condition + begin * D, state, state_digits, rounded),
                                operand(head.call.condition + begin * D, hidden, second, h)};
    float* const out[] = {tail.fixed, head.fixed};
    for (int64_t i = 0; i * kPanel < 4 * D; ++i) {
      pack_panel(panel, call.fixed, i, form);
      for (int side = 0; side < 2; ++side) product_strip(operands[side], panel, out[side] + i * padded * kPanel, rows, D);
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

  // A strip's rows of the hidden layer, from its product, on their way into the second operand, where they go to column `to`. NaN stays NaN.
  void activate(const float* fixed, const float* time, const float* bias, int64_t column, int64_t to) const {
    const int64_t n = 4 * D - column;
    if (n >= kPanel) {
      const Vec time0 = load(time + column), time1 = load(time + column + kWidth);
      const Vec bias0 = load(bias + column), bias1 = load(bias + column + kWidth);
      each_row(hidden, h, hidden_stride, 4 * D, [=](int64_t r, auto row) {
        const float *const c = strip + r * kPanel, *const f = fixed + r * kPanel;
        Sums& s = sums[r];
        const Vec scale = splat(s.rstd);
        Vec v = (load(c) + load(f) + time0) * scale + bias0, w = (load(c + kWidth) + load(f + kWidth) + time1) * scale + bias1;
        v = v < Vec{} ? Vec{} : v, w = w < Vec{} ? Vec{} : w;
        if (column == 0) s.first = s.second = Vec{}, s.pivot = sum(v + w) / static_cast<float>(kPanel);
        v -= splat(s.pivot), w -= splat(s.pivot);
        row(to, v, w);
        s.first += v + w, s.second += v * v + w * w;
      });
      return;
    }
    each_row(hidden, h, hidden_stride, 4 * D, [=](int64_t r, auto row) {
      const float *const c = strip + r * kPanel, *const f = fixed + r * kPanel;
      Sums& s = sums[r];
      float line[kPanel], total = 0;
      for (int64_t j = 0; j < n; ++j) {
        const float x = (c[j] + f[j] + time[column + j]) * s.rstd + bias[column + j];
        total += line[j] = x < 0 ? 0 : x;
      }
      if (column == 0) s.first = s.second = Vec{}, s.pivot = total / static_cast<float>(n);
      for (int64_t j = 0; j < n; ++j) {
        const float x = line[j] - s.pivot;
        row(to + j, x);
        s.first[0] += x, s.second[0] += x * x;
      }
    });
  }

  // One denoising step at time t from x, whose moments `from` holds.
  void step(const Side& side, const float* x, const Moments* from, int64_t t) const {
    const int64_t at = t - 1;
    const Moments time{call.time_mean[at], call.time_var[at]};
    for (int64_t r = 0; r < rows; ++r) sums[r].rstd = merged_rstd(from[r], time, side.condition[r]);
    const Operand from_state = operand(x, state, state_digits, rounded);
    for (int64_t first = 0; first < 4 * D; first += part) {
      const int64_t last = std::min(first + part, 4 * D);
      for (int64_t column = first; column < last; column += kPanel) {
        const int64_t i = column / kPanel;
        product_strip(from_state, call.state + i * panel_size(D, form), strip, rows, D);
        activate(side.fixed + i * padded * kPanel, call.time + at * 4 * D, call.bias1, column, column - first);
      }
      for (int64_t r = 0; form == Form::kDigits && r < rows; ++r) hidden_digits.put(r, h + r * hidden_stride, first, last);
    }
    product({form, h, hidden_stride, hidden, hidden_digits}, call.output, e, rows, D, 4 * D);
    const auto keep = static_cast<float>(call.mean_scale[at]), take = static_cast<float>(call.noise_scale[at]);
    const auto spread = static_cast<float>(call.sigma[at]);
    for (int64_t r = 0; r < rows; ++r) {
      const float n = static_cast<float>(4 * D), mean = sum(sums[r].first) / n, var = sum(sums[r].second) / n - mean * mean;
      // Rounding may leave a variance of nothing below it.
      const float scale = 1.0f / std::sqrt((var < 0 ? 0 : var) + kEpsilon);
      float* const out = side.x + r * D;
      const float *const in = x + r * D, *const noise = e + r * out_stride;
      const float* const bias = call.bias2;
      if (call.slope) {
        const auto slope = static_cast<float>(call.slope[at]), width = static_cast<float>(call.width[at]);
        for (int64_t j = 0; j < D; ++j) {
          const float centre = slope * in[j], low = centre - width, high = centre + width;
          float guess = noise[j] * scale + bias[j];
          guess = guess < low ? low : guess;  // NaN stays NaN
          guess = guess > high ? high : guess;
          out[j] = keep * in[j] - take * guess;
        }
      } else {
        for (int64_t j = 0; j < D; ++j) out[j] = keep * in[j] - take * (noise[j] * scale + bias[j]);
      }
      if (t > 1 && spread != 0) {
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
    float* const out = side.call.out[level] + begin * D;
    if (out != side.x) std::memcpy(out, side.x, static_cast<size_t>(rows * D) * sizeof(float));
  }
};

}  // namespace

int64_t panel() { return kPanel; }
Form best_form(bool bf16) {
  if (bf16) return bf16_unit() == kNoBf16 ? Form::kRounded : Form::kHalves;
  return bf16_unit() == kTiles ? Form::kDigits : Form::kFloats;
}

bool even(const Factored& w, int64_t first, int64_t last) {
  // A normal distribution's largest of some thousand numbers is 4 deviations, one number of 1024 among zeros 32. The error grows with it.
  constexpr float kMost = 10;
  for (int64_t i = first; i < last; ++i) {
    Vec squares{}, largest{};
    each_line<kWidth>(w, i, w.k, [&](int64_t, const float* x) {
      const Vec square = load(x) * load(x);
      squares += square, largest = square > largest ? square : largest;
    });
    float most = 0;
    for (int l = 0; l < kWidth; ++l) most = std::max(most, largest[l]);
    // In this form what is not a number is not even.
    if (!(most * static_cast<float>(w.k) <= kMost * kMost * sum(squares))) return false;
  }
  return true;
}
int64_t tile_rows(Form form) { return in_blocks(form) ? kHalfRows : kRows; }
int64_t packed_panel(int64_t k, Form form) { return panel_size(k, form); }

void pack(float* out, const Factored& weight, int64_t first, int64_t last, Form form) {
  for (int64_t panel = first; panel < last; ++panel) pack_panel(out + panel * panel_size(weight.k, form), weight, panel, form);
}

int64_t scratch(int64_t D, int64_t rows, Form form, bool release) { return Room(nullptr, D, rows, form, release).lines.taken(); }

void denoise_block(const Denoise& call, int64_t begin, int64_t end, float* memory) {
  const int64_t rows = end - begin;
  const Room room(memory, call.D, rows, call.form, call.release);
  const TileRegisters registers(in_blocks(room.form) && bf16_unit() == kTiles);
  // What pads k is multiplied by zeros, which takes it to be a number.
  std::memset(room.state, 0, static_cast<size_t>(room.blocks_state) * sizeof(Half));
  std::memset(room.hidden, 0, static_cast<size_t>(room.blocks_hidden) * sizeof(Half));
  const Side tail{call.tail, room.tail_fixed, room.tail_x, room.tail_condition, room.tail_state};
  Side head{call.head, room.head_fixed, room.head_x, room.head_condition, room.head_state};
  const Block block(room, call, begin, rows);
  block.conditions(tail, head);
  block.start(tail, true);
  block.start(head, !call.release);
  for (int64_t t = call.T; t > call.last; --t) {
    block.step(tail, tail.x, tail.state, t);
    bool wanted = false;
    for (int64_t k = 0; k < call.count; ++k) {
      if (call.levels[k] != t - 1) continue;
      wanted = true;
      if (call.release) head.x = call.head.out[k] + begin * call.D;
    }
    // "release": the head is one more step from the tail's new state, made where it is to go. "corrected": it has a chain of its own.
    const Side& from = call.release ? tail : head;
    if (wanted || !call.release) block.step(head, from.x, from.state, t);
    for (int64_t k = 0; k < call.count; ++k)
      if (call.levels[k] == t - 1) block.keep(tail, k), block.keep(head, k);
  }
}

}  // namespace dhns::kernels
