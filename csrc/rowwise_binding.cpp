#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "binding.h"
#include "rowwise_cpu.h"

namespace {
using dhns::data;
using dhns::Tensor;
using torch::headeronly::ScalarType;

// Rows and what each is given, grouped by row; within a row in the order in which it was given.
struct Groups {
  std::vector<int64_t> rows, offsets, pairs;
  std::vector<int64_t> place;  // of each vector, grouped
};

int bits_of(uint64_t x) {
  int bits = 0;
  for (; x; x >>= 1) ++bits;
  return bits;
}

// A stable radix sort of keys that hold the row above the place: 66 000 ids below a million take 0.4 ms. What rises strictly is grouped as it is. The
// first `queries` places are pairs.
Groups group(const std::vector<int64_t>& ids, int64_t queries) {
  const auto n = static_cast<int64_t>(ids.size());
  const int low = bits_of(static_cast<uint64_t>(n));
  std::vector<uint64_t> keys(n);
  bool rising = true;
  uint64_t highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    rising = rising && (!i || ids[i - 1] < ids[i]);
    highest = std::max(highest, static_cast<uint64_t>(ids[i]));
    keys[i] = static_cast<uint64_t>(ids[i]) << low | static_cast<uint64_t>(i);
  }
  if (!rising) {
    // Twelve bits at a time at most: as many counts as the first-level cache holds.
    const int total = bits_of(highest), passes = (total + 11) / 12, width = passes ? (total + passes - 1) / passes : 0;
    const uint64_t mask = (uint64_t{1} << width) - 1;
    std::vector<uint64_t> other(n);
    std::vector<int64_t> count(mask + 1);
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = low + pass * width;
      std::fill(count.begin(), count.end(), int64_t{0});
      for (const uint64_t key : keys) ++count[key >> shift & mask];
      int64_t sum = 0;
      for (int64_t& c : count) sum += std::exchange(c, sum);
      for (const uint64_t key : keys) other[count[key >> shift & mask]++] = key;
      keys.swap(other);
    }
  }
  Groups out;
  out.place.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    const auto row = static_cast<int64_t>(keys[i] >> low), place = static_cast<int64_t>(keys[i] & ((uint64_t{1} << low) - 1));
    out.place[i] = place;
    if (out.rows.empty() || row != out.rows.back()) {
      out.rows.push_back(row);
      out.offsets.push_back(i);
      out.pairs.push_back(0);
    }
    out.pairs.back() += place < queries;
  }
  out.offsets.push_back(n);
  return out;
}

template <class S, class T>
void update_as(
    int64_t method, const Tensor& table, const Tensor& first, const std::optional<Tensor>& second, const std::vector<Tensor>& rows,
    const std::vector<Tensor>& gradients, double rate, double beta1, double beta2, double correction, double epsilon, double n3, int64_t seed,
    int64_t number, int64_t row_offset, int64_t reduction, const std::vector<Tensor>& queries, const std::vector<Tensor>& ids,
    const std::vector<Tensor>& slopes) {
  const int64_t dim = table.size(1);
  std::vector<int64_t> row;
  std::vector<const T*> vector;
  std::vector<T> weight;
  for (size_t part = 0; part < ids.size(); ++part) {
    const int64_t n = ids[part].numel(), columns = ids[part].size(1);
    const int64_t* const id = data<int64_t>(ids[part]);
    const T *const query = data<T>(queries[part]), *const slope = data<T>(slopes[part]);
    row.insert(row.end(), id, id + n);
    weight.insert(weight.end(), slope, slope + n);
    for (int64_t i = 0; i < n; ++i) vector.push_back(query + i / columns * dim);
  }
  const auto pairs = static_cast<int64_t>(row.size());
  for (size_t part = 0; part < rows.size(); ++part) {
    const int64_t n = rows[part].numel();
    const int64_t* const id = data<int64_t>(rows[part]);
    const T* const gradient = data<T>(gradients[part]);
    row.insert(row.end(), id, id + n);
    weight.insert(weight.end(), n, T(1));
    for (int64_t i = 0; i < n; ++i) vector.push_back(gradient + i * dim);
  }
  const Groups groups = group(row, pairs);
  std::vector<const T*> vectors(vector.size());
  std::vector<T> weights(vector.size());
  for (size_t i = 0; i < vector.size(); ++i) {
    vectors[i] = vector[groups.place[i]];
    weights[i] = weight[groups.place[i]];
  }
  const dhns::RowUpdate<S, T> a{
      method, dim, reduction, data<S>(table), data<T>(first), second ? data<T>(*second) : nullptr, groups.rows.data(), groups.offsets.data(),
      groups.pairs.data(), vectors.data(), weights.data(), static_cast<T>(rate), static_cast<T>(beta1), static_cast<T>(beta2),
      static_cast<T>(epsilon), static_cast<T>(correction), static_cast<T>(n3), static_cast<uint64_t>(seed), static_cast<uint64_t>(row_offset),
      static_cast<uint32_t>(number)};
  torch::stable::parallel_for(0, static_cast<int64_t>(groups.rows.size()), 64, [&](int64_t begin, int64_t end) {
    DHNS_CALL(row_update, a, begin, end);
  });
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
