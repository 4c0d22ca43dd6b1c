#pragma once
#include <cstdint>

#include "reductions.h"

namespace dhns {

// Of which the partial sums are made, whatever the number of threads: one result. Of hal_embeddings and of hal_scores.
constexpr int64_t kRowsPerBlock = 16, kScoresPerBlock = 1024;

// The arguments of hal_embeddings; layouts as in dhns_fast/loss.py. grad_* are null where no gradient is wanted. S is the type in memory, T the
// one of the arithmetic, of margins, weights and gradients.
template <class S, class T = S>
struct HalEmbeddings {
  int64_t interaction, batch, dim, width, levels, modalities, blocks, rows;  // rows of a block, of which partial has a row each
  bool normalize;
  T mu, gamma;
  const S *head, *relation, *tail;  // [B, D], or [M, B, D] with attention; relation [B, width]
  const S *neg_head, *neg_tail;     // [L, M, B, D]
  const T *margin, *weight;         // [L]
  const S* attention;               // [D] or null
  const bool *head_present, *tail_present;  // [M, B] or null
  T *grad_head, *grad_relation, *grad_tail;
  double* partial;  // [blocks, columns]: loss, gradients of margin [L] and, where there is one, of attention [D]
  int64_t columns;
  int64_t kept = 0;  // the GPU's: vectors of a row that a block has room for
};

template <class T>
struct HalScores {
  int64_t batch, levels, kinds;
  T mu;
  const T *positive, *negative;  // [B], [L, K, B]
  const T *margin, *weight;      // [L]
  T *grad_positive, *grad_negative;
  double* partial;  // [blocks, 1 + L]: loss, gradients of margin
};

template <class T>
struct SelfAdversarial {
  int64_t batch, corruptions;
  T temperature;
  const T *positive, *negative;  // [B], [B, N]
  T *grad_positive, *grad_negative;
  double* partial;  // [B]
};

}  // namespace dhns

namespace dhns::kernels {
// Blocks of rows first .. last − 1.
void hal_embeddings(const HalEmbeddings<float>& a, int64_t first, int64_t last);
void hal_embeddings(const HalEmbeddings<double>& a, int64_t first, int64_t last);
void hal_scores(const HalScores<float>& a, int64_t first, int64_t last);
void hal_scores(const HalScores<double>& a, int64_t first, int64_t last);
// Rows first .. last − 1.
void self_adversarial(const SelfAdversarial<float>& a, int64_t first, int64_t last);
void self_adversarial(const SelfAdversarial<double>& a, int64_t first, int64_t last);
}  // namespace dhns::kernels
