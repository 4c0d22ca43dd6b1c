// The numbers by which Python names reductions and interactions: the places of their names in dhns_fast/catalogue.py and of the codes in
// dhns_fast/ops/hal.py. A test reads this file.
#pragma once
#include <cstdint>

namespace dhns {

enum Reduction : int64_t { kDot, kL2, kL1, kComplexL1 };
enum Interaction : int64_t { kTransE1, kTransE2, kDistMult, kComplEx, kRotatE };

}  // namespace dhns
