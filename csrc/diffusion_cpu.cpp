// Some rows of the generator's loss, from their products to the gradients of what these read, while their activations are in the cache.
#include "diffusion_cpu.h"

#include <cmath>

#include "product_cpu.h"
#include "vectors.h"

namespace dhns::kernels {
namespace {

constexpr double kEpsilon = 1e-5;

template <class V>
V positive(V x) {
  return x < V{} ? V{} : x;  // NaN stays NaN
}
template <class V>
V with_sign_of(V c, V x) {
  return x > V{} ? c : x < V{} ? -c : V{};
}
template <class T>
void put(T* to, T x) {
  *to = x;
}
template <class T>
void put(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof x);
}

template <class T>
struct Moments {
  T mean, var;
};

// Of a row, in two passes: E[x²] − E[x]² would cancel.
template <class T>
Moments<T> moments(const T* x, int64_t n) {
  Sum<T> sum, squares;
  each<T>(n, [&](int64_t j, auto v) { sum.add(load_as<decltype(v)>(x + j)); });
  const T mean = sum.total() / static_cast<T>(n);
  each<T>(n, [&](int64_t j, auto v) {
    const auto y = load_as<decltype(v)>(x + j) - mean;
    squares.add(y * y);
  });
  return {mean, squares.total() / static_cast<T>(n)};
}

template <class T>
struct Rows {
  const DiffusionLoss<T>& a;
  const int64_t first, last, D = a.D, H = 4 * D;
  T s1[kLossRows], s2[kLossRows], common[kLossRows];

  Rows(const DiffusionLoss<T>& a, int64_t first, int64_t last) : a(a), first(first), last(last) {}

  // out [rows, dim] (+)= from [rows, terms] · panels.
  void product(const T* from, int64_t terms, const T* panels, int64_t dim, bool add, T* out) const {
    const int64_t width = panel_width(T());
    add_product({from, nullptr, panels, nullptr, last, terms, dim, terms, false, add, out, nullptr}, first, last, 0, (dim + width - 1) / width);
  }

  // From x·Vxᵀ + c·Vcᵀ to h, and h less its mean.
  void activate() {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = a.timesteps[r] - 1;
      const Moments<T> x = moments(a.x + r * D, D), c = moments(a.c + r * D, D);
      const T t_mean = a.time_mean[at], mean = (x.mean + t_mean + c.mean) / 3;
      const T dx = x.mean - mean, dt = t_mean - mean, dc = c.mean - mean;
      const T scale = 1 / std::sqrt((x.var + a.time_var[at] + c.var + dx * dx + dt * dt + dc * dc) / 3 + static_cast<T>(kEpsilon));
      common[r - first] = mean, s1[r - first] = scale;
      T *const h = a.h + r * H, *const centred = a.centred + r * H;
      const T* const time = a.time + at * H;
      Sum<T> sum, squares;
      each<T>(H, [&](int64_t j, auto v) {
        using V = decltype(v);
        const V y = positive<V>((load_as<V>(h + j) + load_as<V>(time + j)) * scale + load_as<V>(a.bias1 + j));
        put(h + j, y);
        sum.add(y);
      });
      const T middle = sum.total() / static_cast<T>(H);
      each<T>(H, [&](int64_t j, auto v) {
        const auto y = load_as<decltype(v)>(h + j) - middle;
        put(centred + j, y);
        squares.add(y * y);
      });
      s2[r - first] = 1 / std::sqrt(squares.total() / static_cast<T>(H) + static_cast<T>(kEpsilon));
    }
  }

  // From q to the loss, and to e·s₂ in its place.
  void compare() {
    double loss = 0;
    T* const by_bias = a.by_bias2 + first / kLossRows * D;
    for (int64_t r = first; r < last; ++r) {
      const T scale = s2[r - first], weight = a.weight[r] / static_cast<T>(D);
      T* const e = a.e + r * D;
      const T* const noise = a.noise + r * D;
      Sum<T> sizes, along;
      each<T>(D, [&](int64_t j, auto v) {
        using V = decltype(v);
        const V q = load_as<V>(e + j), error = q * scale + load_as<V>(a.bias2 + j) - load_as<V>(noise + j);
        const V slope = with_sign_of<V>(weight + V{}, error);
        sizes.add(absolute(error));
        along.add(slope * q);
        put<T>(by_bias + j, load_as<V>(by_bias + j) + slope);
        put<T>(e + j, slope * scale);
      });
      loss += static_cast<double>(sizes.total() * weight);
      // Of no more use as such: what ∂h has of h less its mean.
      s2[r - first] = along.total() * scale * scale * scale / static_cast<T>(-H);
    }
    a.loss[first / kLossRows] = loss;
  }

  // From (e·s₂)·G to ∂p, and the gradients of the moments.
  void back() const {
    T* const by_bias = a.by_bias1 + first / kLossRows * H;
    for (int64_t r = first; r < last; ++r) {
      T* const d = a.d + r * H;
      const T *const h = a.h + r * H, *const centred = a.centred + r * H;
      const T along = s2[r - first], scale = s1[r - first];
      Sum<T> sum;
      each<T>(H, [&](int64_t j, auto v) {
        using V = decltype(v);
        const V y = load_as<V>(h + j), all = load_as<V>(d + j) + load_as<V>(centred + j) * along, slope = y <= V{} ? V{} : all;
        sum.add(slope * (y - load_as<V>(a.bias1 + j)));
        put<T>(by_bias + j, load_as<V>(by_bias + j) + slope);
        put<T>(d + j, slope * scale);
      });
      // s₁ = (v + eps)^−½ with v = Σ_parts (var + (mean − common)²)/3.
      const T by_v = scale * scale * sum.total() / -6, mean = common[r - first];
      a.by_var[r] = by_v;
      a.by_mean[r] = (a.time_mean[a.timesteps[r] - 1] - mean) * by_v * 2;
      const auto input = [&](const T* x, T* out) {
        each<T>(D, [&](int64_t j, auto v) { put<T>(out + j, (load_as<decltype(v)>(x + j) - mean) * (by_v * 2 / static_cast<T>(D))); });
      };
      if (a.to_state) input(a.x + r * D, a.by_x + r * D), input(a.c + r * D, a.by_c + r * D);
    }
  }

  void run() {
    product(a.x, D, a.state, H, false, a.h);
    product(a.c, D, a.condition, H, true, a.h);
    activate();
    product(a.centred, H, a.output, D, false, a.e);
    compare();
    if (!a.to_hidden) return;
    product(a.e, D, a.to_hidden, H, false, a.d);
    back();
    if (!a.to_state) return;
    product(a.d, H, a.to_state, D, true, a.by_x);
    product(a.d, H, a.to_condition, D, true, a.by_c);
  }
};

template <class T>
void add_places(const T* from, const int64_t* places, int64_t rows, int64_t dim, int64_t first, int64_t last, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const x = from + r * dim + first;
    T* const sum = to + (places[r] - 1) * dim + first;
    each<T>(last - first, [&](int64_t j, auto v) { put<T>(sum + j, load_as<decltype(v)>(sum + j) + load_as<decltype(v)>(x + j)); });
  }
}

}  // namespace

void diffusion_rows(const DiffusionLoss<float>& a, int64_t first, int64_t last) { Rows<float>(a, first, last).run(); }
void diffusion_rows(const DiffusionLoss<double>& a, int64_t first, int64_t last) { Rows<double>(a, first, last).run(); }
void add_to_places(const float* from, const int64_t* places, int64_t rows, int64_t dim, int64_t first, int64_t last, float* to) {
  add_places(from, places, rows, dim, first, last, to);
}
void add_to_places(const double* from, const int64_t* places, int64_t rows, int64_t dim, int64_t first, int64_t last, double* to) {
  add_places(from, places, rows, dim, first, last, to);
}

}  // namespace dhns::kernels
