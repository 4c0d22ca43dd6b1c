// The hardness-adaptive and the self-adversarial loss with their gradients in one pass over what they read, see dhns_fast/loss.py.
//
// hal_embeddings works row by row: the vectors of a triple and the generated ones of a level fit the second-level cache, so that memory
// sees every generated embedding once. A level goes: fuse (or take each modality as it is) → three scores → their weights σ(s) →
// gradients. Nothing flows into generated embeddings except on the way to the attention.
#include "hal_cpu.h"

#include <algorithm>
#include <vector>

#include "attention.h"
#include "interactions.h"

namespace dhns::kernels {
namespace {

// The query of a head and a relation.
template <class I, class T>
inline void compose(const T* h, const T* r, T* q, int64_t dim) {
  const int64_t n = dim / I::kParts;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    I::store(q, i, n, I::compose(I::template at<V>(h, i, n), I::template at<V>(r, i, n)));
  });
}

// gh = the gradient gq of a query led back to its head, and added to gr to its relation.
template <class I, class T>
inline void compose_gradient(const T* h, const T* r, const T* gq, T* gh, T* gr, int64_t dim) {
  const int64_t n = dim / I::kParts;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    const auto g = I::template at<V>(gq, i, n), hi = I::template at<V>(h, i, n), ri = I::template at<V>(r, i, n);
    const auto by_r = I::template at<V>(gr, i, n) + I::to_relation(hi, g);
    I::store(gh, i, n, I::to_head(ri, g));
    I::store(gr, i, n, by_r);
  });
}

// One query and tail: the score, and the slope of finish() for gradient_of.
template <class I, class T>
inline T score_of(const T* q, const T* t, T& slope, int64_t dim) {
  const int64_t n = dim / I::kParts;
  Sum<T> sum;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    sum.add(I::term(I::template at<V>(q, i, n), I::template at<V>(t, i, n)));
  });
  return I::finish(sum.total(), slope);
}

// gq, gt = c·∂score.
template <class I, class T>
inline void gradient_of(const T* q, const T* t, T c, T* gq, T* gt, int64_t dim) {
  const int64_t n = dim / I::kParts;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    const auto qi = I::template at<V>(q, i, n), ti = I::template at<V>(t, i, n);
    const auto g = I::slopes(qi, ti, c);
    I::store(gq, i, n, g.query);
    I::store(gt, i, n, g.entity);
  });
}

// The corruptions of (h, r, t) with x for the head, y for the tail, and both. q is the query of h and r.
template <class I, class T>
inline void scores_of_corruptions(const T* q, const T* r, const T* t, const T* x, const T* y, T* score, T* slope, int64_t dim) {
  const int64_t n = dim / I::kParts;
  Sum<T> head, tail, both;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    const auto qi = I::template at<V>(q, i, n), ri = I::template at<V>(r, i, n), ti = I::template at<V>(t, i, n);
    const auto xi = I::compose(I::template at<V>(x, i, n), ri), yi = I::template at<V>(y, i, n);
    head.add(I::term(xi, ti));
    tail.add(I::term(qi, yi));
    both.add(I::term(xi, yi));
  });
  score[0] = I::finish(head.total(), slope[0]);
  score[1] = I::finish(tail.total(), slope[1]);
  score[2] = I::finish(both.total(), slope[2]);
}

// Adds Σ_k c_k·∂score_k to gq, gr, gt; writes that for x and y where kGenerated, and fetches what lies ahead of them where not.
template <class I, bool kGenerated, class T>
inline void gradients_of_corruptions(const T* q, const T* r, const T* t, const T* x, const T* y, const T* c, T* gq, T* gr, T* gt, T* gx, T* gy,
                                     int64_t ahead, int64_t dim) {
  const int64_t n = dim / I::kParts;
  const T c0 = c[0], c1 = c[1], c2 = c[2];
  const auto body = [&](int64_t i, auto v) DHNS_ALWAYS_INLINE {
    using V = decltype(v);
    const auto qi = I::template at<V>(q, i, n), ri = I::template at<V>(r, i, n), ti = I::template at<V>(t, i, n);
    const auto xi = I::template at<V>(x, i, n), composed = I::compose(xi, ri), yi = I::template at<V>(y, i, n);
    const auto head = I::slopes(composed, ti, c0), tail = I::slopes(qi, yi, c1), both = I::slopes(composed, yi, c2);
    const auto by_x = head.query + both.query;
    I::store(gq, i, n, I::template at<V>(gq, i, n) + tail.query);
    I::store(gr, i, n, I::template at<V>(gr, i, n) + I::to_relation(xi, by_x));
    I::store(gt, i, n, I::template at<V>(gt, i, n) + head.entity);
    if (kGenerated) {
      I::store(gx, i, n, I::to_head(ri, by_x));
      I::store(gy, i, n, tail.entity + both.entity);
    }
  };
  each<T>(n, body, [&](int64_t i) {
    if (kGenerated) return;
    for (int part = 0; part < I::kParts; ++part) fetch(x + part * n + i, ahead), fetch(y + part * n + i, ahead);
  });
}

// Of a product model the scores of several pairs, `stride` apart, add up to those of three vectors: Σx, Σy, and Σ to_relation(x, y) in place of
// the relation. They are written to sums [3, dim], and hold all that the gradients need: generated embeddings are read this once.
template <class I, class T>
inline void sums_of_corruptions(const T* q, const T* r, const T* t, const T* x, const T* y, int64_t pairs, int64_t stride, T* sums, T* score,
                                int64_t ahead, int64_t dim) {
  const int64_t n = dim / I::kParts;
  Sum<T> head, tail, both;
  const auto body = [&](int64_t i, auto v) DHNS_ALWAYS_INLINE {
    using V = decltype(v);
    auto xs = I::template at<V>(x, i, n), ys = I::template at<V>(y, i, n), products = I::to_relation(xs, ys);
    for (int64_t at = stride; at < pairs * stride; at += stride) {
      const auto xi = I::template at<V>(x + at, i, n), yi = I::template at<V>(y + at, i, n);
      xs = xs + xi, ys = ys + yi, products = products + I::to_relation(xi, yi);
    }
    I::store(sums, i, n, xs), I::store(sums + dim, i, n, ys), I::store(sums + 2 * dim, i, n, products);
    const auto ri = I::template at<V>(r, i, n);
    head.add(I::term(I::compose(xs, ri), I::template at<V>(t, i, n)));
    tail.add(I::term(I::template at<V>(q, i, n), ys));
    both.add(I::term(ri, products));
  };
  each<T>(n, body, [&](int64_t i) {
    for (int64_t at = 0; at < pairs * stride; at += stride)
      for (int part = 0; part < I::kParts; ++part) fetch(x + at + part * n + i, ahead), fetch(y + at + part * n + i, ahead);
  });
  score[0] = head.total(), score[1] = tail.total(), score[2] = both.total();
}

// Their gradients: those of the query and of the relation are added up, that of the head's corruptions in gx until all levels have been.
template <class T>
inline void add_sums(const T* sums, const T* c, T* gx, T* gq, T* gr, int64_t dim) {
  T* const to[3] = {gx, gq, gr};
  for (int k = 0; k < 3; ++k) {
    const T factor = c[k];
    each<T>(dim, [&](int64_t i, auto v) {
      using V = decltype(v);
      const V sum = load_as<V>(to[k] + i) + factor * load_as<V>(sums + k * dim + i);
      std::memcpy(to[k] + i, &sum, sizeof sum);
    });
  }
}

template <class I, class T>
inline void add_heads(const T* gx, const T* r, const T* t, T* gr, T* gt, int64_t dim) {
  const int64_t n = dim / I::kParts;
  each<T>(n, [&](int64_t i, auto v) {
    using V = decltype(v);
    const auto x = I::template at<V>(gx, i, n);
    I::store(gr, i, n, I::template at<V>(gr, i, n) + I::to_relation(x, I::template at<V>(t, i, n)));
    I::store(gt, i, n, I::template at<V>(gt, i, n) + I::compose(x, I::template at<V>(r, i, n)));
  });
}

// Cosines, then sines of phases, [n / 2] -> [n].
template <class T>
inline void cosines_sines(const T* __restrict phase, T* __restrict out, int64_t n) {
  const int64_t half = n / 2;
  bool small = sizeof(T) == 4;
  for (int64_t i = 0; i < half; ++i) small &= std::fabs(phase[i]) < T(8192);
  if constexpr (sizeof(T) == 4) {
    if (small) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        float sine, cosine;
        sine_cosine(phase[i], sine, cosine);
        out[i] = cosine;
        out[half + i] = sine;
      }
      return;
    }
  }
  for (int64_t i = 0; i < half; ++i) out[i] = std::cos(phase[i]), out[half + i] = std::sin(phase[i]);
}

// The gradient of phases from that of cosines and sines.
template <class T>
inline void phase_gradient(const T* __restrict r, const T* __restrict gr, T* __restrict out, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) out[i] = r[i] * gr[half + i] - r[half + i] * gr[i];
}

// x brought to unit L2 norm in place; returns the factor, which the gradient needs. As F.normalize: a norm below 1e-12 counts as that.
template <class T>
inline T normalize(T* x, int64_t n) {
  const T norm = std::sqrt(dot(x, x, n)), factor = 1 / (norm > T(1e-12) ? norm : T(1e-12));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
  return factor;
}

template <class T>
inline void normalize_gradient(const T* __restrict x, T factor, T* __restrict gradient, int64_t n) {
  const T along = factor < T(1e12) ? dot(x, gradient, n) : T(0);
  for (int64_t i = 0; i < n; ++i) gradient[i] = factor * (gradient[i] - along * x[i]);
}

template <class I, class T>
class Rows {
 public:
  explicit Rows(const HalEmbeddings<T>& a)
      : a_(a), pairs_(a.attention ? 1 : a.modalities), copies_(a.attention || a.normalize), head_(entity()), tail_(entity()),
        relation_(a.dim), query_(a.dim), grad_relation_(a.dim), grad_query_(a.dim), grad_attention_(a.dim) {
    for (int64_t pair = 0; pair < pairs_; ++pair) generated_.push_back({entity(), entity(), {}});
    if (kSums && !copies_) sums_.resize(3 * a.dim), grad_heads_.resize(a.dim);
    for (int64_t i = 0; i < a.levels; ++i)
      if (a.weight[i] > 0) active_.push_back(i), weight_ += a.weight[i];
    scale_ = !active_.empty() ? a.mu / (6 * T(active_.size()) * T(a.batch)) : 0;
  }

  void block(int64_t index) {
    double* const partial = a_.partial + index * a_.columns;
    std::fill(partial, partial + a_.columns, 0.0);
    std::fill(grad_attention_.begin(), grad_attention_.end(), T(0));
    for (int64_t b = index * kRowsPerBlock, end = std::min(b + kRowsPerBlock, a_.batch); b < end; ++b) row(b, partial);
    if (a_.attention) std::copy(grad_attention_.begin(), grad_attention_.end(), partial + 1 + a_.levels);
  }

 private:
  enum Side { kHead, kTail };
  struct Entity {
    Fusion<T> fusion;
    const T* value;
    T factor;
  };
  Entity entity() const { return {Fusion<T>(a_.modalities, a_.dim), nullptr, 0}; }

  // The vector of an entity that scores see: e itself, or fused, or normalised.
  void take(Entity& x, const T* e, int64_t b, Side side, int64_t ahead) {
    x.value = e;
    if (!copies_) return;
    const bool* present = side == kHead ? a_.head_present : a_.tail_present;
    if (a_.attention)
      x.fusion.forward(
          [&](int64_t m) { return e + m * a_.batch * a_.dim; }, present ? present + b : nullptr, a_.batch, a_.attention, ahead);
    else
      std::copy(e, e + a_.dim, x.fusion.joint());
    if (a_.normalize) x.factor = normalize(x.fusion.joint(), a_.dim);
    x.value = x.fusion.joint();
  }

  // Back through `take`, from the gradient in x.fusion.gradient() to grad_e, or to the attention alone.
  void give(Entity& x, T* grad_e) {
    T* const g = x.fusion.gradient();
    if (a_.normalize) normalize_gradient(x.value, x.factor, g, a_.dim);
    if (a_.attention)
      x.fusion.backward(
          a_.attention, grad_attention_.data(), [&](int64_t m) { return grad_e ? grad_e + m * a_.batch * a_.dim : nullptr; }, past_caches_);
    else if (grad_e)
      put(g, grad_e, a_.dim);
  }

  void put(const T* x, T* out, int64_t n) const {
    write(out, n, past_caches_, [&](int64_t i, auto v) { return load_as<decltype(v)>(x + i); });
  }

  void row(int64_t b, double* partial) {
    const int64_t n = a_.dim;
    const bool wanted = a_.grad_head != nullptr;
    Entity &h = head_, &t = tail_;
    take(h, a_.head + b * n, b, kHead, n);
    take(t, a_.tail + b * n, b, kTail, n);
    T* const r = relation_.data();
    T relation_factor = 0;
    const T* given = a_.relation + b * a_.width;
    if constexpr (I::kPhases)
      cosines_sines(given, r, n);
    else
      std::copy(given, given + n, r);
    if (a_.normalize) relation_factor = normalize(r, n);
    T *const gh = h.fusion.gradient(), *const gr = grad_relation_.data(), *const gt = t.fusion.gradient();
    T *const q = query_.data(), *const gq = grad_query_.data();
    compose<I>(h.value, r, q, n);
    T sigmoid, slope;
    const T positive = finite_or_nan(a_.gamma + score_of<I>(q, t.value, slope, n));
    const T positive_weight = scale_ * 3 * weight_;
    partial[0] += positive_weight * softplus_sigmoid(-positive, sigmoid);
    if (wanted) gradient_of<I>(q, t.value, -positive_weight * sigmoid * slope, gq, gt, n);
    std::fill(gr, gr + n, T(0));

    for (size_t place = 0; place < active_.size(); ++place) {
      const int64_t level = active_[place], of_level = a_.modalities * a_.batch * n;
      const int64_t ahead = place + 1 < active_.size() ? (active_[place + 1] - level) * of_level : n - (level - active_[0]) * of_level;
      const int64_t at = (level * a_.modalities * a_.batch + b) * n, stride = a_.batch * n;
      const T *const x = a_.neg_head + at, *const y = a_.neg_tail + at;
      T score[3] = {0, 0, 0};
      if (kSums && !copies_) {
        sums_of_corruptions<I>(q, r, t.value, x, y, a_.modalities, stride, sums_.data(), score, ahead, n);
        for (T& sum : score) sum /= T(pairs_);
      } else {
        for (int64_t k = 0; k < pairs_; ++k) {
          Pair& pair = generated_[k];
          take(pair.head, x + k * stride, b, kHead, ahead);
          take(pair.tail, y + k * stride, b, kTail, ahead);
          T one[3];
          scores_of_corruptions<I>(q, r, t.value, pair.head.value, pair.tail.value, one, pair.slope, n);
          for (int kind = 0; kind < 3; ++kind) score[kind] += one[kind] / T(pairs_);
        }
      }
      const T weight = scale_ * a_.weight[level];
      T slope_of_loss[3];
      for (int kind = 0; kind < 3; ++kind) {
        partial[0] += weight * softplus_sigmoid(finite_or_nan(a_.margin[level] + score[kind]), sigmoid);
        partial[1 + level] += weight * sigmoid;
        slope_of_loss[kind] = weight * sigmoid / T(pairs_);
      }
      if (!wanted) continue;
      if (kSums && !copies_) {
        add_sums(sums_.data(), slope_of_loss, grad_heads_.data(), gq, gr, n);
        continue;
      }
      for (int64_t k = 0; k < pairs_; ++k) {
        Entity &head = generated_[k].head, &tail = generated_[k].tail;
        T c[3];
        for (int kind = 0; kind < 3; ++kind) c[kind] = slope_of_loss[kind] * generated_[k].slope[kind];
        if (a_.attention) {
          T *const gx = head.fusion.gradient(), *const gy = tail.fusion.gradient();
          gradients_of_corruptions<I, true>(q, r, t.value, head.value, tail.value, c, gq, gr, gt, gx, gy, ahead, n);
          give(head, nullptr), give(tail, nullptr);
        } else {
          gradients_of_corruptions<I, false, T>(q, r, t.value, head.value, tail.value, c, gq, gr, gt, nullptr, nullptr, ahead, n);
        }
      }
    }
    if (!wanted) return;
    if (kSums && !copies_) {
      add_heads<I>(grad_heads_.data(), r, t.value, gr, gt, n);
      std::fill(grad_heads_.begin(), grad_heads_.end(), T(0));
    }
    compose_gradient<I>(h.value, r, gq, gh, gr, n);
    give(h, a_.grad_head + b * n);
    give(t, a_.grad_tail + b * n);
    if (a_.normalize) normalize_gradient(r, relation_factor, gr, n);
    T* const out = a_.grad_relation + b * a_.width;
    if constexpr (I::kPhases)
      phase_gradient(r, gr, out, n);
    else
      put(gr, out, n);
  }

  const HalEmbeddings<T>& a_;
  // Gradients that no cache would hold until somebody reads them go past it: a sixth of the time of large batches.
  const bool past_caches_ = sizeof(T) * static_cast<size_t>(a_.batch * a_.dim * (a_.attention ? a_.modalities : 1)) >= 4u << 20;
  const int64_t pairs_;  // of generated vectors a level: one fused pair, or one of each modality
  const bool copies_;
  struct Pair {
    Entity head, tail;
    T slope[3];
  };
  Entity head_, tail_;
  std::vector<Pair> generated_;
  Buffer<T> relation_, query_, grad_relation_, grad_query_, grad_attention_;
  static constexpr bool kSums = I::kProduct;  // vectors as they are in memory go together, see sums_of_corruptions
  Buffer<T> sums_, grad_heads_;
  std::vector<int64_t> active_;  // the levels that count
  T weight_ = 0, scale_ = 0;
};

template <class I, class T>
void run(const HalEmbeddings<T>& a, int64_t first, int64_t last) {
  Rows<I, T> rows(a);
  for (int64_t block = first; block < last; ++block) rows.block(block);
  fence();
}

template <class T>
void dispatch(const HalEmbeddings<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  with_interaction(a.interaction, [&](auto interaction) { run<typename decltype(interaction)::type>(a, first, last); });
}

// Adds up softplus(sign·(x + shift)) and leaves scale·sign·sigmoid(sign·(x + shift)), its gradient, in `gradient`.
template <class T>
inline T softplus_sum(const T* __restrict x, T shift, T sign, T scale, T* __restrict gradient, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    T sigmoid;
    sum += softplus_sigmoid(sign * (finite_or_nan(x[i]) + shift), sigmoid);
    gradient[i] = scale * sign * sigmoid;
  }
  return scale * sum;
}

template <class T>
void scores(const HalScores<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  int64_t active = 0;
  T weight = 0;
  for (int64_t i = 0; i < a.levels; ++i)
    if (a.weight[i] > 0) active += 1, weight += a.weight[i];
  const T scale = active ? a.mu / (2 * T(a.kinds) * T(active) * T(a.batch)) : 0;
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kScoresPerBlock, count = std::min(kScoresPerBlock, a.batch - begin);
    double* const partial = a.partial + block * (1 + a.levels);
    partial[0] = softplus_sum(a.positive + begin, T(0), T(-1), scale * T(a.kinds) * weight, a.grad_positive + begin, count);
    for (int64_t i = 0; i < a.levels; ++i) {
      double slope = 0;
      for (int64_t kind = 0; kind < a.kinds; ++kind) {
        const int64_t at = (i * a.kinds + kind) * a.batch + begin;
        T* const gradient = a.grad_negative + at;
        if (a.weight[i] > 0)
          partial[0] += softplus_sum(a.negative + at, a.margin[i], T(1), scale * a.weight[i], gradient, count);
        else
          std::fill(gradient, gradient + count, T(0));
        for (int64_t j = 0; j < count; ++j) slope += gradient[j];
      }
      partial[1 + i] = slope;
    }
  }
}

template <class T>
void self_adversarial_row(const SelfAdversarial<T>& a, int64_t b) {
  const int64_t n = a.corruptions;
  const T* __restrict x = a.negative + b * n;
  T* __restrict gradient = a.grad_negative + b * n;
  T largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, a.temperature * x[j]);
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += gradient[j] = exponential(a.temperature * finite_or_nan(x[j]) - largest);
  const T scale = T(0.5) / T(a.batch), share = scale / total;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    T sigmoid;
    const T weight = share * gradient[j];
    sum += weight * softplus_sigmoid(x[j], sigmoid);
    gradient[j] = weight * sigmoid;
  }
  a.partial[b] = sum + softplus_sum(a.positive + b, T(0), T(-1), scale, a.grad_positive + b, 1);
}

template <class T>
void self_adversarial_rows(const SelfAdversarial<T>& a, int64_t first, int64_t last) {
  const FlushDenormals flush;
  for (int64_t b = first; b < last; ++b) self_adversarial_row(a, b);
}

}  // namespace

void hal_scores(const HalScores<float>& a, int64_t first, int64_t last) { scores(a, first, last); }
void hal_scores(const HalScores<double>& a, int64_t first, int64_t last) { scores(a, first, last); }

void self_adversarial(const SelfAdversarial<float>& a, int64_t first, int64_t last) { self_adversarial_rows(a, first, last); }
void self_adversarial(const SelfAdversarial<double>& a, int64_t first, int64_t last) { self_adversarial_rows(a, first, last); }

void hal_embeddings(const HalEmbeddings<float>& a, int64_t first, int64_t last) { dispatch(a, first, last); }
void hal_embeddings(const HalEmbeddings<double>& a, int64_t first, int64_t last) { dispatch(a, first, last); }

}  // namespace dhns::kernels
