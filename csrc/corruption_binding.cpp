#include <algorithm>
#include <vector>

#include "binding.h"
#include "corruption_cpu.h"

namespace {
using dhns::data;
using dhns::Tensor;

bool is_double(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }

template <class T>
void loss_as(
    int64_t reduction, const Tensor& query, const Tensor& table, const Tensor& ids, double offset, double temperature, const Tensor& slope,
    const Tensor& grad_query, const Tensor& partial) {
  const dhns::Corruptions<T> a{reduction, query.size(0), ids.size(1), query.size(1), table.size(0), static_cast<T>(offset),
                               static_cast<T>(temperature), data<T>(query), data<T>(table), data<int64_t>(ids), data<T>(slope), data<T>(grad_query),
                               data<double>(partial)};
  torch::stable::parallel_for(0, a.batch, 1, [&](int64_t first, int64_t last) { DHNS_CALL(corruption_loss, a, first, last); });
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
  torch::stable::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) { DHNS_CALL(corruption_table_gradient, a, first, last); });
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
      "corruption_table_gradient(int reduction, float scale, Tensor query, Tensor table, Tensor ids, Tensor slope, "
      "Tensor(a!) grad_table) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("corruption_loss", TORCH_BOX(&corruption_loss));
  m.impl("corruption_table_gradient", TORCH_BOX(&corruption_table_gradient));
}
