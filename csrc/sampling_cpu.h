#pragma once
#include <cstdint>

namespace dhns {

// Draws [B, columns] to be made entities that are no answers, see dhns_fast/ops/sampling.py.
struct Draws {
  const double* draw;
  const int64_t *answers, *start, *number, *base;  // the last three [B]
  int64_t columns, entities;
  int64_t* out;  // as draw
};

// For each of lows [B]: where the numbers from it to below it + width stand among `count` rising values, and how many they are.
struct Ranges {
  const int64_t* values;
  int64_t count;
  const int64_t* lows;
  int64_t width;
  int64_t *start, *number;
};
}  // namespace dhns

namespace dhns::kernels {
// Rows first .. last − 1. False where a draw is not in [0, 1): what its row gets is no entity then.
bool corrupt_rows(const Draws& a, int64_t first, int64_t last);
// Lows first .. last − 1.
void find_ranges(const Ranges& a, int64_t first, int64_t last);
}  // namespace dhns::kernels
