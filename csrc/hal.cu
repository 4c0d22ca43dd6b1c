// The losses for CUDA: launch and registration; the computation is in hal_kernel.cuh.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "hal_arguments.h"

// torch 2.13 has a name of its own for the check inside stable headers.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

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
using dhns::Tensor;

// 256 threads: four elements each at D = 1024, and three blocks of 45 kB of shared memory a multiprocessor.
constexpr int kThreads = 256;

// Two blocks a multiprocessor leave 128 registers, of which RotatE in float64 spills some.
template <class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 1 : 2;

template <class I, class S, class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) hal_embeddings_kernel(dhns::HalEmbeddings<S, T> a) {
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
void launch(const dhns::HalEmbeddings<S, T>& a, cudaStream_t stream) {
  const auto kernel = hal_embeddings_kernel<I, S, T>;
  const int64_t bytes = dhns::cuda::hal_shared_bytes<T>(a.dim, a.modalities, kThreads / 32);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<static_cast<unsigned>(a.blocks), kThreads, bytes, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct OnCuda {
  using Narrow = __nv_bfloat16;

  template <class S, class T>
  static void run(const dhns::HalEmbeddings<S, T>& a, const Tensor& head) {
    const torch::stable::accelerator::DeviceGuard guard(head.get_device_index());
    const auto stream = current_stream(head);
    dhns::cuda::with_interaction(a.interaction, [&](auto one) { launch<typename decltype(one)::type>(a, stream); });
  }
  template <class T>
  static void run(const dhns::HalScores<T>& a, int64_t blocks, const Tensor& positive) {
    const torch::stable::accelerator::DeviceGuard guard(positive.get_device_index());
    hal_scores_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(positive)>>>(a, (a.batch + blocks - 1) / blocks);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  template <class T>
  static void run(const dhns::SelfAdversarial<T>& a, const Tensor& positive) {
    const torch::stable::accelerator::DeviceGuard guard(positive.get_device_index());
    const int64_t blocks = (a.batch + kThreads / 32 - 1) / (kThreads / 32);
    self_adversarial_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(positive)>>>(a);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};
#endif
}  // namespace

#ifndef DHNS_KERNEL_ONLY
STABLE_TORCH_LIBRARY_IMPL(dhns_fast_native, CUDA, m) {
  m.impl("hal_embeddings", TORCH_BOX(&dhns::hal_embeddings<OnCuda>));
  m.impl("hal_scores", TORCH_BOX(&dhns::hal_scores<OnCuda>));
  m.impl("self_adversarial", TORCH_BOX(&dhns::self_adversarial<OnCuda>));
}
#endif
