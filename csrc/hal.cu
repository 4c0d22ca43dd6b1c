// The losses for CUDA: launch and registration; the computation is in hal_kernel.cuh.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <optional>

#include "binding.h"

#define DHNS_LEVEL cuda

namespace dhns::DHNS_LEVEL {
// A block as hal_kernel.cuh sees it.
struct Threads {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int count() const { return blockDim.x; }
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int warps() const { return blockDim.x / 32; }
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int lanes() const { return 32; }
  __device__ bool is_first_of_warp() const { return lane() == 0; }
  __device__ void barrier() const { __syncthreads(); }
  template <class T>
  __device__ T warp_sum(T x) const {
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
  template <class T>
  __device__ T warp_max(T x) const {
    for (int offset = 16; offset; offset /= 2) {
      const T other = __shfl_xor_sync(0xffffffffu, x, offset);
      x = other > x ? other : x;
    }
    return x;
  }
};
}  // namespace dhns::DHNS_LEVEL

#include "hal_kernel.cuh"

namespace {
using dhns::data;
using dhns::Tensor;
using dhns::cuda::HalArguments;
using Optional = std::optional<Tensor>;

// 256 threads: four elements each at D = 1024, and three blocks of 45 kB of shared memory a multiprocessor.
constexpr int kThreads = 256;

// Two blocks a multiprocessor leave 128 registers, of which RotatE in float64 spills some.
template <class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 1 : 2;

template <class I, class S, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) hal_embeddings_kernel(HalArguments<S, T> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  dhns::cuda::Row<I, S, T> row(a, reinterpret_cast<T*>(shared), dhns::cuda::Threads());
  row.block(blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) hal_scores_kernel(dhns::HalScores<T> a, int64_t rows) {
  __shared__ double scratch[kThreads / 32];
  dhns::cuda::Scores<T>(a, scratch, dhns::cuda::Threads()).block(blockIdx.x, rows);
}

template <class T>
__global__ void __launch_bounds__(kThreads) self_adversarial_kernel(dhns::SelfAdversarial<T> a) {
  const int64_t b = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (b < a.batch) dhns::cuda::self_adversarial_row(a, b, dhns::cuda::Threads());
}

// A compile check wants a kernel or two and not all of them.
#ifndef DHNS_KERNEL_ONLY
template <class I, class S, class T>
void launch(const HalArguments<S, T>& a, int64_t blocks, cudaStream_t stream) {
  const auto kernel = hal_embeddings_kernel<I, S, T>;
  const int64_t bytes = dhns::cuda::hal_shared_bytes<T>(a.dim, a.modalities, kThreads / 32);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_double(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }

template <class T>
void run_scores(
    const Tensor& positive, const Tensor& negative, const Tensor& margin, const Tensor& weight, double mu, const Tensor& grad_positive,
    const Tensor& grad_negative, const Tensor& partial) {
  const torch::stable::accelerator::DeviceGuard guard(positive.get_device_index());
  const int64_t batch = positive.size(0), blocks = partial.size(0);
  const dhns::HalScores<T> a{batch, negative.size(0), negative.size(1), static_cast<T>(mu), data<T>(positive), data<T>(negative),
                             data<T>(margin), data<T>(weight), data<T>(grad_positive), data<T>(grad_negative), data<double>(partial)};
  hal_scores_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(positive)>>>(a, (batch + blocks - 1) / blocks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void hal_scores(
    Tensor positive, Tensor negative, Tensor margin, Tensor weight, double mu, Tensor grad_positive, Tensor grad_negative, Tensor partial) {
  (is_double(positive) ? run_scores<double> : run_scores<float>)(
      positive, negative, margin, weight, mu, grad_positive, grad_negative, partial);
}

template <class T>
void run_self_adversarial(
    const Tensor& positive, const Tensor& negative, double temperature, const Tensor& grad_positive, const Tensor& grad_negative,
    const Tensor& partial) {
  const torch::stable::accelerator::DeviceGuard guard(positive.get_device_index());
  const dhns::SelfAdversarial<T> a{positive.size(0), negative.size(1), static_cast<T>(temperature), data<T>(positive), data<T>(negative),
                                   data<T>(grad_positive), data<T>(grad_negative), data<double>(partial)};
  const int64_t blocks = (a.batch + kThreads / 32 - 1) / (kThreads / 32);
  self_adversarial_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(positive)>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void self_adversarial(Tensor positive, Tensor negative, double temperature, Tensor grad_positive, Tensor grad_negative, Tensor partial) {
  (is_double(positive) ? run_self_adversarial<double> : run_self_adversarial<float>)(
      positive, negative, temperature, grad_positive, grad_negative, partial);
}

template <class T>
T* data_or_null(const Optional& x) {
  return x ? data<T>(*x) : nullptr;
}

template <class S, class T>
void run(
    int64_t interaction, const Tensor& head, const Tensor& relation, const Tensor& tail, const Tensor& neg_head, const Tensor& neg_tail,
    const Tensor& margin, const Tensor& weight, double mu, double gamma, const Optional& attention, bool normalize,
    const Optional& head_present, const Optional& tail_present, const Optional& grad_head, const Optional& grad_relation,
    const Optional& grad_tail, const Tensor& partial) {
  const torch::stable::accelerator::DeviceGuard guard(head.get_device_index());
  const auto stream = current_stream(head);
  const int64_t batch = relation.size(0), blocks = partial.size(0);
  const HalArguments<S, T> a{
      batch, neg_head.size(3), relation.size(1), neg_head.size(0), neg_head.size(1), (batch + blocks - 1) / blocks, normalize,
      grad_head.has_value(), interaction == dhns::kRotatE, static_cast<T>(mu), static_cast<T>(gamma), data<S>(head), data<S>(relation),
      data<S>(tail), data<S>(neg_head), data<S>(neg_tail), data<T>(margin), data<T>(weight), data_or_null<S>(attention),
      data_or_null<bool>(head_present), data_or_null<bool>(tail_present), data_or_null<T>(grad_head), data_or_null<T>(grad_relation),
      data_or_null<T>(grad_tail), data<double>(partial)};
  dhns::cuda::with_interaction(interaction, [&](auto one) { launch<typename decltype(one)::type>(a, blocks, stream); });
}

void hal_embeddings(
    int64_t interaction, Tensor head, Tensor relation, Tensor tail, Tensor neg_head, Tensor neg_tail, Tensor margin, Tensor weight, double mu,
    double gamma, Optional attention, bool normalize, Optional head_present, Optional tail_present, Optional grad_head,
    Optional grad_relation, Optional grad_tail, Tensor partial) {
  using torch::headeronly::ScalarType;
  const auto type = head.scalar_type();
  const auto function = type == ScalarType::Double ? run<double, double>
      : type == ScalarType::BFloat16               ? run<__nv_bfloat16, float>
                                                   : run<float, float>;
  function(
      interaction, head, relation, tail, neg_head, neg_tail, margin, weight, mu, gamma, attention, normalize, head_present, tail_present,
      grad_head, grad_relation, grad_tail, partial);
}
#endif
}  // namespace

#ifndef DHNS_KERNEL_ONLY
STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CUDA, m) {
  m.impl("hal_embeddings", TORCH_BOX(&hal_embeddings));
  m.impl("hal_scores", TORCH_BOX(&hal_scores));
  m.impl("self_adversarial", TORCH_BOX(&self_adversarial));
}
#endif
