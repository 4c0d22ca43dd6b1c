#pragma once
#include <cstdint>

#include "reductions.h"

namespace dhns::score {
// Scores are made in blocks of kRows queries by kColumns entities: 12 KB of results, beside a panel of entities in the first-level
// cache and the queries in the second. Both are multiples of what any level keeps in registers.
constexpr int64_t kRows = 48, kColumns = 64;

// A tile of the backward pass, all contiguous: query, scale (or null) and their gradients [queries, dim], entity and its gradient
// [entities, dim], weight [queries, entities]: the gradient of the scores, for L2 divided by the distance.
struct Gradients {
  const float *query, *entity, *scale, *weight;
  int64_t queries, entities, dim, reduction;
  float *by_query, *by_entity, *by_scale;
};
}  // namespace dhns::score

namespace dhns::kernels {
// kColumns entities, rows of dim floats, into the layout that score_block reads: panels [dim][width], a register pair wide.
void pack_entities(const float* const* entities, int64_t dim, float* panels);

// raw [kRows][kColumns] of the first `rows` queries, rounded up to a register block; scale is null (always for dot) or has a pointer
// a query. Raw scores order like scores (for L2 the negated square). A pair is the same sum in the same order, wherever it stands.
void score_block(
    int64_t reduction, const float* const* query, const float* const* scale, int64_t rows, const float* panels, int64_t dim, float* raw);

// Adds to counts how many of kColumns raw scores are greater than the goal, equal to it, and NaN.
void count_row(const float* raw, float goal, int64_t* counts);

// The greatest of kColumns scores; NaN if there is one.
float greatest(const float* scores);

// Whether one of kColumns scores is above the bound.
bool any_above(const float* scores, float bound);

// Σ exp(score − shift) of kColumns scores, none of which exceeds the shift; each exponential within 2e-7 of its value.
float sum_exp(const float* scores, float shift);

// out = factor·exp(score − shift) of `count` scores, none of which exceeds the shift.
void softmax_row(const float* scores, int64_t count, float shift, float factor, float* out);

// Adds the gradients of Σ weight·score (not for dot, whose are products) in one of the gradient_parts into which dimensions are divided.
int64_t gradient_parts(int64_t reduction, int64_t dim);
void add_gradients(const dhns::score::Gradients& tile, int64_t part);

// Raw scores to scores, in place.
void finish_row(int64_t reduction, float* raw, int64_t count);
}  // namespace dhns::kernels
