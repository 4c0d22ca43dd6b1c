#pragma once
#include <cstdint>

namespace dhns {

// Rows whose loss and whose gradients of the biases are one partial sum each, and a part of no other: one result for any number of threads.
constexpr int64_t kLossRows = 128;

// Some rows of the generator's loss; dhns_fast/ops/diffusion_loss.py has the formulas. H = 4D. Weights of products are panels of product_cpu.h.
template <class T>
struct DiffusionLoss {
  int64_t D;
  const T *x, *c, *noise;                        // [rows, D]
  const int64_t* timesteps;                      // [rows], from 1
  const T* weight;                               // [rows]
  const T *state, *condition, *output;           // for x·Vxᵀ, c·Vcᵀ and h·Gᵀ
  const T *to_hidden, *to_state, *to_condition;  // for e·G, d·Vx and d·Vc; null: no gradients, or none of the inputs
  const T *time, *time_mean, *time_var, *bias1, *bias2;
  T *h, *centred, *d;                     // [rows, H]: h, h less its row's mean, and ∂p
  T* e;                                   // [rows, D]: e·s₂
  T *by_mean, *by_var;                    // [rows]: gradients of the moments of a row's timestep
  double* loss;                           // a number for kLossRows rows
  T *by_bias1, *by_bias2;                 // a row of H and of D for kLossRows rows
  T *by_x, *by_c;                         // [rows, D]
};
}  // namespace dhns

namespace dhns::kernels {
// Rows first .. last − 1, at most kLossRows of them, the first a multiple of that: all but what is summed over rows.
void diffusion_rows(const DiffusionLoss<float>& a, int64_t first, int64_t last);
void diffusion_rows(const DiffusionLoss<double>& a, int64_t first, int64_t last);
// to[places[r] − 1] += from[r] for all rows, columns first .. last − 1 of `dim`.
void add_to_places(const float* from, const int64_t* places, int64_t rows, int64_t dim, int64_t first, int64_t last, float* to);
void add_to_places(const double* from, const int64_t* places, int64_t rows, int64_t dim, int64_t first, int64_t last, double* to);
}  // namespace dhns::kernels
