// Consumers of the scores of all entities: ranks, the best k, log-sum-exp, the matrix. dhns_fast/ops/score_cpu.py calls them.
//
// A sweep packs 16 MB of entities at a time, which stay in the shared cache while every block of queries meets them, and hands
// each row of each block of scores to the consumer. Queries are shared out among the threads, and the entities of a sweep split as well
// where queries are few; the split depends on shapes alone, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "binding.h"
#include "product.h"
#include "score_cpu.h"

namespace {
using dhns::Tensor;
using namespace dhns::score;
using dhns::ceil_div;
using Buffer = dhns::Buffer<float>;
using dhns::kDot;

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kPackedBytes = 16 << 20;
constexpr int64_t kTasks = 64;

struct Tables {
  Tables(const Tensor& query, const Tensor& entity, const std::optional<Tensor>& scale, int64_t reduction)
      : query(dhns::data<float>(query)), entity(dhns::data<float>(entity)), scale(scale ? dhns::data<float>(*scale) : nullptr),
        queries(query.size(0)), entities(entity.size(0)), dim(query.size(1)), reduction(reduction) {}
  const float *query, *entity, *scale;
  int64_t queries, entities, dim, reduction;
};

// The queries of one block: a pointer each, the last one repeated where the block is not full.
struct QueryBlock {
  QueryBlock(const Tables& t, int64_t first) : first(first), rows(std::min(kRows, t.queries - first)) {
    const bool absorb = t.scale && t.reduction == kDot;
    if (absorb) product.resize(rows * t.dim);
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = std::min(i, rows - 1), at = (first + row) * t.dim;
      query[i] = t.query + at;
      scale[i] = t.scale + (t.scale ? at : 0);
      if (absorb) {
        if (i < rows)
          for (int64_t k = 0; k < t.dim; ++k) product[row * t.dim + k] = t.query[at + k] * t.scale[at + k];
        query[i] = product.data() + row * t.dim;
      }
    }
    scales = t.scale && !absorb ? scale : nullptr;
  }
  int64_t first, rows;
  const float *query[kRows], *scale[kRows];
  const float* const* scales;
  std::vector<float> product;
};

// Entities that are no rivals of a query: its known answers, rising, and its target.
struct Excluded {
  const int64_t *offsets = nullptr, *ids = nullptr, *target = nullptr;  // target null: the known answers alone

  const int64_t* from(int64_t row, int64_t entity) const {
    return offsets ? std::lower_bound(ids + offsets[row], ids + offsets[row + 1], entity) : nullptr;
  }
  // Overwrites the scores of excluded entities among the `count` from `first` with NaN; returns their number.
  int64_t mask(int64_t row, const int64_t*& next, int64_t first, int64_t count, float* scores) const {
    int64_t masked = 0;
    const int64_t own = target ? target[row] : -1;
    if (own >= first && own < first + count) scores[own - first] = kNaN, ++masked;
    if (offsets)
      for (; next < ids + offsets[row + 1] && *next < first + count; ++next)
        if (*next != own) scores[*next - first] = kNaN, ++masked;
    return masked;
  }
};

// Shares of the entities, where there are too few blocks of queries to occupy the threads.
int64_t shares(int64_t queries) { return ceil_div(kTasks, ceil_div(queries, kRows)); }

// consumer.row(share, query, scores [kColumns], first entity, number of entities, number of NaN put in for excluded ones)
template <class Consumer>
void sweep(const Tables& t, const Excluded& excluded, int64_t shares, Consumer& consumer) {
  const int64_t all_groups = ceil_div(t.entities, kColumns), group_size = kColumns * t.dim;
  const int64_t most = std::clamp<int64_t>(kPackedBytes / (4 * group_size), 1, all_groups);
  const Buffer packed(most * group_size);
  for (int64_t start = 0; start < all_groups; start += most) {
    const int64_t groups = std::min(most, all_groups - start);
    torch::stable::parallel_for(0, groups, 1 + 65536 / group_size, [&](int64_t begin, int64_t end) {
      const float* rows[kColumns];
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t j = 0; j < kColumns; ++j) rows[j] = t.entity + std::min((start + g) * kColumns + j, t.entities - 1) * t.dim;
        dhns::kernels::pack_entities(rows, t.dim, packed.data + g * group_size);
      }
    });
    torch::stable::parallel_for(0, ceil_div(t.queries, kRows) * shares, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float raw[kRows * kColumns];
      for (int64_t task = begin; task < end; ++task) {
        const QueryBlock block(t, task / shares * kRows);
        const int64_t share = task % shares, from = groups * share / shares, to = groups * (share + 1) / shares;
        const int64_t* next[kRows];
        for (int64_t i = 0; i < block.rows; ++i) next[i] = excluded.from(block.first + i, (start + from) * kColumns);
        for (int64_t g = from; g < to; ++g) {
          dhns::kernels::score_block(t.reduction, block.query, block.scales, block.rows, packed.data + g * group_size, t.dim, raw);
          const int64_t first = (start + g) * kColumns, count = std::min(kColumns, t.entities - first);
          for (int64_t i = 0; i < block.rows; ++i) {
            float* const scores = raw + i * kColumns;
            std::fill(scores + count, scores + kColumns, Consumer::kPadding);
            const int64_t masked = excluded.mask(block.first + i, next[i], first, count, scores);
            consumer.row(share, block.first + i, scores, first, count, masked);
          }
        }
      }
    });
  }
}

// Whether all are rows of a table.
bool inside(const int64_t* ids, int64_t count, int64_t rows) {
  return std::all_of(ids, ids + count, [=](int64_t id) { return id >= 0 && id < rows; });
}

// Whether offsets rise from 0 to the number of ids, and ids within each query.
bool ordered(const Tensor& offsets, const Tensor& ids) {
  const auto *const at = dhns::data<int64_t>(offsets), *const id = dhns::data<int64_t>(ids);
  const int64_t queries = offsets.size(0) - 1, count = ids.size(0);
  if (at[0] != 0 || at[queries] != count) return false;
  for (int64_t b = 0; b < queries; ++b) {
    if (at[b + 1] < at[b] || at[b + 1] > count) return false;
    for (int64_t i = at[b] + 1; i < at[b + 1]; ++i)
      if (id[i] <= id[i - 1]) return false;
  }
  return true;
}

// Operators that read ids return whether they are fit; where they are not, nothing is written.

// out [B]: raw scores of entity target[b], out of the very arithmetic of a sweep.
bool targets(const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, const Tensor target, Tensor out) {
  const Tables t(query, entity, scale, reduction);
  const auto* const ids = dhns::data<int64_t>(target);
  if (!inside(ids, t.queries, t.entities)) return false;
  auto* const result = dhns::data<float>(out);
  torch::stable::parallel_for(0, ceil_div(t.queries, kRows), 1, [&](int64_t begin, int64_t end) {
    const Buffer packed(kColumns * t.dim);
    alignas(64) float raw[kRows * kColumns];
    const float* rows[kColumns];
    for (int64_t b = begin; b < end; ++b) {
      const QueryBlock block(t, b * kRows);
      for (int64_t j = 0; j < kColumns; ++j) rows[j] = t.entity + ids[block.first + std::min(j, block.rows - 1)] * t.dim;
      dhns::kernels::pack_entities(rows, t.dim, packed.data);
      dhns::kernels::score_block(reduction, block.query, block.scales, block.rows, packed.data, t.dim, raw);
      for (int64_t i = 0; i < block.rows; ++i) result[block.first + i] = raw[i * kColumns + i];
    }
  });
  return true;
}

struct RankConsumer {
  static constexpr float kPadding = kNaN;
  const float* goal;
  const int64_t* first;  // [queries + 1], where the goals of each query begin; null: it has one
  int64_t goals;
  std::vector<int64_t> counts;  // [shares][goals][3]

  void row(int64_t share, int64_t query, const float* scores, int64_t, int64_t count, int64_t masked) {
    const int64_t begin = first ? first[query] : query, end = first ? first[query + 1] : query + 1;
    for (int64_t g = begin; g < end; ++g) {
      int64_t* const own = counts.data() + (share * goals + g) * 3;
      dhns::kernels::count_row(scores, goal[g], own);
      own[2] -= kColumns - count + masked;
      if (std::isnan(goal[g])) own[0] += count - masked;
    }
  }

  // counts [3, goals] of all shares.
  void sum(int64_t* out) const {
    std::fill(out, out + 3 * goals, 0);
    for (size_t i = 0; i < counts.size(); ++i) out[i % 3 * goals + i / 3 % goals] += counts[i];
  }
};

// counts [3, B]: rivals with a raw score greater than at_target, equal to it, and NaN.
bool rank(
    const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, const Tensor target,
    const Tensor at_target, const Tensor offsets, const Tensor ids, Tensor counts) {
  if (!ordered(offsets, ids)) return false;
  const Tables t(query, entity, scale, reduction);
  const int64_t parts = shares(t.queries);
  RankConsumer consumer{dhns::data<float>(at_target), nullptr, t.queries, std::vector<int64_t>(parts * t.queries * 3)};
  sweep(t, {dhns::data<int64_t>(offsets), dhns::data<int64_t>(ids), dhns::data<int64_t>(target)}, parts, consumer);
  consumer.sum(dhns::data<int64_t>(counts));
  return true;
}

// The same of queries that have several goals each, those of query b from goals[b] on; no rivals are the known answers alone. counts [3, T].
bool rank_groups(
    const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, const Tensor goals,
    const Tensor at_target, const Tensor offsets, const Tensor ids, Tensor counts) {
  if (!ordered(offsets, ids)) return false;
  const Tables t(query, entity, scale, reduction);
  const int64_t parts = shares(t.queries), total = at_target.size(0);
  RankConsumer consumer{dhns::data<float>(at_target), dhns::data<int64_t>(goals), total, std::vector<int64_t>(parts * total * 3)};
  sweep(t, {dhns::data<int64_t>(offsets), dhns::data<int64_t>(ids), nullptr}, parts, consumer);
  consumer.sum(dhns::data<int64_t>(counts));
  return true;
}

struct Entry {
  float score;
  int64_t id;
};
bool better(const Entry& a, const Entry& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

// Puts the k best of a range first, in no order.
void select(Entry* first, Entry* last, int64_t k) {
  if (last - first > k) std::nth_element(first, first + k - 1, last, better);
}

struct TopConsumer {
  static constexpr float kPadding = kNaN;

  TopConsumer(int64_t shares, int64_t queries, int64_t k, int64_t room)
      : queries(queries), k(k), room(room), kept(shares * queries * room), size(shares * queries), bound(shares * queries, -kInfinity) {}

  int64_t queries, k, room;
  std::vector<Entry> kept;    // [shares][queries][room]: whatever beat the bound since the k best were last selected
  std::vector<int64_t> size;  // [shares][queries]
  std::vector<float> bound;   // [shares][queries], the worst of the k best at the last selection

  void row(int64_t share, int64_t query, const float* scores, int64_t first, int64_t count, int64_t) {
    const int64_t at = share * queries + query;
    if (!dhns::kernels::any_above(scores, bound[at])) return;
    Entry* const own = kept.data() + at * room;
    int64_t have = size[at];
    if (room - have < kColumns) {
      select(own, own + have, k);
      have = k;
      bound[at] = own[k - 1].score;
    }
    // Without a branch, as which of the scores enter is chance. Ids rise, so that one equal to the worst of the best is worse than it.
    const float worst = bound[at];
    for (int64_t j = 0; j < count; ++j) {
      own[have] = {scores[j], first + j};
      have += scores[j] > worst;
    }
    size[at] = have;
  }
};

// scores, ids [B, k]: the best raw scores by score, then id; −inf, −1 beyond the last that is neither excluded nor NaN.
// first: the place of these queries' offsets. room: entries of 16 bytes that are kept for a query and share of the entities, k + kColumns at least.
bool topk(
    const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, const Tensor offsets, const Tensor ids,
    int64_t first, int64_t room, Tensor scores, Tensor found) {
  if (!ordered(offsets, ids)) return false;
  const Tables t(query, entity, scale, reduction);
  const int64_t k = scores.size(1), threads = torch::stable::get_num_threads();
  // No more shares than the threads need, as each keeps k of its own, and the result is the same; nor than fit in 16 MB.
  const int64_t wanted = threads == 1 ? 1 : ceil_div(4 * threads, ceil_div(t.queries, kRows));
  const int64_t parts = std::clamp<int64_t>((1 << 20) / (t.queries * room), 1, wanted);
  TopConsumer consumer(parts, t.queries, k, room);
  sweep(t, {dhns::data<int64_t>(offsets) + first, dhns::data<int64_t>(ids), nullptr}, parts, consumer);
  auto* const out = dhns::data<float>(scores);
  auto* const out_ids = dhns::data<int64_t>(found);
  torch::stable::parallel_for(0, t.queries, 1 + 4096 / (parts * k), [&](int64_t begin, int64_t end) {
    std::vector<Entry> merged;
    for (int64_t b = begin; b < end; ++b) {
      merged.clear();
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = part * t.queries + b;
        const auto own = consumer.kept.begin() + at * room;
        merged.insert(merged.end(), own, own + consumer.size[at]);
      }
      select(merged.data(), merged.data() + merged.size(), k);
      merged.resize(k, {-kInfinity, -1});
      std::sort(merged.begin(), merged.end(), better);
      for (int64_t j = 0; j < k; ++j) out[b * k + j] = merged[j].score, out_ids[b * k + j] = merged[j].id;
    }
  });
  return true;
}

struct LogSumExpConsumer {
  static constexpr float kPadding = -kInfinity;
  int64_t queries, entities, reduction;
  float* matrix;  // of all scores, or null
  std::vector<float> greatest;  // [shares][queries]
  std::vector<double> sum;      // of exp(score − greatest), [shares][queries]

  void row(int64_t share, int64_t query, float* scores, int64_t first, int64_t count, int64_t) {
    dhns::kernels::finish_row(reduction, scores, count);
    if (matrix) std::copy(scores, scores + count, matrix + query * entities + first);
    float& shift = greatest[share * queries + query];
    double& total = sum[share * queries + query];
    const float here = dhns::kernels::greatest(scores);
    if (here == -kInfinity) return;
    if (std::isnan(here) || here == kInfinity || shift == kInfinity) {  // a NaN stays in the sum, an infinity in the shift
      total += std::isnan(here) ? kNaN : 0;
      if (here == kInfinity) shift = here;
      return;
    }
    if (here > shift) {
      total *= std::exp(static_cast<double>(shift) - here);
      shift = here;
    }
    total += dhns::kernels::sum_exp(scores, shift);
  }
};

// out [B], and the scores [B, E] where they are wanted.
void logsumexp(
    const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, Tensor out,
    std::optional<Tensor> scores) {
  const Tables t(query, entity, scale, reduction);
  const int64_t parts = shares(t.queries);
  LogSumExpConsumer consumer{
      t.queries, t.entities, reduction, scores ? dhns::data<float>(*scores) : nullptr,
      std::vector<float>(parts * t.queries, -kInfinity), std::vector<double>(parts * t.queries)};
  sweep(t, {}, parts, consumer);
  auto* const result = dhns::data<float>(out);
  for (int64_t b = 0; b < t.queries; ++b) {
    float shift = -kInfinity;
    for (int64_t part = 0; part < parts; ++part) shift = std::max(shift, consumer.greatest[part * t.queries + b]);
    double total = 0;
    for (int64_t part = 0; part < parts; ++part)
      if (const double sum = consumer.sum[part * t.queries + b]; sum != 0)
        total += std::isnan(sum)       ? sum
            : shift == kInfinity ? 0
                                 : sum * std::exp(static_cast<double>(consumer.greatest[part * t.queries + b]) - shift);
    result[b] = std::isnan(total) ? kNaN : std::isinf(shift) ? shift : static_cast<float>(shift + std::log(total));
  }
}

struct MatrixConsumer {
  static constexpr float kPadding = 0;
  float* out;
  int64_t stride, reduction;

  void row(int64_t, int64_t query, float* scores, int64_t first, int64_t count, int64_t) {
    dhns::kernels::finish_row(reduction, scores, count);
    std::copy(scores, scores + count, out + query * stride + first);
  }
};

// out [B, E]
void matrix(const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, Tensor out) {
  const Tables t(query, entity, scale, reduction);
  MatrixConsumer consumer{dhns::data<float>(out), t.entities, reduction};
  sweep(t, {}, shares(t.queries), consumer);
}

// out [B, E] = grad·exp(score − logsumexp): the gradient of Σ grad·logsumexp in the scores, whose rows may be part of longer ones.
void softmax(const Tensor scores, const Tensor logsumexp, const Tensor grad, Tensor out) {
  const int64_t count = scores.size(1), stride = scores.stride(0);
  const auto *const in = dhns::data<float>(scores), *const shift = dhns::data<float>(logsumexp), *const factor = dhns::data<float>(grad);
  auto* const result = dhns::data<float>(out);
  torch::stable::parallel_for(0, scores.size(0), 1 + 65536 / count, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      dhns::kernels::softmax_row(in + b * stride, count, shift[b], factor[b], result + b * count);
  });
}

// out [rows, dim] += W·X of a table X [terms, dim], and W [rows, terms] or, in columns, [terms, rows].
void add_product(const float* weight, int64_t rows, bool columns, const float* table, int64_t terms, int64_t dim, float* out) {
  dhns::add_product<float>({weight, nullptr, nullptr, nullptr, rows, terms, dim, columns ? rows : terms, columns, true, out, nullptr}, table);
}

// Of dot: with G = W·E, by_query += s·G, by_scale += q·G, by_entity += Wᵀ·(s·q).
void product_gradients(const Gradients& t) {
  if (!t.queries || !t.entities || !t.dim) return;
  if (!t.scale) {
    add_product(t.weight, t.queries, false, t.entity, t.entities, t.dim, t.by_query);
    return add_product(t.weight, t.entities, true, t.query, t.queries, t.dim, t.by_entity);
  }
  std::vector<float> g(t.queries * t.dim), scaled(t.queries * t.dim);
  add_product(t.weight, t.queries, false, t.entity, t.entities, t.dim, g.data());
  for (int64_t i = 0; i < t.queries * t.dim; ++i) {
    t.by_query[i] += g[i] * t.scale[i];
    if (t.by_scale) t.by_scale[i] += g[i] * t.query[i];
    scaled[i] = t.query[i] * t.scale[i];
  }
  add_product(t.weight, t.entities, true, scaled.data(), t.queries, t.dim, t.by_entity);
}

// Adds the gradients of one tile, see score::Gradients.
void gradients(
    const Tensor query, const Tensor entity, const std::optional<Tensor> scale, int64_t reduction, const Tensor weight, Tensor by_query,
    Tensor by_entity, std::optional<Tensor> by_scale) {
  const Tables t(query, entity, scale, reduction);
  const Gradients tile{
      t.query, t.entity, t.scale, dhns::data<float>(weight), t.queries, t.entities, t.dim, reduction,
      dhns::data<float>(by_query), dhns::data<float>(by_entity), by_scale ? dhns::data<float>(*by_scale) : nullptr};
  if (reduction == kDot) return product_gradients(tile);
  torch::stable::parallel_for(0, dhns::kernels::gradient_parts(reduction, t.dim), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) dhns::kernels::add_gradients(tile, part);
  });
}
}  // namespace

#define DHNS_TABLES "Tensor query, Tensor entity, Tensor? scale, int reduction"

STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def("score_targets(" DHNS_TABLES ", Tensor target, Tensor(a!) out) -> bool");
  m.def("score_rank_groups(" DHNS_TABLES ", Tensor goals, Tensor at_target, Tensor offsets, Tensor ids, Tensor(a!) counts) -> bool");
  m.def("score_rank(" DHNS_TABLES ", Tensor target, Tensor at_target, Tensor offsets, Tensor ids, Tensor(a!) counts) -> bool");
  m.def("score_topk(" DHNS_TABLES ", Tensor offsets, Tensor ids, int first, int room, Tensor(a!) scores, Tensor(b!) found) -> bool");
  m.def("score_logsumexp(" DHNS_TABLES ", Tensor(a!) out, Tensor(b!)? scores) -> ()");
  m.def("score_matrix(" DHNS_TABLES ", Tensor(a!) out) -> ()");
  m.def("score_softmax(Tensor scores, Tensor logsumexp, Tensor grad, Tensor(a!) out) -> ()");
  m.def("score_gradients(" DHNS_TABLES ", Tensor weight, Tensor(a!) by_query, Tensor(b!) by_entity, Tensor(c!)? by_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CPU, m) {
  m.impl("score_targets", TORCH_BOX(&targets));
  m.impl("score_rank", TORCH_BOX(&rank));
  m.impl("score_rank_groups", TORCH_BOX(&rank_groups));
  m.impl("score_topk", TORCH_BOX(&topk));
  m.impl("score_logsumexp", TORCH_BOX(&logsumexp));
  m.impl("score_matrix", TORCH_BOX(&matrix));
  m.impl("score_softmax", TORCH_BOX(&softmax));
  m.impl("score_gradients", TORCH_BOX(&gradients));
}
