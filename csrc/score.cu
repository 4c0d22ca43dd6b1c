// Distances to all entities for CUDA: launch and registration; the computation is in score_kernel.cuh.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>

#include "binding.h"

// torch 2.13 has a name of its own for the check inside stable headers.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#include "score_kernel.cuh"

namespace dhns::kernels {
// A block as score_kernel.cuh sees it.
struct TileThreads {
  __device__ int rank() const { return threadIdx.x; }
  __device__ void barrier() const { __syncthreads(); }
  __device__ bool any(bool x) const { return __syncthreads_or(x); }
  template <class T>
  __device__ T exchange(T x, int step) const { return __shfl_xor_sync(0xffffffffu, x, step); }
  // 16 bytes past the registers, the last ones 0 where fewer than that are there.
  __device__ void copy16(void* to, const void* from, int bytes) const {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  }
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  __device__ void wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
};
}  // namespace dhns::kernels

namespace dhns::kernels {
// One unnamed namespace for all of the file: nvcc's stubs cannot tell two apart.
namespace {
using Optional = std::optional<Tensor>;

constexpr int kTx = 16, kTy = 16;
constexpr int64_t kTileRows = 8 * kTy;

// Two blocks a multiprocessor leave 128 registers a thread: 64 sums, 16 numbers of the queries, and the rest. The search for maxima takes some more,
// scaled complex numbers, which no model here has, 32.
// Before sm_90 so does the sweep that makes tiles again.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kAgainTakesMore = true;
#else
constexpr bool kAgainTakesMore = false;
#endif
template <int64_t kReduction, int64_t kConsumer, bool kScaled>
constexpr int kBlocksAtOnce =
    (kScaled && kReduction == kComplexL1) || kConsumer == kMaxima || (kConsumer == kAgain && kAgainTakesMore) ? 1 : 2;

template <class E, int64_t kReduction, int64_t kConsumer, bool kScaled>
__global__ void __launch_bounds__(kTx* kTy, kBlocksAtOnce<kReduction, kConsumer, kScaled>) distance_sweep_kernel(SweepArguments<E> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  Sweep<TileThreads, E, kReduction, kConsumer, kScaled, kTx, kTy>(a, shared, TileThreads()).run(blockIdx.x, blockIdx.y);
}

template <class E, int64_t kReduction, bool kScaled>
__global__ void __launch_bounds__(64) distance_targets_kernel(
    const float* query, const float* scale, const E* entity, const int64_t* target, float* out, int64_t queries, int64_t dim) {
  const int64_t b = int64_t(blockIdx.x) * 64 + threadIdx.x;
  if (b < queries) out[b] = pair_score<kReduction, kScaled>(query + b * dim, scale + b * dim, entity + target[b] * dim, dim);
}

#ifndef DHNS_KERNEL_ONLY
cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class E, int64_t kReduction, int64_t kConsumer, bool kScaled>
void launch(const SweepArguments<E>& a, int64_t shares, cudaStream_t stream) {
  const auto kernel = distance_sweep_kernel<E, kReduction, kConsumer, kScaled>;
  constexpr int64_t bytes = sweep_shared_bytes<E, kScaled, kTx, kTy>();
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const dim3 grid(static_cast<unsigned>((a.queries + kTileRows - 1) / kTileRows), static_cast<unsigned>(shares));
  kernel<<<grid, kTx * kTy, bytes, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class E, int64_t kReduction, int64_t kConsumer>
void launch_for(const SweepArguments<E>& a, int64_t shares, cudaStream_t stream) {
  // A scale comes with a float32 table: nobody has another.
  if constexpr (sizeof(E) == sizeof(float))
    if (a.scale) return launch<E, kReduction, kConsumer, true>(a, shares, stream);
  launch<E, kReduction, kConsumer, false>(a, shares, stream);
}

template <class E, int64_t kReduction>
void launch_consumer(int64_t consumer, const SweepArguments<E>& a, int64_t shares, cudaStream_t stream) {
  switch (consumer) {
    case kRank: return launch_for<E, kReduction, kRank>(a, shares, stream);
    case kMaxima: return launch_for<E, kReduction, kMaxima>(a, shares, stream);
    case kAgain: return launch_for<E, kReduction, kAgain>(a, shares, stream);
    case kLogSumExp: return launch_for<E, kReduction, kLogSumExp>(a, shares, stream);
    case kScores: return launch_for<E, kReduction, kScores>(a, shares, stream);
    case kDoubt:
      if constexpr (kReduction == kL2) launch<E, kL2, kDoubt, false>(a, shares, stream);
  }
}

template <class E>
void sweep(
    int64_t reduction, int64_t consumer, const Tensor& query, const Optional& scale, const Tensor& entity, const Optional& offsets,
    const Optional& ids, const Optional& target, const Optional& slot, const Optional& goal, const Optional& out, const Optional& more,
    int64_t base, int64_t shares, int64_t slots) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t entities = entity.size(0), tiles = (entities + 8 * kTx - 1) / (8 * kTx);
  const auto pointer = [](const Optional& x) { return x ? x->data_ptr() : nullptr; };
  const int64_t halves = reduction == kComplexL1 ? 2 : 1;
  const auto whole = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const bool aligned = query.size(1) / halves * sizeof(E) % 16 == 0 && whole(query.data_ptr()) && whole(entity.data_ptr()) && whole(pointer(scale));
  const SweepArguments<E> a{
      aligned, query.size(0), entities, query.size(1), base, (tiles + shares - 1) / shares, slots, data<float>(query),
      static_cast<const float*>(pointer(scale)), data<E>(entity), static_cast<const int64_t*>(pointer(offsets)),
      static_cast<const int64_t*>(pointer(ids)), static_cast<const int64_t*>(pointer(target)), static_cast<const int32_t*>(pointer(slot)),
      static_cast<const float*>(pointer(goal)), pointer(out), static_cast<float*>(pointer(more))};
  const auto stream = current_stream(query);
  switch (reduction) {
    case kL1: return launch_consumer<E, kL1>(consumer, a, shares, stream);
    case kL2: return launch_consumer<E, kL2>(consumer, a, shares, stream);
    case kComplexL1: return launch_consumer<E, kComplexL1>(consumer, a, shares, stream);
  }
}

using torch::headeronly::ScalarType;

void distance_sweep(
    int64_t reduction, int64_t consumer, Tensor query, Optional scale, Tensor entity, Optional offsets, Optional ids, Optional target,
    Optional slot, Optional goal, Optional out, Optional more, int64_t base, int64_t shares, int64_t slots) {
  const auto function = entity.scalar_type() == ScalarType::BFloat16 ? sweep<__nv_bfloat16> : sweep<float>;
  function(reduction, consumer, query, scale, entity, offsets, ids, target, slot, goal, out, more, base, shares, slots);
}

template <class E, int64_t kReduction>
void targets_of(const Tensor& query, const Optional& scale, const Tensor& entity, const Tensor& target, const Tensor& out) {
  const auto stream = current_stream(query);
  const int64_t queries = query.size(0), dim = query.size(1);
  const unsigned blocks = static_cast<unsigned>((queries + 63) / 64);
  if (scale)
    distance_targets_kernel<E, kReduction, true><<<blocks, 64, 0, stream>>>(
        data<float>(query), data<float>(*scale), data<E>(entity), data<int64_t>(target), data<float>(out), queries, dim);
  else
    distance_targets_kernel<E, kReduction, false><<<blocks, 64, 0, stream>>>(
        data<float>(query), data<float>(query), data<E>(entity), data<int64_t>(target), data<float>(out), queries, dim);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class E>
void targets(int64_t reduction, const Tensor& query, const Optional& scale, const Tensor& entity, const Tensor& target, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  switch (reduction) {
    case kL1: return targets_of<E, kL1>(query, scale, entity, target, out);
    case kL2: return targets_of<E, kL2>(query, scale, entity, target, out);
    case kComplexL1: return targets_of<E, kComplexL1>(query, scale, entity, target, out);
  }
}

void distance_targets(int64_t reduction, Tensor query, Optional scale, Tensor entity, Tensor target, Tensor out) {
  const auto function = entity.scalar_type() == ScalarType::BFloat16 ? targets<__nv_bfloat16> : targets<float>;
  function(reduction, query, scale, entity, target, out);
}
#endif
}  // namespace
}  // namespace dhns::kernels

#ifndef DHNS_KERNEL_ONLY
STABLE_TORCH_LIBRARY_FRAGMENT(dhns_fast_native, m) {
  m.def(
      "distance_sweep(int reduction, int consumer, Tensor query, Tensor? scale, Tensor entity, Tensor? offsets, Tensor? ids, Tensor? target, "
      "Tensor? slot, Tensor? goal, Tensor(a!)? out, Tensor(b!)? more, int base, int shares, int slots) -> ()");
  m.def("distance_targets(int reduction, Tensor query, Tensor? scale, Tensor entity, Tensor target, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CUDA, m) {
  m.impl("distance_sweep", TORCH_BOX(&dhns::kernels::distance_sweep));
  m.impl("distance_targets", TORCH_BOX(&dhns::kernels::distance_targets));
}
#endif
