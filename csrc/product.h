// Products of tables by all threads; for files that register operators.
#pragma once

#include <algorithm>
#include <memory>

#include "binding.h"
#include "product_cpu.h"

namespace dhns {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Buffer {  // numbers on a cache line's boundary
  explicit Buffer(int64_t size) : memory(new T[size + 64 / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    data = memory.get() + (64 - address % 64) % 64 / sizeof(T);
  }
  std::unique_ptr<T[]> memory;
  T* data;
};

constexpr int64_t kWorth = 65536;  // multiplications that are worth a thread

// A table [rows, dim], or its rows ids (null: all, in their order), in panels.
template <class T>
Buffer<T> packed(const T* table, const int64_t* ids, int64_t rows, int64_t dim) {
  const int64_t columns = ceil_div(dim, kernels::panel_width(T())) * kernels::panel_width(T());
  Buffer<T> out(columns * rows);
  const Panels<T> all{table, ids, rows, dim, out.data};
  torch::stable::parallel_for(0, rows, 1 + kWorth / columns, [&](int64_t begin, int64_t end) { kernels::pack_panels(all, begin, end); });
  return out;
}

// The product p, but for its panels, with the rows `table_ids` (null: all, in their order) of a table for X [terms, dim]. Not the library's
// product, whose sums depend on the number of threads.
template <class T>
void add_product(Product<T> p, const T* table, const int64_t* table_ids = nullptr) {
  constexpr int64_t kMostRows = 240, kTile = 12;
  const int64_t width = kernels::panel_width(T()), panels = ceil_div(p.dim, width);
  const bool is_panel = p.dim == width && !table_ids;
  const Buffer<T> made = is_panel ? Buffer<T>(0) : packed(table, table_ids, p.terms, p.dim);
  p.panels = is_panel ? table : made.data;
  // Few rows are shared out among all threads, many in parts that the second-level cache holds. The result is the same.
  const int64_t wanted = ceil_div(static_cast<int64_t>(torch::stable::get_num_threads()), panels);
  const int64_t rows = std::min(kMostRows, ceil_div(ceil_div(p.rows, wanted), kTile) * kTile);
  torch::stable::parallel_for(0, ceil_div(p.rows, rows) * panels, 1 + kWorth / (rows * p.terms), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin, next; task < end; task = next) {
      next = std::min(end, (task / panels + 1) * panels);
      const int64_t row = task / panels * rows, first = task % panels;
      kernels::add_product(p, row, std::min(row + rows, p.rows), first, first + next - task);
    }
  });
}

}  // namespace dhns
