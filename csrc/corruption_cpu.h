#pragma once
#include <cstdint>

#include "reductions.h"
#include "rowwise_cpu.h"

namespace dhns {

// Queries against rows of a table by index; column 0 of ids is the true answer, the other N are corruptions of it.
template <class T>
struct Corruptions {
  int64_t reduction, batch, columns, dim, rows;  // columns = 1 + N; rows of the table
  T offset, temperature;
  const T *query, *table;  // [B, D], [E, D]
  const int64_t* ids;      // [B, 1 + N]
  T* slope;                // [B, 1 + N], the derivative of the loss by each sum of terms
  T* grad_query;           // [B, D]
  double* partial;         // [B]
};

// The loss, and the step of an optimiser for rows that the last query to meet them has just read. Queries come in parts of `share` places (a place is
// an index into ids), which may be at work at the same time; all that meet one of these rows are of one part.
template <class T>
struct CorruptionStep {
  Corruptions<T> loss;
  RowRule<T> rule;
  int64_t share;
  T *table, *first, *second;  // as in RowUpdate
  // [B, 1 + N]: twice 1 + the place before that has the same row (0: none), and 1 more where the row moves, which is at its last place.
  const int64_t* link;
};

// The gradient of the table: the pairs that a row takes part in are listed in CSR form.
template <class T>
struct TableGradient {
  int64_t reduction, columns, dim;
  T scale;  // of the whole gradient
  const T *query, *table, *slope;
  const int64_t *offsets, *pairs;  // [E + 1], and indices into ids
  T* grad_table;                   // [E, D], every row written
};

}  // namespace dhns

namespace dhns::kernels {
// Rows first .. last − 1 of the batch.
void corruption_loss(const Corruptions<float>& a, int64_t first, int64_t last);
void corruption_loss(const Corruptions<double>& a, int64_t first, int64_t last);
// Parts first .. last − 1.
void corruption_step(const CorruptionStep<float>& a, int64_t first, int64_t last);
void corruption_step(const CorruptionStep<double>& a, int64_t first, int64_t last);
// Rows first .. last − 1 of the table.
void corruption_table_gradient(const TableGradient<float>& a, int64_t first, int64_t last);
void corruption_table_gradient(const TableGradient<double>& a, int64_t first, int64_t last);
}  // namespace dhns::kernels
