// The hardness-adaptive and the self-adversarial loss with their gradients in one pass over what they read, see dhns_fast/loss.py.
//
// hal_embeddings works row by row: the vectors of a triple and the generated ones of a level fit the second-level cache, so that memory
// sees every generated embedding once. A level goes: fuse (or take each modality as it is) → three scores → their weights σ(s) →
// gradients. Nothing flows into generated embeddings except on the way to the attention.
#include "hal_cpu.h"

#include <algorithm>
#include <vector>

#include "interactions.h"

namespace dhns::DHNS_LEVEL {
namespace {

// One entity's modalities e_m [D], `stride` apart, brought together: Σ_m a_m·e_m with a = softmax_m(w·tanh(e_m)).
template <class T>
class Fusion {
 public:
  Fusion(int64_t modalities, int64_t dim)
      : modalities_(modalities), dim_(dim), tanh_(modalities * dim), share_(modalities), slope_(modalities), joint_(dim), gradient_(dim) {}

  T* joint() { return joint_.data(); }
  T* gradient() { return gradient_.data(); }

  void forward(const T* e, int64_t stride, const bool* present, int64_t present_stride, const T* attention) {
    e_ = e, stride_ = stride;
    T largest = -INFINITY;
    for (int64_t m = 0; m < modalities_; ++m) {
      share_[m] = -INFINITY;
      if (present && !present[m * present_stride]) continue;
      const T* __restrict x = e + m * stride;
      T* __restrict th = &tanh_[m * dim_];
      T logit = 0;
#pragma omp simd reduction(+ : logit)
      for (int64_t i = 0; i < dim_; ++i) {
        th[i] = hyperbolic_tangent(x[i]);
        logit += attention[i] * th[i];
      }
      share_[m] = logit;
      largest = logit > largest || logit != logit ? logit : largest;
    }
    T total = 0;
    for (T& share : share_) total += share = share == -INFINITY ? T(0) : exponential(share - largest);
    std::fill(joint_.begin(), joint_.end(), T(0));
    for (int64_t m = 0; m < modalities_; ++m)
      if (share_[m] != 0) add_scaled(joint_.data(), share_[m] /= total, e + m * stride, dim_);
  }

  // From the gradient of the joint embedding: that of the attention, added to grad_attention, and where grad_e is not null that of
  // the modalities, written to grad_e.
  void backward(const T* attention, T* grad_attention, T* grad_e) {
    const T* g = gradient_.data();
    T mean = 0;
    for (int64_t m = 0; m < modalities_; ++m) {
      slope_[m] = share_[m] != 0 ? dot(g, e_ + m * stride_, dim_) : T(0);
      mean += share_[m] * slope_[m];
    }
    for (int64_t m = 0; m < modalities_; ++m) {
      const T share = share_[m], slope = share * (slope_[m] - mean);
      const T* __restrict th = &tanh_[m * dim_];
      if (share != 0) add_scaled(grad_attention, slope, th, dim_);
      if (!grad_e) continue;
      T* __restrict out = grad_e + m * stride_;
      if (share != 0) {
#pragma omp simd
        for (int64_t i = 0; i < dim_; ++i) out[i] = share * g[i] + slope * attention[i] * (1 - th[i] * th[i]);
      } else {
        std::fill(out, out + dim_, T(0));
      }
    }
  }

 private:
  int64_t modalities_, dim_, stride_ = 0;
  const T* e_ = nullptr;
  std::vector<T> tanh_, share_, slope_, joint_, gradient_;
};

// x brought to unit L2 norm in place; returns the factor, which the gradient needs. As F.normalize: a norm below 1e-12 counts as that.
template <class T>
inline T normalize(T* x, int64_t n) {
  const T norm = std::sqrt(dot(x, x, n)), factor = 1 / (norm > T(1e-12) ? norm : T(1e-12));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
  return factor;
}

template <class T>
inline void normalize_gradient(const T* x, T factor, T* gradient, int64_t n) {
  const T along = factor < T(1e12) ? dot(x, gradient, n) : T(0);
  for (int64_t i = 0; i < n; ++i) gradient[i] = factor * (gradient[i] - along * x[i]);
}

template <class I, class T>
class Rows {
 public:
  explicit Rows(const HalEmbeddings<T>& a)
      : a_(a), pairs_(a.attention ? 1 : a.modalities), copies_(a.attention || a.normalize), head_(entity()), tail_(entity()),
        relation_(a.dim), grad_relation_(a.dim), grad_attention_(a.dim) {
    for (int64_t pair = 0; pair < pairs_; ++pair) generated_.push_back({entity(), entity(), {}});
    for (int64_t i = 0; i < a.levels; ++i)
      if (a.weight[i] > 0) active_ += 1, weight_ += a.weight[i];
    scale_ = active_ ? a.mu / (6 * T(active_) * T(a.batch)) : 0;
  }

  void block(int64_t index) {
    double* const partial = a_.partial + index * (1 + a_.levels + a_.dim);
    std::fill(partial, partial + 1 + a_.levels + a_.dim, 0.0);
    std::fill(grad_attention_.begin(), grad_attention_.end(), T(0));
    for (int64_t b = index * kRowsPerBlock, end = std::min(b + kRowsPerBlock, a_.batch); b < end; ++b) row(b, partial);
    std::copy(grad_attention_.begin(), grad_attention_.end(), partial + 1 + a_.levels);
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
  void take(Entity& x, const T* e, int64_t b, Side side) {
    x.value = e;
    if (!copies_) return;
    const bool* present = side == kHead ? a_.head_present : a_.tail_present;
    if (a_.attention)
      x.fusion.forward(e, a_.batch * a_.dim, present ? present + b : nullptr, a_.batch, a_.attention);
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
      x.fusion.backward(a_.attention, grad_attention_.data(), grad_e);
    else if (grad_e)
      std::copy(g, g + a_.dim, grad_e);
  }

  void row(int64_t b, double* partial) {
    const int64_t n = a_.dim;
    const bool wanted = a_.grad_head != nullptr;
    Entity &h = head_, &t = tail_;
    take(h, a_.head + b * n, b, kHead);
    take(t, a_.tail + b * n, b, kTail);
    T* const r = relation_.data();
    T relation_factor = 0;
    const T* given = a_.relation + b * a_.width;
    if (a_.interaction == kRotatE)
      cosines_sines(given, r, n);
    else
      std::copy(given, given + n, r);
    if (a_.normalize) relation_factor = normalize(r, n);
    T *const gh = h.fusion.gradient(), *const gr = grad_relation_.data(), *const gt = t.fusion.gradient();
    T sigmoid, slope;
    const T positive = finite_or_nan(a_.gamma + score_of<I>(h.value, r, t.value, slope, n));
    const T positive_weight = scale_ * 3 * weight_;
    partial[0] += positive_weight * softplus_sigmoid(-positive, sigmoid);
    if (wanted) gradient_of<I>(h.value, r, t.value, -positive_weight * sigmoid * slope, gh, gr, gt, n);

    for (int64_t level = 0; level < a_.levels; ++level) {
      if (!(a_.weight[level] > 0)) continue;
      T score[3] = {0, 0, 0};
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        Entity &x = generated_[pair].head, &y = generated_[pair].tail;
        const int64_t at = ((level * a_.modalities + pair) * a_.batch + b) * n;
        take(x, a_.neg_head + at, b, kHead);
        take(y, a_.neg_tail + at, b, kTail);
        T one[3];
        scores_of_corruptions<I>(h.value, r, t.value, x.value, y.value, one, generated_[pair].slope, n);
        for (int kind = 0; kind < 3; ++kind) score[kind] += one[kind] / T(pairs_);
      }
      const T weight = scale_ * a_.weight[level];
      T slope_of_loss[3];
      for (int kind = 0; kind < 3; ++kind) {
        partial[0] += weight * softplus_sigmoid(finite_or_nan(a_.margin[level] + score[kind]), sigmoid);
        partial[1 + level] += weight * sigmoid;
        slope_of_loss[kind] = weight * sigmoid / T(pairs_);
      }
      if (!wanted) continue;
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        Entity &x = generated_[pair].head, &y = generated_[pair].tail;
        T c[3];
        for (int kind = 0; kind < 3; ++kind) c[kind] = slope_of_loss[kind] * generated_[pair].slope[kind];
        if (a_.attention) {
          gradients_of_corruptions<I, true>(
              h.value, r, t.value, x.value, y.value, c, gh, gr, gt, x.fusion.gradient(), y.fusion.gradient(), n);
          give(x, nullptr), give(y, nullptr);
        } else {
          gradients_of_corruptions<I, false, T>(h.value, r, t.value, x.value, y.value, c, gh, gr, gt, nullptr, nullptr, n);
        }
      }
    }
    if (!wanted) return;
    give(h, a_.grad_head + b * n);
    give(t, a_.grad_tail + b * n);
    if (a_.normalize) normalize_gradient(r, relation_factor, gr, n);
    T* const out = a_.grad_relation + b * a_.width;
    if (a_.interaction == kRotatE)
      phase_gradient(r, gr, out, n);
    else
      std::copy(gr, gr + n, out);
  }

  const HalEmbeddings<T>& a_;
  const int64_t pairs_;  // of generated vectors a level: one fused pair, or one of each modality
  const bool copies_;
  struct Pair {
    Entity head, tail;
    T slope[3];
  };
  Entity head_, tail_;
  std::vector<Pair> generated_;
  std::vector<T> relation_, grad_relation_, grad_attention_;
  int64_t active_ = 0;
  T weight_ = 0, scale_ = 0;
};

template <class I, class T>
void run(const HalEmbeddings<T>& a, int64_t first, int64_t last) {
  Rows<I, T> rows(a);
  for (int64_t block = first; block < last; ++block) rows.block(block);
}

template <class T>
void dispatch(const HalEmbeddings<T>& a, int64_t first, int64_t last) {
  switch (a.interaction) {
    case kTransE1: return run<TransE<1>>(a, first, last);
    case kTransE2: return run<TransE<2>>(a, first, last);
    case kDistMult: return run<DistMult>(a, first, last);
    case kComplEx: return run<ComplEx>(a, first, last);
    case kRotatE: return run<RotatE>(a, first, last);
  }
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
void scores(const HalScores<T>& a) {
  int64_t active = 0;
  T weight = 0;
  for (int64_t i = 0; i < a.levels; ++i)
    if (a.weight[i] > 0) active += 1, weight += a.weight[i];
  const T scale = active ? a.mu / (2 * T(a.kinds) * T(active) * T(a.batch)) : 0;
  a.partial[0] = softplus_sum(a.positive, T(0), T(-1), scale * T(a.kinds) * weight, a.grad_positive, a.batch);
  const int64_t size = a.kinds * a.batch;
  for (int64_t i = 0; i < a.levels; ++i) {
    T* const gradient = a.grad_negative + i * size;
    double slope = 0;
    if (a.weight[i] > 0)
      a.partial[0] += softplus_sum(a.negative + i * size, a.margin[i], T(1), scale * a.weight[i], gradient, size);
    else
      std::fill(gradient, gradient + size, T(0));
    for (int64_t j = 0; j < size; ++j) slope += gradient[j];
    a.partial[1 + i] = slope;
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

}  // namespace

void hal_scores(const HalScores<float>& a) { scores(a); }
void hal_scores(const HalScores<double>& a) { scores(a); }

void self_adversarial(const SelfAdversarial<float>& a, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) self_adversarial_row(a, b);
}
void self_adversarial(const SelfAdversarial<double>& a, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) self_adversarial_row(a, b);
}

void hal_embeddings(const HalEmbeddings<float>& a, int64_t first, int64_t last) { dispatch(a, first, last); }
void hal_embeddings(const HalEmbeddings<double>& a, int64_t first, int64_t last) { dispatch(a, first, last); }

}  // namespace dhns::DHNS_LEVEL
