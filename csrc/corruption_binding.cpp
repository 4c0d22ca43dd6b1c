#include <algorithm>
#include <optional>
#include <vector>

#include "binding.h"
#include "corruption_cpu.h"
#include "grouping.h"

namespace {
using dhns::data;
using dhns::is_double;
using dhns::Tensor;

template <class T>
dhns::Corruptions<T> corruptions(
    int64_t reduction, const Tensor& query, const Tensor& table, const Tensor& ids, double offset, double temperature, const Tensor& slope,
    const Tensor& grad_query, const Tensor& partial) {
  return {reduction, query.size(0), ids.size(1), query.size(1), table.size(0), static_cast<T>(offset), static_cast<T>(temperature), data<T>(query),
          data<T>(table), data<int64_t>(ids), data<T>(slope), data<T>(grad_query), data<double>(partial)};
}

template <class T>
void loss_as(
    int64_t reduction, const Tensor& query, const Tensor& table, const Tensor& ids, double offset, double temperature, const Tensor& slope,
    const Tensor& grad_query, const Tensor& partial) {
  const auto a = corruptions<T>(reduction, query, table, ids, offset, temperature, slope, grad_query, partial);
  torch::stable::parallel_for(0, a.batch, 1, [&](int64_t first, int64_t last) { dhns::kernels::corruption_loss(a, first, last); });
}

// Whether all are rows of a table of so many; where they are not, nothing is written.
bool inside(const Tensor& ids, int64_t rows) {
  const auto* const id = data<int64_t>(ids);
  return std::all_of(id, id + ids.numel(), [=](int64_t i) { return i >= 0 && i < rows; });
}

bool corruption_loss(
    int64_t reduction, Tensor query, Tensor table, Tensor ids, double offset, double temperature, Tensor slope, Tensor grad_query,
    Tensor partial) {
  if (!inside(ids, table.size(0))) return false;
  (is_double(query) ? loss_as<double> : loss_as<float>)(reduction, query, table, ids, offset, temperature, slope, grad_query, partial);
  return true;
}

template <class T>
void step_as(
    int64_t reduction, const Tensor& query, const Tensor& table, const Tensor& ids, double offset, double temperature, const Tensor& slope,
    const Tensor& grad_query, const Tensor& partial, const Tensor& first, const std::optional<Tensor>& second, const Tensor& others, int64_t parts,
    const dhns::RowRule<T>& rule, const Tensor& rest) {
  const int64_t count = ids.numel(), n = count + others.numel(), share = (query.size(0) + parts - 1) / parts * ids.size(1);
  const auto all = dhns::scratch<int64_t>(n);
  std::copy_n(data<int64_t>(ids), count, all.get());
  std::copy_n(data<int64_t>(others), others.numel(), &all[count]);
  const dhns::Sorted sorted(all.get(), n);
  std::vector<int64_t> link(count);
  int64_t* const left = data<int64_t>(rest);
  std::fill_n(left, count, int64_t{-1});
  // Rows that queries of two parts meet, and where.
  std::vector<int64_t> rows, offsets{0}, counts, places;
  for (int64_t begin = 0, end; begin < n; begin = end) {
    const int64_t row = sorted.row(begin);
    for (end = begin + 1; end < n && sorted.row(end) == row; ++end) {}
    const int64_t earliest = sorted.place(begin), latest = sorted.place(end - 1);
    if (latest >= count) {
      // Others, whose places come last, have it too.
      for (int64_t i = begin; i < end && sorted.place(i) < count; ++i) left[sorted.place(i)] = row;
    } else if (latest > earliest && parts > 1 && earliest / share != latest / share) {
      for (int64_t i = begin; i < end; ++i) places.push_back(sorted.place(i));
      rows.push_back(row);
      offsets.push_back(static_cast<int64_t>(places.size()));
      counts.push_back(end - begin);
    } else {
      int64_t before = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = sorted.place(i);
        link[place] = 2 * before;
        before = 1 + place;
      }
      ++link[latest];
    }
  }
  const dhns::CorruptionStep<T> a{corruptions<T>(reduction, query, table, ids, offset, temperature, slope, grad_query, partial),
                                  rule, share, data<T>(table), data<T>(first), second ? data<T>(*second) : nullptr,
                                  link.data()};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) { dhns::kernels::corruption_step(a, begin, end); });
  std::vector<const T*> vectors;
  std::vector<T> weights;
  for (int64_t place : places) {
    vectors.push_back(a.loss.query + place / ids.size(1) * a.loss.dim);
    weights.push_back(a.loss.slope[place]);
  }
  const dhns::RowUpdate<T, T> u{rule, a.loss.dim, reduction, a.table, a.first, a.second, rows.data(), offsets.data(), counts.data(), vectors.data(),
                                weights.data(), 0, 0, 0};
  torch::stable::parallel_for(0, static_cast<int64_t>(rows.size()), 64, [&](int64_t begin, int64_t end) { dhns::kernels::row_update(u, begin, end); });
}

bool corruption_step(
    int64_t reduction, Tensor query, Tensor table, Tensor ids, double offset, double temperature, Tensor slope, Tensor grad_query, Tensor partial,
    int64_t method, Tensor first, std::optional<Tensor> second, Tensor others, int64_t parts, double rate, double beta1, double beta2,
    double correction, double epsilon, double n3, Tensor rest) {
  if (!inside(ids, table.size(0)) || !inside(others, table.size(0))) return false;
  const auto as = [&](auto number) {
    using T = decltype(number);
    step_as<T>(reduction, query, table, ids, offset, temperature, slope, grad_query, partial, first, second, others, parts,
               {method, static_cast<T>(rate), static_cast<T>(beta1), static_cast<T>(beta2), static_cast<T>(epsilon), static_cast<T>(correction),
                static_cast<T>(n3)},
               rest);
  };
  if (is_double(query))
    as(double{});
  else
    as(float{});
  return true;
}

template <class T>
void table_gradient_as(
    int64_t reduction, double scale, const Tensor& query, const Tensor& table, const Tensor& ids, const Tensor& slope, const Tensor& grad_table) {
  const int64_t rows = table.size(0), count = ids.numel();
  const int64_t* const id = data<int64_t>(ids);
  // A counting sort: pairs of one row of the table come together, in the order of the batch, whatever the number of threads.
  std::vector<int64_t> offsets(rows + 2), pairs(count);
  for (int64_t i = 0; i < count; ++i) ++offsets[id[i] + 2];
  for (int64_t e = 2; e <= rows + 1; ++e) offsets[e] += offsets[e - 1];
  for (int64_t i = 0; i < count; ++i) pairs[offsets[id[i] + 1]++] = i;
  const dhns::TableGradient<T> a{reduction, ids.size(1), query.size(1), static_cast<T>(scale), data<T>(query), data<T>(table),
                                 data<T>(slope), offsets.data(), pairs.data(), data<T>(grad_table)};
  torch::stable::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) { dhns::kernels::corruption_table_gradient(a, first, last); });
}

bool corruption_table_gradient(int64_t reduction, double scale, Tensor query, Tensor table, Tensor ids, Tensor slope, Tensor grad_table) {
  if (!inside(ids, table.size(0))) return false;
  (is_double(query) ? table_gradient_as<double> : table_gradient_as<float>)(reduction, scale, query, table, ids, slope, grad_table);
  return true;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def(
      "corruption_loss(int reduction, Tensor query, Tensor table, Tensor ids, float offset, float temperature, Tensor(a!) slope, "
      "Tensor(b!) grad_query, Tensor(c!) partial) -> bool");
  m.def(
      "corruption_step(int reduction, Tensor query, Tensor(a!) table, Tensor ids, float offset, float temperature, Tensor(b!) slope, "
      "Tensor(c!) grad_query, Tensor(d!) partial, int method, Tensor(e!) first, Tensor(f!)? second, Tensor others, int parts, float rate, "
      "float beta1, float beta2, float correction, float epsilon, float n3, Tensor(g!) rest) -> bool");
  m.def(
      "corruption_table_gradient(int reduction, float scale, Tensor query, Tensor table, Tensor ids, Tensor slope, "
      "Tensor(a!) grad_table) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("corruption_loss", TORCH_BOX(&corruption_loss));
  m.impl("corruption_step", TORCH_BOX(&corruption_step));
  m.impl("corruption_table_gradient", TORCH_BOX(&corruption_table_gradient));
}
