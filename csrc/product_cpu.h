#pragma once
#include <cstdint>

namespace dhns {

// out [rows, dim] = W·X + bias, or added to what is there, of W [rows, terms] and X [terms, dim] in panels. W's rows are `stride` apart, and row r
// is the one with the number ids[r] where there are ids; or they are columns, and `stride` lies between two terms of one.
template <class T>
struct Product {
  const T* weight;
  const int64_t* ids;  // [rows] or null
  const T *panels, *bias;  // bias [dim] or null
  int64_t rows, terms, dim, stride;
  bool columns, add;
  T* out;
  T* sums;  // [rows] or null: Σ of each row of W is added, where rows are columns
};

// A table [rows, dim], or its rows ids [rows], whose panels [⌈dim/width⌉][rows][width] hold zeros beyond the last dimension.
template <class T>
struct Panels {
  const T* table;
  const int64_t* ids;  // or null
  int64_t rows, dim;
  T* out;
};

}  // namespace dhns

namespace dhns::kernels {
int64_t panel_width(float);
int64_t panel_width(double);
// Rows first .. last − 1 of all panels.
void pack_panels(const Panels<float>& a, int64_t first, int64_t last);
void pack_panels(const Panels<double>& a, int64_t first, int64_t last);
// The part of a product for rows from `row` to `end`, and panels `first` to `last`. An element is the same sum in the same order,
// wherever it stands.
void add_product(const Product<float>& a, int64_t row, int64_t end, int64_t first, int64_t last);
void add_product(const Product<double>& a, int64_t row, int64_t end, int64_t first, int64_t last);
}  // namespace dhns::kernels
