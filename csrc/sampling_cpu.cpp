// Draws that leave out known answers, and where these stand, see dhns_fast/ops/sampling.py.
#include "sampling_cpu.h"

#include <algorithm>
#include <initializer_list>

namespace dhns::kernels {
namespace {

// As many answers as are gone through faster than searched: whether one lies below a draw is a coin's toss, which no processor guesses.
constexpr int64_t kFew = 128;
// Draws at a time, whose counts stay in registers or the first-level cache.
constexpr int64_t kDraws = 64;
// Searches that go side by side, so that one waits for memory while the others do: of a table beyond the caches each step is a miss.
constexpr int64_t kSearches = 32;

// u += #{i : answer_i − i <= u} for each of n draws, kDraws (kWhole) or fewer, of answers less `base`.
template <bool kWhole>
void pass_few(int64_t* u, int64_t draws, const int64_t* answers, int64_t count, int64_t base) {
  const int64_t n = kWhole ? kDraws : draws;
  int64_t passed[kDraws] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t gap = answers[i] - base - i;
    for (int64_t j = 0; j < n; ++j) passed[j] += gap <= u[j];
  }
  for (int64_t j = 0; j < n; ++j) u[j] += passed[j];
}

void pass_many(int64_t* u, int64_t n, const int64_t* answers, int64_t count, int64_t base) {
  for (int64_t j = 0; j < n; ++j) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (answers[middle] - base - middle <= u[j])
        low = middle + 1;
      else
        high = middle;
    }
    u[j] += low;
  }
}

}  // namespace

bool corrupt_rows(const Draws& a, int64_t first, int64_t last) {
  bool fit = true;
  for (int64_t b = first; b < last; ++b) {
    // A query that knows every entity is corrupted unfiltered.
    const int64_t known = a.number[b] == a.entities ? 0 : a.number[b];
    const auto free = static_cast<double>(a.entities - known);
    for (int64_t column = 0; column < a.columns; column += kDraws) {
      const int64_t n = std::min(kDraws, a.columns - column);
      const double* const draw = a.draw + b * a.columns + column;
      int64_t* const u = a.out + b * a.columns + column;
      int64_t outside = 0;
      for (int64_t j = 0; j < n; ++j) {
        const bool inside = draw[j] >= 0 && draw[j] < 1;
        outside += !inside;
        u[j] = static_cast<int64_t>((inside ? draw[j] : 0.0) * free);
      }
      fit &= !outside;
      if (known) (known > kFew ? pass_many : n == kDraws ? pass_few<true> : pass_few<false>)(u, n, a.answers + a.start[b], known, a.base[b]);
    }
  }
  return fit;
}

void find_ranges(const Ranges& a, int64_t first, int64_t last) {
  for (int64_t begin = first; begin < last; begin += kSearches) {
    const int64_t n = std::min(kSearches, last - begin);
    // The first value that is not below a low is at `from` or among the `left` behind it. A step is taken without a branch: that would be guessed
    // wrong every other time (5 000 000 values: 190 ns a search, 123 without; 10 000: 95 and 25).
    const int64_t *from[kSearches], *const end = a.values + a.count;
    std::fill_n(from, n, a.values);
    for (int64_t left = a.count; left > 1; left -= left / 2)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t half = left / 2;
        from[i] += half & -static_cast<int64_t>(from[i][half - 1] < a.lows[begin + i]);
        __builtin_prefetch(from[i] + (left - half) / 2 - 1);
      }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t low = a.lows[begin + i];
      const int64_t* const p = from[i] + (a.count && *from[i] < low);
      // Few values are the rule: by steps that double as long as all of them are inside, then by halves of the last one.
      int64_t number = 0, step = 1;
      const auto inside = [&] {
        const int64_t* const at = p + number + step;
        return at <= end && static_cast<uint64_t>(at[-1]) - static_cast<uint64_t>(low) < static_cast<uint64_t>(a.width);
      };
      for (; inside(); step *= 2) number += step;
      for (step /= 2; step; step /= 2)
        if (inside()) number += step;
      a.start[begin + i] = p - a.values;
      a.number[begin + i] = number;
    }
  }
}

}  // namespace dhns::kernels
