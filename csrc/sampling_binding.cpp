// Draws that leave out known answers, see dhns_fast/ops/sampling.py.
#include <atomic>

#include "binding.h"
#include "sampling_cpu.h"

namespace {
using dhns::data;
using dhns::Tensor;

// out[b, j]: the entity that is the floor(draw·(E − K))-th of those which are none of the K answers of query b, answers[start] − base and on.
// False where a draw or a query's answers are out of range.
bool corrupt(Tensor draw, Tensor answers, Tensor start, Tensor count, Tensor base, int64_t entities, Tensor out) {
  const int64_t batch = draw.size(0), all = answers.numel();
  const auto *const begin = data<int64_t>(start), *const number = data<int64_t>(count);
  for (int64_t b = 0; b < batch; ++b)
    if (begin[b] < 0 || number[b] < 0 || number[b] > entities || begin[b] > all - number[b]) return false;
  const dhns::Draws a{data<double>(draw), data<int64_t>(answers), begin, number, data<int64_t>(base), draw.size(1), entities, data<int64_t>(out)};
  std::atomic<bool> fit{true};
  torch::stable::parallel_for(0, batch, 64, [&](int64_t first, int64_t last) {
    if (!dhns::kernels::corrupt_rows(a, first, last)) fit = false;
  });
  return fit;
}

void find_ranges(Tensor values, Tensor lows, int64_t width, Tensor start, Tensor number) {
  const dhns::Ranges a{data<int64_t>(values), values.numel(), data<int64_t>(lows), width, data<int64_t>(start), data<int64_t>(number)};
  torch::stable::parallel_for(0, lows.numel(), 256, [&](int64_t first, int64_t last) { dhns::kernels::find_ranges(a, first, last); });
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("corrupt(Tensor draw, Tensor answers, Tensor start, Tensor count, Tensor base, int entities, Tensor(a!) out) -> bool");
  m.def("find_ranges(Tensor values, Tensor lows, int width, Tensor(a!) start, Tensor(b!) number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("corrupt", TORCH_BOX(&corrupt));
  m.impl("find_ranges", TORCH_BOX(&find_ranges));
}
