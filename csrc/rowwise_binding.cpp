#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "binding.h"
#include "rowwise_cpu.h"

namespace {
using dhns::data;
using dhns::Tensor;
using torch::headeronly::ScalarType;

// Memory whose every element is written before it is read: a step sorts some 5 MB, and clearing them first takes as long as sorting.
template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Rows and what each is given, grouped by row; within a row in the order in which it was given.
template <class T>
struct Groups {
  explicit Groups(int64_t n)
      : rows(scratch<int64_t>(n)), offsets(scratch<int64_t>(n + 1)), pairs(scratch<int64_t>(n)), vectors(scratch<const T*>(n)), weights(scratch<T>(n)) {}

  int64_t count = 0;  // of rows
  std::unique_ptr<int64_t[]> rows, offsets, pairs;
  std::unique_ptr<const T*[]> vectors;
  std::unique_ptr<T[]> weights;
};

int bits_of(uint64_t x) {
  int bits = 0;
  for (; x; x >>= 1) ++bits;
  return bits;
}

// A stable radix sort of keys that hold a row above `low` other bits, which are left as they are.
void sort_by_row(std::unique_ptr<uint64_t[]>& keys, int64_t n, int low, uint64_t highest) {
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

// Vectors, their weights and the rows that they are given to, in the order in which they are; the first `queries` are pairs.
template <class T>
Groups<T> group(const int64_t* ids, const T* const* vectors, const T* weights, int64_t n, int64_t queries) {
  const int low = bits_of(static_cast<uint64_t>(n));
  auto keys = scratch<uint64_t>(n);
  bool rising = true;
  uint64_t highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    rising = rising && (!i || ids[i - 1] < ids[i]);
    highest = std::max(highest, static_cast<uint64_t>(ids[i]));
    keys[i] = static_cast<uint64_t>(ids[i]) << low | static_cast<uint64_t>(i);
  }
  // What rises strictly is grouped as it is.
  if (!rising) sort_by_row(keys, n, low, highest);
  Groups<T> out(n);
  out.offsets[0] = 0;
  // Without a branch, which at 100 000 rows would be guessed wrong for every fourth of 66 000 ids: what is written of a row is written again
  // until it is right.
  int64_t last = -1, row = -1, pairs = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto next = static_cast<int64_t>(keys[i] >> low), place = static_cast<int64_t>(keys[i] & ((uint64_t{1} << low) - 1));
    const bool same = next == row;
    row = next;
    last += !same;
    pairs = (same ? pairs : 0) + (place < queries);
    out.rows[last] = row;
    out.offsets[last + 1] = i + 1;
    out.pairs[last] = pairs;
    out.vectors[i] = vectors[place];
    out.weights[i] = weights[place];
  }
  out.count = last + 1;
  return out;
}

template <class S, class T>
void update_as(
    int64_t method, const Tensor& table, const Tensor& first, const std::optional<Tensor>& second, const std::vector<Tensor>& rows,
    const std::vector<Tensor>& gradients, double rate, double beta1, double beta2, double correction, double epsilon, double n3, int64_t seed,
    int64_t number, int64_t row_offset, int64_t reduction, const std::vector<Tensor>& queries, const std::vector<Tensor>& ids,
    const std::vector<Tensor>& slopes) {
  const int64_t dim = table.size(1);
  int64_t pairs = 0, n = 0;
  for (const Tensor& x : ids) pairs += x.numel();
  for (const Tensor& x : rows) n += x.numel();
  n += pairs;
  const auto row = scratch<int64_t>(n);
  const auto vector = scratch<const T*>(n);
  const auto weight = scratch<T>(n);
  int64_t at = 0;
  for (size_t part = 0; part < ids.size(); ++part) {
    const int64_t batch = ids[part].size(0), columns = ids[part].size(1), count = batch * columns;
    std::copy_n(data<int64_t>(ids[part]), count, &row[at]);
    std::copy_n(data<T>(slopes[part]), count, &weight[at]);
    for (int64_t b = 0; b < batch; ++b, at += columns) std::fill_n(&vector[at], columns, data<T>(queries[part]) + b * dim);
  }
  for (size_t part = 0; part < rows.size(); ++part) {
    const int64_t count = rows[part].numel();
    std::copy_n(data<int64_t>(rows[part]), count, &row[at]);
    std::fill_n(&weight[at], count, T(1));
    for (int64_t i = 0; i < count; ++i, ++at) vector[at] = data<T>(gradients[part]) + i * dim;
  }
  const Groups<T> groups = group<T>(row.get(), vector.get(), weight.get(), n, pairs);
  const dhns::RowUpdate<S, T> a{
      method, dim, reduction, data<S>(table), data<T>(first), second ? data<T>(*second) : nullptr, groups.rows.get(), groups.offsets.get(),
      groups.pairs.get(), groups.vectors.get(), groups.weights.get(), static_cast<T>(rate), static_cast<T>(beta1), static_cast<T>(beta2),
      static_cast<T>(epsilon), static_cast<T>(correction), static_cast<T>(n3), static_cast<uint64_t>(seed), static_cast<uint64_t>(row_offset),
      static_cast<uint32_t>(number)};
  torch::stable::parallel_for(0, groups.count, 64, [&](int64_t begin, int64_t end) { DHNS_CALL(row_update, a, begin, end); });
}

void row_update(
    int64_t method, Tensor table, Tensor first, std::optional<Tensor> second, std::vector<Tensor> rows, std::vector<Tensor> gradients, double rate,
    double beta1, double beta2, double correction, double epsilon, double n3, int64_t seed, int64_t number, int64_t row_offset, int64_t reduction,
    std::vector<Tensor> queries, std::vector<Tensor> ids, std::vector<Tensor> slopes) {
  const ScalarType type = table.scalar_type();
  (type == ScalarType::Double ? update_as<double, double> : type == ScalarType::Float ? update_as<float, float> : update_as<uint16_t, float>)(
      method, table, first, second, rows, gradients, rate, beta1, beta2, correction, epsilon, n3, seed, number, row_offset, reduction, queries,
      ids, slopes);
}

template <class S, class T>
void gather_as(const Tensor& table, const Tensor& rows, const Tensor& out) {
  const dhns::RowGather<S, T> a{table.size(1), data<S>(table), data<int64_t>(rows), data<T>(out)};
  torch::stable::parallel_for(0, rows.numel(), 256, [&](int64_t begin, int64_t end) { DHNS_CALL(row_gather, a, begin, end); });
}

void row_gather(Tensor table, Tensor rows, Tensor out) {
  const ScalarType type = table.scalar_type();
  (type == ScalarType::Double ? gather_as<double, double> : type == ScalarType::Float ? gather_as<float, float> : gather_as<uint16_t, float>)(
      table, rows, out);
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def(
      "row_update(int method, Tensor(a!) table, Tensor(b!) first, Tensor(c!)? second, Tensor[] rows, Tensor[] gradients, float rate, "
      "float beta1, float beta2, float correction, float epsilon, float n3, int seed, int number, int row_offset, int reduction, "
      "Tensor[] queries, Tensor[] ids, Tensor[] slopes) -> ()");
  m.def("row_gather(Tensor table, Tensor rows, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("row_update", TORCH_BOX(&row_update));
  m.impl("row_gather", TORCH_BOX(&row_gather));
}
