#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "binding.h"
#include "grouping.h"
#include "rowwise_cpu.h"

namespace {
using dhns::data;
using dhns::scratch;
using dhns::Tensor;
using torch::headeronly::ScalarType;

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

// Vectors, their weights and the rows that they are given to, in the order in which they are; the first `queries` are pairs.
template <class T>
Groups<T> group(const int64_t* ids, const T* const* vectors, const T* weights, int64_t n, int64_t queries) {
  const dhns::Sorted sorted(ids, n);
  Groups<T> out(n);
  out.offsets[0] = 0;
  // Without a branch, which at 100 000 rows would be guessed wrong for every fourth of 66 000 ids: what is written of a row is written again
  // until it is right.
  int64_t last = -1, row = -1, pairs = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t next = sorted.row(i), place = sorted.place(i);
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
  int64_t n = 0;
  for (const Tensor& x : ids) n += x.numel();
  for (const Tensor& x : rows) n += x.numel();
  const auto row = scratch<int64_t>(n);
  const auto vector = scratch<const T*>(n);
  const auto weight = scratch<T>(n);
  int64_t at = 0;
  for (size_t part = 0; part < ids.size(); ++part) {
    const int64_t batch = ids[part].size(0), columns = ids[part].size(1);
    const int64_t* id = data<int64_t>(ids[part]);
    const T* slope = data<T>(slopes[part]);
    for (int64_t b = 0; b < batch; ++b) {
      const T* const query = data<T>(queries[part]) + b * dim;
      // What is left out is written over by what follows.
      for (int64_t c = 0; c < columns; ++c, ++id, ++slope) {
        row[at] = *id;
        weight[at] = *slope;
        vector[at] = query;
        at += *id >= 0;
      }
    }
  }
  const int64_t pairs = at;
  for (size_t part = 0; part < rows.size(); ++part) {
    const int64_t count = rows[part].numel();
    std::copy_n(data<int64_t>(rows[part]), count, &row[at]);
    std::fill_n(&weight[at], count, T(1));
    for (int64_t i = 0; i < count; ++i, ++at) vector[at] = data<T>(gradients[part]) + i * dim;
  }
  const Groups<T> groups = group<T>(row.get(), vector.get(), weight.get(), at, pairs);
  const dhns::RowRule<T> rule{method, static_cast<T>(rate), static_cast<T>(beta1), static_cast<T>(beta2), static_cast<T>(epsilon),
                              static_cast<T>(correction), static_cast<T>(n3)};
  const dhns::RowUpdate<S, T> a{
      rule, dim, reduction, data<S>(table), data<T>(first), second ? data<T>(*second) : nullptr, groups.rows.get(), groups.offsets.get(),
      groups.pairs.get(), groups.vectors.get(), groups.weights.get(), static_cast<uint64_t>(seed), static_cast<uint64_t>(row_offset),
      static_cast<uint32_t>(number)};
  torch::stable::parallel_for(0, groups.count, 64, [&](int64_t begin, int64_t end) { dhns::kernels::row_update(a, begin, end); });
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
  torch::stable::parallel_for(0, rows.numel(), 256, [&](int64_t begin, int64_t end) { dhns::kernels::row_gather(a, begin, end); });
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
