// Indices into a table, grouped by the row that they mean.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace dhns {

// Memory whose every element is written before it is read: a step sorts some 5 MB, and clearing them first takes as long as sorting.
template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

inline int bits_of(uint64_t x) {
  int bits = 0;
  for (; x; x >>= 1) ++bits;
  return bits;
}

// A stable radix sort of keys that hold a row above `low` other bits, which are left as they are.
inline void sort_by_row(std::unique_ptr<uint64_t[]>& keys, int64_t n, int low, uint64_t highest) {
  // Twelve bits at a time at most: as many counts as the first-level cache holds.
  const int total = bits_of(highest), passes = (total + 11) / 12, width = passes ? (total + passes - 1) / passes : 0;
  const uint64_t mask = (uint64_t{1} << width) - 1;
  auto other = scratch<uint64_t>(n);
  std::vector<int64_t> count(mask + 1);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = low + pass * width;
    std::fill(count.begin(), count.end(), int64_t{0});
    for (int64_t i = 0; i < n; ++i) ++count[keys[i] >> shift & mask];
    int64_t sum = 0;
    for (int64_t& c : count) sum += std::exchange(c, sum);
    for (int64_t i = 0; i < n; ++i) other[count[keys[i] >> shift & mask]++] = keys[i];
    keys.swap(other);
  }
}

// Ids grouped by row: the places of each row, in their order.
class Sorted {
 public:
  Sorted(const int64_t* ids, int64_t n) : low_(bits_of(static_cast<uint64_t>(n))), keys_(scratch<uint64_t>(n)) {
    bool rising = true;
    uint64_t highest = 0;
    for (int64_t i = 0; i < n; ++i) {
      rising = rising && (!i || ids[i - 1] < ids[i]);
      highest = std::max(highest, static_cast<uint64_t>(ids[i]));
      keys_[i] = static_cast<uint64_t>(ids[i]) << low_ | static_cast<uint64_t>(i);
    }
    // What rises strictly is grouped as it is.
    if (!rising) sort_by_row(keys_, n, low_, highest);
  }

  int64_t row(int64_t i) const { return static_cast<int64_t>(keys_[i] >> low_); }
  int64_t place(int64_t i) const { return static_cast<int64_t>(keys_[i] & ((uint64_t{1} << low_) - 1)); }

 private:
  int low_;
  std::unique_ptr<uint64_t[]> keys_;
};

}  // namespace dhns
