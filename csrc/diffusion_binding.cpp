// The generator's loss and all its gradients, see dhns_fast/ops/diffusion_loss.py.
#include <algorithm>
#include <vector>

#include "diffusion_cpu.h"
#include "product.h"

namespace {
using dhns::Buffer;
using dhns::ceil_div;
using dhns::data;
using dhns::kLossRows;
using dhns::Tensor;
using Tensors = std::vector<Tensor>;

// to [count] += row after row of from [rows, count].
template <class T>
void add_rows(const T* from, int64_t rows, int64_t count, T* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < count; ++j) to[j] += from[r * count + j];
}

template <class T>
Buffer<T> panels(const Tensor& table) {
  return dhns::packed<T>(data<T>(table), nullptr, table.size(0), table.size(1));
}

template <class T>
void run(const Tensors& rows, const Tensor& timesteps, const Tensors& weights, const Tensors& turned, const Tensor& loss, const Tensors& grads) {
  const auto row = [&](int i) { return data<T>(rows[i]); };
  const auto weight = [&](int i) { return data<T>(weights[i]); };
  const auto grad = [&](int i) { return grads[i].numel() ? data<T>(grads[i]) : nullptr; };
  const int64_t N = rows[0].size(0), D = rows[0].size(1), H = 4 * D;
  const int64_t* const places = data<int64_t>(timesteps);
  // What is summed over all rows is summed in parts of kLossRows, or of as many terms of a product: however many rows are at hand.
  const int64_t most = kLossRows * std::min(ceil_div(N, kLossRows), 2 * static_cast<int64_t>(torch::stable::get_num_threads())), blocks = most / kLossRows;
  const bool for_weights = grads[2].numel(), for_inputs = grads[0].numel(), any = for_weights || for_inputs;
  const Buffer<T> state = panels<T>(turned[0]), condition = panels<T>(turned[1]), output = panels<T>(turned[2]);
  const Buffer<T> to_hidden = any ? panels<T>(weights[6]) : Buffer<T>(0);
  const Buffer<T> to_state = for_inputs ? panels<T>(weights[0]) : Buffer<T>(0), to_condition = for_inputs ? panels<T>(weights[1]) : Buffer<T>(0);
  const Buffer<T> h(most * H), centred(most * H), d(any ? most * H : 0), e(most * D), moments(2 * most), biases(blocks * (H + D));
  std::vector<double> losses(blocks);
  double total = 0;
  for (int64_t first = 0; first < N; first += most) {
    const int64_t n = std::min(most, N - first), parts = ceil_div(n, kLossRows);
    std::fill_n(biases.data, blocks * (H + D), T(0));
    dhns::DiffusionLoss<T> a{};
    a.D = D, a.x = row(0) + first * D, a.c = row(1) + first * D, a.noise = row(2) + first * D, a.weight = row(3) + first, a.timesteps = places + first;
    a.state = state.data, a.condition = condition.data, a.output = output.data;
    a.to_hidden = any ? to_hidden.data : nullptr, a.to_state = for_inputs ? to_state.data : nullptr, a.to_condition = to_condition.data;
    a.time = weight(2), a.time_mean = weight(3), a.time_var = weight(4), a.bias1 = weight(5), a.bias2 = weight(7);
    a.h = h.data, a.centred = centred.data, a.d = d.data, a.e = e.data, a.by_mean = moments.data, a.by_var = moments.data + most;
    a.loss = losses.data(), a.by_bias1 = biases.data, a.by_bias2 = biases.data + blocks * H;
    if (for_inputs) a.by_x = grad(0) + first * D, a.by_c = grad(1) + first * D;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) dhns::kernels::diffusion_rows(a, b * kLossRows, std::min(n, (b + 1) * kLossRows));
    });
    for (int64_t b = 0; b < parts; ++b) total += losses[b];
    if (!for_weights) continue;
    dhns::add_product<T>({a.d, nullptr, nullptr, nullptr, H, n, D, H, true, true, grad(2), nullptr}, a.x);
    dhns::add_product<T>({a.d, nullptr, nullptr, nullptr, H, n, D, H, true, true, grad(3), nullptr}, a.c);
    dhns::add_product<T>({a.e, nullptr, nullptr, nullptr, D, n, H, D, true, true, grad(8), nullptr}, a.centred);
    torch::stable::parallel_for(0, H, 1 + dhns::kWorth / n, [&](int64_t begin, int64_t end) {
      dhns::kernels::add_to_places(a.d, a.timesteps, n, H, begin, end, grad(4));
    });
    dhns::kernels::add_to_places(a.by_mean, a.timesteps, n, 1, 0, 1, grad(5));
    dhns::kernels::add_to_places(a.by_var, a.timesteps, n, 1, 0, 1, grad(6));
    add_rows(a.by_bias1, parts, H, grad(7));
    add_rows(a.by_bias2, parts, D, grad(9));
  }
  *data<double>(loss) = total;
}

// rows: noisy, condition, noise [N, D], weight [N]; weights: in the order of the operator; turned: the transposes of state, condition and output;
// loss: float64 []; grads: of noisy, condition and the weights, zeros before, or empty.
void diffusion_loss(Tensors rows, Tensor timesteps, Tensors weights, Tensors turned, Tensor loss, Tensors grads) {
  (dhns::is_double(rows[0]) ? run<double> : run<float>)(rows, timesteps, weights, turned, loss, grads);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def(
      "diffusion_loss(Tensor[] rows, Tensor timesteps, Tensor[] weights, Tensor[] turned, Tensor(a!) loss, Tensor(b!)[] grads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("diffusion_loss", TORCH_BOX(&diffusion_loss));
}
