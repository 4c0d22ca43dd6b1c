#pragma once
#include <cstdint>

namespace dhns {

enum RowMethod : int64_t { kLazyAdam, kAdagrad, kRowwiseAdagrad };

// What an optimiser does to a row in this step.
template <class T>
struct RowRule {
  int64_t method;
  T rate, beta1, beta2, epsilon;
  T correction;  // the root of the second moment's
  T n3;          // λ of the regulariser λ·Σ|x|³, whose gradient joins that of each row

  // Where a row is in a state of all rows; a state that the method has not is null.
  template <class U>
  U* state(U* all, int64_t row, int64_t dim) const {
    return all ? all + row * (method == kRowwiseAdagrad ? 1 : dim) : nullptr;
  }
};

// One update of the rows of a table that gradients touch. S is what the table holds (float, double, or uint16_t: the bits of bfloat16), T what
// is computed in and what gradients and states hold (double for double tables, otherwise float).
//
// What a row is given, in the order of its sum: pairs, each a query q that met the row x in a sum of terms of a reduction and the derivative w of the
// loss by that sum, which give w·∂term(q, x)/∂x; then gradients, each a vector, of weight 1.
template <class S, class T>
struct RowUpdate {
  RowRule<T> rule;
  int64_t dim, reduction;
  S* table;           // [E, D]
  T *first, *second;  // lazy Adam: both moments [E, D]; Adagrad: the sum of squares [E, D] and null; row-wise Adagrad: [E] and null
  const int64_t *rows, *offsets, *pairs;  // the distinct rows, where the vectors of each begin, and how many of them are queries: [U], [U + 1], [U]
  const T* const* vectors;  // each [D], grouped by row
  const T* weights;         // of the vectors
  uint64_t seed, row_offset;  // of the stochastic rounding of a bfloat16 table
  uint32_t number;
};

// Rows of a table, one after the other: out [n, D].
template <class S, class T>
struct RowGather {
  int64_t dim;
  const S* table;
  const int64_t* rows;
  T* out;
};

}  // namespace dhns

namespace dhns::kernels {
// Distinct rows first .. last − 1.
void row_update(const RowUpdate<float, float>& a, int64_t first, int64_t last);
void row_update(const RowUpdate<double, double>& a, int64_t first, int64_t last);
void row_update(const RowUpdate<uint16_t, float>& a, int64_t first, int64_t last);
void row_gather(const RowGather<float, float>& a, int64_t first, int64_t last);
void row_gather(const RowGather<double, double>& a, int64_t first, int64_t last);
void row_gather(const RowGather<uint16_t, float>& a, int64_t first, int64_t last);
}  // namespace dhns::kernels
