// The losses on the GPU. hal_embeddings: a block takes a few rows, one after the other, and keeps a row's vectors in shared memory; see hal_cpu.cpp
// for the same computation in words and dhns_fast/loss.py for the formula. Sums go through fixed trees: the result is the same each time.
//
// The code needs threads, a barrier and sums over a warp, and so runs as ordinary threads in a test where there is no GPU.
#pragma once

#include <cstdint>

#include "hal_cpu.h"
#include "interactions.h"

// On the GPU alone, unlike DHNS_FN: the barrier has no host form, and nvcc refuses it in a function that the host could call.
#if defined(__CUDACC__)
#define DHNS_ROW_FN __device__ __forceinline__
#else
#define DHNS_ROW_FN inline
#endif

namespace dhns::DHNS_LEVEL {

// Vectors of [D], reduction scratch of 3 a warp, logits or shares and their slopes for real and generated entities of both sides.
template <class T>
inline int64_t hal_shared_bytes(int64_t dim, int64_t modalities, int64_t warps) {
  return static_cast<int64_t>(sizeof(T)) * (11 * dim + 3 * warps + 6 * modalities);
}

namespace {

template <class T>
struct Pair {
  T head, tail;
};

template <class I, class S, class T>
class Row {
 public:
  DHNS_ROW_FN Row(const HalEmbeddings<S, T>& a, T* shared, Threads threads) : a_(a), threads_(threads) {
    const int64_t n = a.dim;
    h_ = shared, t_ = h_ + n, r_ = t_ + n, gh_ = r_ + n, gt_ = gh_ + n, gr_ = gt_ + n;
    x_ = gr_ + n, y_ = x_ + n, gx_ = y_ + n, gy_ = gx_ + n, ga_ = gy_ + n;
    sums_ = ga_ + n, share_ = sums_ + 3 * threads.warps(), generated_share_ = share_ + 2 * a.modalities;
    slope_ = generated_share_ + 2 * a.modalities;
    for (int64_t i = 0; i < a.levels; ++i)
      if (a.weight[i] > 0) ++active_, weight_ += a.weight[i];
    scale_ = active_ ? a.mu / (6 * T(active_) * T(a.batch)) : T(0);
  }

  DHNS_ROW_FN void block(int64_t index) {
    double* const partial = a_.partial + index * (1 + a_.levels + a_.dim);
    each(a_.dim, [&](int64_t i) { ga_[i] = 0; });
    if (threads_.rank() == 0)
      for (int64_t i = 0; i <= a_.levels; ++i) partial[i] = 0;
    const int64_t first = index * a_.rows, end = first + a_.rows;
    for (int64_t b = first; b < end && b < a_.batch; ++b) row(b, partial);
    each(a_.dim, [&](int64_t i) { partial[1 + a_.levels + i] = ga_[i]; });
  }

 private:
  template <class F>
  DHNS_ROW_FN void each(int64_t n, F f) const {
    for (int64_t i = threads_.rank(); i < n; i += threads_.count()) f(i);
  }

  template <int K>
  DHNS_ROW_FN void sum(T (&values)[K]) const {
    for (int k = 0; k < K; ++k) {
      const T whole = threads_.warp_sum(values[k]);
      if (threads_.is_first_of_warp()) sums_[k * threads_.warps() + threads_.warp()] = whole;
    }
    threads_.barrier();
    for (int k = 0; k < K; ++k) {
      values[k] = 0;
      for (int w = 0; w < threads_.warps(); ++w) values[k] += sums_[k * threads_.warps() + w];
    }
    threads_.barrier();
  }

  DHNS_ROW_FN int64_t stride() const { return a_.batch * a_.dim; }
  DHNS_ROW_FN bool has(const bool* present, int64_t m, int64_t b) const { return !present || present[m * a_.batch + b]; }

  // What scores see of a head e and a tail f: as they are, or fused, then normalised. Leaves shares [2, M] and 1/norms.
  DHNS_ROW_FN Pair<T> take(const S* e, const S* f, int64_t b, T* x, T* y, T* share) const {
    if (a_.attention) {
      for (int64_t m = 0; m < a_.modalities; ++m) {
        T logit[2] = {0, 0};
        const bool in_e = has(a_.head_present, m, b), in_f = has(a_.tail_present, m, b);
        each(a_.dim, [&](int64_t i) {
          const T w = T(a_.attention[i]);
          if (in_e) logit[0] += w * hyperbolic_tangent(T(e[m * stride() + i]));
          if (in_f) logit[1] += w * hyperbolic_tangent(T(f[m * stride() + i]));
        });
        sum(logit);
        if (threads_.rank() == 0) share[m] = in_e ? logit[0] : T(-INFINITY), share[a_.modalities + m] = in_f ? logit[1] : T(-INFINITY);
      }
      threads_.barrier();
      if (threads_.rank() < 2) softmax(share + threads_.rank() * a_.modalities);
      if (threads_.count() == 1) softmax(share + a_.modalities);
      threads_.barrier();
      each(a_.dim, [&](int64_t i) {
        T joint_e = 0, joint_f = 0;
        for (int64_t m = 0; m < a_.modalities; ++m) {
          // A share of 0 belongs to an absent modality, whose place may hold NaN.
          const T of_e = share[m], of_f = share[a_.modalities + m];
          if (of_e != 0) joint_e += of_e * T(e[m * stride() + i]);
          if (of_f != 0) joint_f += of_f * T(f[m * stride() + i]);
        }
        x[i] = joint_e, y[i] = joint_f;
      });
    } else {
      each(a_.dim, [&](int64_t i) { x[i] = T(e[i]), y[i] = T(f[i]); });
    }
    Pair<T> factor{1, 1};
    if (a_.normalize) {
      T square[2] = {0, 0};
      each(a_.dim, [&](int64_t i) { square[0] += x[i] * x[i], square[1] += y[i] * y[i]; });
      sum(square);
      factor = {inverse_norm(square[0]), inverse_norm(square[1])};
      each(a_.dim, [&](int64_t i) { x[i] *= factor.head, y[i] *= factor.tail; });
    }
    threads_.barrier();
    return factor;
  }

  static DHNS_ROW_FN T inverse_norm(T square) {
    const T norm = std::sqrt(square);
    return 1 / (norm > T(1e-12) ? norm : T(1e-12));
  }

  DHNS_ROW_FN void softmax(T* logit) const {
    T largest = -INFINITY, total = 0;
    for (int64_t m = 0; m < a_.modalities; ++m) largest = logit[m] > largest || logit[m] != logit[m] ? logit[m] : largest;
    for (int64_t m = 0; m < a_.modalities; ++m) total += logit[m] = logit[m] == -INFINITY ? T(0) : exponential(logit[m] - largest);
    for (int64_t m = 0; m < a_.modalities; ++m)
      if (logit[m] != 0) logit[m] /= total;
  }

  // Back through take(): adds the attention's gradient to ga, and where they are not null writes those of the modalities.
  DHNS_ROW_FN void give(
      const S* e, const S* f, const T* x, const T* y, T* gx, T* gy, const T* share, Pair<T> factor, T* grad_e, T* grad_f) const {
    if (a_.normalize) {
      T along[2] = {0, 0};
      each(a_.dim, [&](int64_t i) { along[0] += x[i] * gx[i], along[1] += y[i] * gy[i]; });
      sum(along);
      if (!(factor.head < T(1e12))) along[0] = 0;
      if (!(factor.tail < T(1e12))) along[1] = 0;
      each(a_.dim, [&](int64_t i) {
        gx[i] = factor.head * (gx[i] - along[0] * x[i]);
        gy[i] = factor.tail * (gy[i] - along[1] * y[i]);
      });
      threads_.barrier();
    }
    if (!a_.attention) {
      if (grad_e) each(a_.dim, [&](int64_t i) { grad_e[i] = gx[i], grad_f[i] = gy[i]; });
      return;
    }
    const int64_t M = a_.modalities;
    for (int64_t m = 0; m < M; ++m) {
      T slope[2] = {0, 0};
      each(a_.dim, [&](int64_t i) {
        if (share[m] != 0) slope[0] += gx[i] * T(e[m * stride() + i]);
        if (share[M + m] != 0) slope[1] += gy[i] * T(f[m * stride() + i]);
      });
      sum(slope);
      if (threads_.rank() == 0) slope_[m] = slope[0], slope_[M + m] = slope[1];
    }
    threads_.barrier();
    Pair<T> mean{0, 0};
    for (int64_t m = 0; m < M; ++m) mean.head += share[m] * slope_[m], mean.tail += share[M + m] * slope_[M + m];
    each(a_.dim, [&](int64_t i) {
      const T w = T(a_.attention[i]);
      for (int64_t m = 0; m < M; ++m) {
        fuse_back(share[m], share[m] * (slope_[m] - mean.head), gx[i], w, e, m * stride() + i, i, grad_e);
        fuse_back(share[M + m], share[M + m] * (slope_[M + m] - mean.tail), gy[i], w, f, m * stride() + i, i, grad_f);
      }
    });
    threads_.barrier();
  }

  DHNS_ROW_FN void fuse_back(T share, T slope, T g, T w, const S* e, int64_t at, int64_t i, T* grad_e) const {
    if (share != 0) {
      const T th = hyperbolic_tangent(T(e[at]));
      ga_[i] += slope * th;
      if (grad_e) grad_e[at] = share * g + slope * w * (1 - th * th);
    } else if (grad_e) {
      grad_e[at] = 0;
    }
  }

  DHNS_ROW_FN T take_relation(const S* given) const {
    const int64_t half = a_.dim / 2;
    if constexpr (I::kPhases)
      each(half, [&](int64_t i) {
        const T phase = T(given[i]);
        r_[i] = std::cos(phase), r_[half + i] = std::sin(phase);
      });
    else
      each(a_.dim, [&](int64_t i) { r_[i] = T(given[i]); });
    T factor = 1;
    if (a_.normalize) {
      T square[1] = {0};
      each(a_.dim, [&](int64_t i) { square[0] += r_[i] * r_[i]; });
      sum(square);
      factor = inverse_norm(square[0]);
      each(a_.dim, [&](int64_t i) { r_[i] *= factor; });
    }
    threads_.barrier();
    return factor;
  }

  DHNS_ROW_FN void give_relation(T factor, T* out) const {
    const int64_t half = a_.dim / 2;
    if constexpr (I::kPhases) {
      each(half, [&](int64_t i) { out[i] = r_[i] * gr_[half + i] - r_[half + i] * gr_[i]; });
      return;
    }
    T along[1] = {0};
    if (a_.normalize) {
      each(a_.dim, [&](int64_t i) { along[0] += r_[i] * gr_[i]; });
      sum(along);
      if (!(factor < T(1e12))) along[0] = 0;
    }
    each(a_.dim, [&](int64_t i) { out[i] = factor * (gr_[i] - along[0] * r_[i]); });
  }

  // The three scores of generated x and y, before the margin, and the slopes of finish().
  DHNS_ROW_FN void score(T (&value)[3], T (&slope)[3]) const {
    const int64_t n = a_.dim / I::kParts;
    T sums[3] = {0, 0, 0};
    each(n, [&](int64_t i) {
      const auto r = I::load(r_, i, n), t = I::load(t_, i, n), y = I::load(y_, i, n);
      const auto q = I::compose(I::load(h_, i, n), r), x = I::compose(I::load(x_, i, n), r);
      sums[0] += I::term(x, t), sums[1] += I::term(q, y), sums[2] += I::term(x, y);
    });
    sum(sums);
    for (int k = 0; k < 3; ++k) value[k] = I::finish(sums[k], slope[k]);
  }

  DHNS_ROW_FN void row(int64_t b, double* partial) {
    const int64_t n = a_.dim / I::kParts, at = b * a_.dim;
    const Pair<T> factor = take(a_.head + at, a_.tail + at, b, h_, t_, share_);
    const T relation_factor = take_relation(a_.relation + b * a_.width);
    T p[1] = {0}, p_slope, sigmoid;
    each(n, [&](int64_t i) { p[0] += I::term(I::compose(I::load(h_, i, n), I::load(r_, i, n)), I::load(t_, i, n)); });
    sum(p);
    const T positive = finite_or_nan(a_.gamma + I::finish(p[0], p_slope));
    double loss = scale_ * 3 * weight_ * softplus_sigmoid(-positive, sigmoid);
    const T c = -scale_ * 3 * weight_ * sigmoid * p_slope;
    each(n, [&](int64_t i) {
      const auto h = I::load(h_, i, n), r = I::load(r_, i, n), t = I::load(t_, i, n), q = I::compose(h, r);
      const auto g = I::slopes(q, t, c);
      I::store(gh_, i, n, I::to_head(r, g.query)), I::store(gr_, i, n, I::to_relation(h, g.query)), I::store(gt_, i, n, g.entity);
    });
    const int64_t pairs = a_.attention ? 1 : a_.modalities;
    for (int64_t level = 0; level < a_.levels; ++level) {
      if (!(a_.weight[level] > 0)) continue;
      // No gradient is known before the scores of every pair are: several pairs are taken twice, the second time from the cache.
      T value[3] = {0, 0, 0}, of_loss[3] = {0, 0, 0}, one[3], slope[3];
      const int64_t steps = pairs == 1 || !wanted() ? pairs : 2 * pairs;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t from = ((level * a_.modalities + step % pairs) * a_.batch + b) * a_.dim;
        const Pair<T> generated = take(a_.neg_head + from, a_.neg_tail + from, b, x_, y_, generated_share_);
        score(one, slope);
        if (step < pairs)
          for (int k = 0; k < 3; ++k) value[k] += one[k] / T(pairs);
        if (step == pairs - 1) {
          const T weight = scale_ * a_.weight[level];
          for (int k = 0; k < 3; ++k) {
            loss += weight * softplus_sigmoid(finite_or_nan(a_.margin[level] + value[k]), sigmoid);
            of_loss[k] = weight * sigmoid;
          }
          if (threads_.rank() == 0) partial[1 + level] += of_loss[0] + of_loss[1] + of_loss[2];
        }
        if (!wanted() || step < steps - pairs) continue;
        const T c0 = of_loss[0] / T(pairs) * slope[0], c1 = of_loss[1] / T(pairs) * slope[1], c2 = of_loss[2] / T(pairs) * slope[2];
        each(n, [&](int64_t i) {
          const auto h = I::load(h_, i, n), r = I::load(r_, i, n), t = I::load(t_, i, n), x = I::load(x_, i, n), y = I::load(y_, i, n);
          const auto q = I::compose(h, r), qx = I::compose(x, r);
          const auto head = I::slopes(qx, t, c0), tail = I::slopes(q, y, c1), both = I::slopes(qx, y, c2);
          const auto by_x = head.query + both.query;
          I::store(gh_, i, n, I::load(gh_, i, n) + I::to_head(r, tail.query));
          I::store(gr_, i, n, I::load(gr_, i, n) + I::to_relation(h, tail.query) + I::to_relation(x, by_x));
          I::store(gt_, i, n, I::load(gt_, i, n) + head.entity);
          I::store(gx_, i, n, I::to_head(r, by_x)), I::store(gy_, i, n, tail.entity + both.entity);
        });
        threads_.barrier();
        if (a_.attention)
          give(a_.neg_head + from, a_.neg_tail + from, x_, y_, gx_, gy_, generated_share_, generated, nullptr, nullptr);
      }
    }
    if (threads_.rank() == 0) partial[0] += loss;
    threads_.barrier();
    if (wanted()) {
      give(a_.head + at, a_.tail + at, h_, t_, gh_, gt_, share_, factor, a_.grad_head + at, a_.grad_tail + at);
      give_relation(relation_factor, a_.grad_relation + b * a_.width);
    }
    threads_.barrier();
  }

  DHNS_ROW_FN bool wanted() const { return a_.grad_head != nullptr; }

  const HalEmbeddings<S, T>& a_;
  const Threads threads_;
  T *h_, *t_, *r_, *gh_, *gt_, *gr_, *x_, *y_, *gx_, *gy_, *ga_, *sums_, *share_, *generated_share_, *slope_;
  int64_t active_ = 0;
  T weight_ = 0, scale_ = 0;
};

// hal_scores: a block takes some rows of the batch, of all levels and kinds, and leaves loss and gradients of the margins in partial
// [blocks, 1 + L]. scratch: a double a warp.
template <class T>
class Scores {
 public:
  DHNS_ROW_FN Scores(const HalScores<T>& a, double* scratch, Threads threads) : a_(a), scratch_(scratch), threads_(threads) {}

  DHNS_ROW_FN void block(int64_t index, int64_t rows) {
    double* const partial = a_.partial + index * (1 + a_.levels);
    const int64_t first = index * rows, end = first + rows < a_.batch ? first + rows : a_.batch;
    int64_t active = 0;
    T weight = 0;
    for (int64_t i = 0; i < a_.levels; ++i)
      if (a_.weight[i] > 0) ++active, weight += a_.weight[i];
    const T scale = active ? a_.mu / (2 * T(a_.kinds) * T(active) * T(a_.batch)) : T(0);
    double slope;
    double loss = part(a_.positive, a_.grad_positive, first, end, T(0), T(-1), scale * T(a_.kinds) * weight, slope);
    for (int64_t i = 0; i < a_.levels; ++i) {
      double by_margin = 0;
      for (int64_t k = 0; k < a_.kinds; ++k) {
        const int64_t at = (i * a_.kinds + k) * a_.batch;
        T* const gradient = a_.grad_negative + at;
        if (a_.weight[i] > 0) {
          loss += part(a_.negative + at, gradient, first, end, a_.margin[i], T(1), scale * a_.weight[i], slope);
          by_margin += slope;
        } else {
          for (int64_t b = first + threads_.rank(); b < end; b += threads_.count()) gradient[b] = 0;
        }
      }
      by_margin = sum(by_margin);
      if (threads_.rank() == 0) partial[1 + i] = by_margin;
    }
    loss = sum(loss);
    if (threads_.rank() == 0) partial[0] = loss;
  }

 private:
  // This thread's share of the sums of scale·softplus(sign·(x + shift)) and of its derivative by x, which goes to `gradient`.
  DHNS_ROW_FN double part(const T* x, T* gradient, int64_t first, int64_t end, T shift, T sign, T scale, double& slope) const {
    double loss = 0;
    slope = 0;
    for (int64_t b = first + threads_.rank(); b < end; b += threads_.count()) {
      T sigmoid;
      loss += scale * softplus_sigmoid(sign * (finite_or_nan(x[b]) + shift), sigmoid);
      slope += gradient[b] = scale * sign * sigmoid;
    }
    return loss;
  }

  DHNS_ROW_FN double sum(double x) const {
    x = threads_.warp_sum(x);
    if (threads_.is_first_of_warp()) scratch_[threads_.warp()] = x;
    threads_.barrier();
    x = 0;
    for (int w = 0; w < threads_.warps(); ++w) x += scratch_[w];
    threads_.barrier();
    return x;
  }

  const HalScores<T>& a_;
  double* const scratch_;
  const Threads threads_;
};

// self_adversarial: a warp takes a row of N corruptions and its positive.
template <class T>
DHNS_ROW_FN void self_adversarial_row(const SelfAdversarial<T>& a, int64_t b, Threads threads) {
  const int64_t n = a.corruptions;
  const T* const x = a.negative + b * n;
  T* const gradient = a.grad_negative + b * n;
  T largest = -INFINITY, total = 0;
  for (int64_t j = threads.lane(); j < n; j += threads.lanes()) largest = a.temperature * x[j] > largest ? a.temperature * x[j] : largest;
  largest = threads.warp_max(largest);
  for (int64_t j = threads.lane(); j < n; j += threads.lanes())
    total += gradient[j] = exponential(a.temperature * finite_or_nan(x[j]) - largest);
  total = threads.warp_sum(total);
  const T scale = T(0.5) / T(a.batch), share = scale / total;
  T loss = 0, sigmoid;
  for (int64_t j = threads.lane(); j < n; j += threads.lanes()) {
    const T weight = share * gradient[j];
    loss += weight * softplus_sigmoid(x[j], sigmoid);
    gradient[j] = weight * sigmoid;
  }
  loss = threads.warp_sum(loss);
  if (!threads.is_first_of_warp()) return;
  a.partial[b] = loss + scale * softplus_sigmoid(-finite_or_nan(a.positive[b]), sigmoid);
  a.grad_positive[b] = -scale * sigmoid;
}

}  // namespace
}  // namespace dhns::DHNS_LEVEL
