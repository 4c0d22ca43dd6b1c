#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "binding.h"
#include "denoise_cpu.h"

namespace {
using dhns::Tensor;
using Maybe = std::optional<Tensor>;

// Rows of a block: few enough for the hidden layer to stay in a core's second-level cache, and enough for weights from further away to be
// used often. Measured on Zen 3 (512 KB), one thread, GFLOP/s: D 256: 96 rows 82, 128 76, 256 70; D 512: 128 rows 77, 96 74, 48 63.
// On tiles (Sapphire Rapids, float32, two threads, ms) D 256, 512 and 1024: 128 rows 141, 182, 649, 256 142, 173, 644 with twice the memory.
int64_t block_rows(int64_t D, int64_t tile) { return D < 512 && tile < 32 ? 96 : 128; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that begins with a cache line: a vector or a row of a tile that crosses two costs two.
struct Free {
  static constexpr std::align_val_t kLine{64};
  void operator()(float* p) const { ::operator delete(p, kLine); }
};
using Memory = std::unique_ptr<float[], Free>;
Memory floats(int64_t count) { return Memory(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), Free::kLine))); }

// So many times `rows` of a weight, 65 536 numbers, are worth a thread.
int64_t grain(const dhns::Factored& weight, int64_t rows) { return 1 + 65536 / (rows * weight.k); }

bool even(const dhns::Factored& weight) {
  std::atomic<bool> all{true};
  torch::stable::parallel_for(0, weight.n, grain(weight, 1), [&](int64_t begin, int64_t end) {
    if (!dhns::kernels::even(weight, begin, end)) all = false;
  });
  return all;
}

Memory packed(const dhns::Factored& weight, dhns::Form form) {
  const int64_t width = dhns::kernels::panel(), panels = ceil_div(weight.n, width);
  Memory out = floats(panels * dhns::kernels::packed_panel(weight.k, form));
  float* const to = out.get();
  torch::stable::parallel_for(0, panels, grain(weight, width), [=](int64_t begin, int64_t end) {
    dhns::kernels::pack(to, weight, begin, end, form);
  });
  return out;
}

// Everything float32 and contiguous: out_* [M, B, D] a level, condition_* and x_T* [M, B, D], weight1 [4D, 3D], scale1 [3D], shift1 [4D, 1],
// time [T, 4D], time_mean and time_var [T, 1], bias1 [4D], weight2 [D, 4D], scale2 [4D], shift2 [D, 1], bias2 [D],
// noise_* [T − 1, M, B, D]; seed int64 [1].
void denoise_chain(std::vector<Tensor> out_head, std::vector<Tensor> out_tail, const Tensor condition_head, const Tensor condition_tail,
                   const Tensor weight1, const Tensor scale1, const Tensor shift1, const Tensor time, const Tensor time_mean,
                   const Tensor time_var, const Tensor bias1, const Tensor weight2, const Tensor scale2, const Tensor shift2,
                   const Tensor bias2, std::vector<double> mean_scale,
                   std::vector<double> noise_scale, std::vector<double> sigma,
                   std::vector<double> slope, std::vector<double> width, std::vector<int64_t> levels, const Tensor seed,
                   int64_t row_offset, Maybe x_T, Maybe x_T_head, Maybe noise_tail, Maybe noise_head, bool release, bool bf16) {
  const auto given = [](const Maybe& x) -> const float* { return x ? dhns::data<float>(*x) : nullptr; };
  const auto pointers = [](const std::vector<Tensor>& tensors) {
    std::vector<float*> out;
    for (const Tensor& x : tensors) out.push_back(dhns::data<float>(x));
    return out;
  };
  const std::vector<float*> heads = pointers(out_head), tails = pointers(out_tail);
  const int64_t D = bias2.size(0);
  // A third of W₁'s columns each: of the state, of the time and of the condition.
  const auto third = [&](int64_t first) {
    return dhns::Factored{dhns::data<float>(weight1) + first, dhns::data<float>(scale1) + first, dhns::data<float>(shift1), 3 * D, 4 * D, D};
  };
  const dhns::Factored state = third(0), fixed = third(2 * D);
  const dhns::Factored output{dhns::data<float>(weight2), dhns::data<float>(scale2), dhns::data<float>(shift2), 4 * D, D, 4 * D};
  dhns::Form form = dhns::kernels::best_form(bf16);
  if (form == dhns::Form::kDigits && !(even(state) && even(fixed) && even(output))) form = dhns::Form::kFloats;
  const Memory w_state = packed(state, form), w_output = packed(output, form);
  dhns::Denoise call{};
  call.D = D, call.T = time.size(0), call.batch = condition_tail.size(1), call.N = condition_tail.size(0) * call.batch;
  call.state = w_state.get(), call.fixed = fixed, call.output = w_output.get();
  call.time = dhns::data<float>(time), call.time_mean = dhns::data<float>(time_mean), call.time_var = dhns::data<float>(time_var);
  call.bias1 = dhns::data<float>(bias1), call.bias2 = dhns::data<float>(bias2);
  call.mean_scale = mean_scale.data(), call.noise_scale = noise_scale.data(), call.sigma = sigma.data();
  call.slope = slope.empty() ? nullptr : slope.data(), call.width = width.data();
  call.levels = levels.data(), call.count = static_cast<int64_t>(levels.size()), call.last = *std::min_element(levels.begin(), levels.end());
  call.seed = static_cast<uint64_t>(*dhns::data<int64_t>(seed)), call.row_offset = static_cast<uint64_t>(row_offset);
  call.release = release, call.form = form;
  // Streams as dhns_fast/ops/noise.py numbers them: x_T 0, x_T of the head 1, tail 2, head 3.
  call.tail = {dhns::data<float>(condition_tail), given(x_T), given(noise_tail), tails.data(), 0, 2};
  call.head = {dhns::data<float>(condition_head), given(x_T_head), given(noise_head), heads.data(), 1, 3};

  // As many blocks as give every thread the same number, of equal size up to whole tiles.
  const int64_t tile = dhns::kernels::tile_rows(form), threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t blocks = ceil_div(ceil_div(call.N, block_rows(call.D, tile)), threads) * threads;
  const int64_t rows = std::max(ceil_div(ceil_div(call.N, blocks), tile) * tile, tile);
  const int64_t scratch = dhns::kernels::scratch(call.D, rows, form, release);
  torch::stable::parallel_for(0, ceil_div(call.N, rows), 1, [&](int64_t begin, int64_t end) {
    const Memory memory = floats(scratch);
    for (int64_t b = begin; b < end; ++b)
      dhns::kernels::denoise_block(call, b * rows, std::min((b + 1) * rows, call.N), memory.get());
  });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def(
      "denoise_chain(Tensor(a!)[] out_head, Tensor(b!)[] out_tail, Tensor condition_head, Tensor condition_tail, Tensor weight1, Tensor scale1, "
      "Tensor shift1, Tensor time, Tensor time_mean, Tensor time_var, Tensor bias1, Tensor weight2, Tensor scale2, Tensor shift2, "
      "Tensor bias2, float[] mean_scale, float[] noise_scale, "
      "float[] sigma, float[] slope, float[] width, int[] levels, Tensor seed, int row_offset, Tensor? x_T, Tensor? x_T_head, Tensor? noise_tail, Tensor? noise_head, "
      "bool release, bool bf16) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("denoise_chain", TORCH_BOX(&denoise_chain));
}
