// Corruptions that leave out known answers, see dhns_fast/ops/sampling.py.
#include <algorithm>

#include "binding.h"

namespace {
using dhns::data;
using dhns::Tensor;

// As many answers as are gone through faster than searched: whether one lies below a draw is a coin's toss, which no processor guesses.
constexpr int64_t kFew = 16;

// out[b, j]: the entity that is the floor(draw·(E − K))-th of those which are none of the K answers of query b, answers[start] − base and on.
// False, with nothing written, where a draw or a query's answers are out of range.
bool corrupt(Tensor draw, Tensor answers, Tensor start, Tensor count, Tensor base, int64_t entities, Tensor out) {
  const int64_t batch = draw.size(0), columns = draw.size(1), all = answers.numel();
  const auto* const uniform = data<double>(draw);
  const auto *const answer = data<int64_t>(answers), *const begin = data<int64_t>(start), *const number = data<int64_t>(count),
             *const offset = data<int64_t>(base);
  for (int64_t b = 0; b < batch; ++b)
    if (begin[b] < 0 || number[b] < 0 || number[b] > entities || begin[b] > all - number[b]) return false;
  if (!std::all_of(uniform, uniform + draw.numel(), [](double x) { return x >= 0 && x < 1; })) return false;
  auto* const to = data<int64_t>(out);
  torch::stable::parallel_for(0, batch, 64, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      // A query that knows every entity is corrupted unfiltered.
      const int64_t known = number[b] == entities ? 0 : number[b], free = entities - known;
      const int64_t* const k = answer + begin[b];
      for (int64_t j = 0; j < columns; ++j) {
        const auto u = static_cast<int64_t>(uniform[b * columns + j] * static_cast<double>(free));
        int64_t low = 0, high = known;
        if (known <= kFew) {
          for (int64_t i = 0; i < known; ++i) low += k[i] - offset[b] - i <= u;
        } else {
          while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (k[middle] - offset[b] - middle <= u)
              low = middle + 1;
            else
              high = middle;
          }
        }
        to[b * columns + j] = u + low;
      }
    }
  });
  return true;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("corrupt(Tensor draw, Tensor answers, Tensor start, Tensor count, Tensor base, int entities, Tensor(a!) out) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) { m.impl("corrupt", TORCH_BOX(&corrupt)); }
