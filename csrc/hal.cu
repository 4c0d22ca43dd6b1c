// The losses for CUDA: launch and registration; the computation is in hal_kernel.cuh.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "hal_arguments.h"

// torch 2.13 has a name of its own for the check inside stable headers.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace dhns::kernels {
// A block as hal_kernel.cuh sees it.
struct Threads {
  __device__ int rank() const { return threadIdx.x; }
  __device__ int count() const { return blockDim.x; }
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int warps() const { return blockDim.x / 32; }
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ static constexpr int lanes() { return 32; }
  // A row that fits a warp needs no more than its warp.
  __device__ void barrier() const {
    if (blockDim.x == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  __device__ void warp_barrier() const { __syncwarp(); }
  template <class T>
  __device__ T exchange(T x, int step) const { return __shfl_xor_sync(0xffffffffu, x, step); }
  // Past the registers; both at multiples of kBytes.
  template <int kBytes>
  __device__ void copy(void* to, const void* from) const {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes) : "memory");
  }
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  __device__ void wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
};
}  // namespace dhns::kernels

#include "hal_kernel.cuh"

namespace {
using dhns::Tensor;

constexpr int kThreads = 256;  // of the losses of scores
// At most, of hal_embeddings: rows of 2048 float32 numbers or 1024 float64 ones. Complex ones, of which a thread has twice as many, have twice the
// registers: at D = 1024 two blocks a multiprocessor have them all.
template <class I>
constexpr int kRowThreads = 512 / I::kParts;

// For sm_100 nvcc gives complex numbers 128 registers a thread, of which two blocks have room, and spills, and for sm_80 real ones 64; on sm_90 by
// itself what they need.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class I>
constexpr int kBlocksAtLeast = I::kParts == 2 ? 1 : 0;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class I>
constexpr int kBlocksAtLeast = I::kParts == 1 ? 1 : 0;
#else
template <class I>
constexpr int kBlocksAtLeast = 0;
#endif

template <class I, class S, class T, bool kFused>
__global__ void __launch_bounds__(kRowThreads<I>, kBlocksAtLeast<I>) hal_embeddings_kernel(dhns::HalEmbeddings<S, T> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  dhns::kernels::Row<I, S, T, kFused>(a, shared, dhns::kernels::Threads()).block(blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(kThreads) hal_scores_kernel(dhns::HalScores<T> a, int64_t rows) {
  __shared__ double scratch[kThreads / 32];
  dhns::kernels::Scores<T>(a, scratch, dhns::kernels::Threads()).block(blockIdx.x, rows);
}

template <class T>
__global__ void __launch_bounds__(kThreads) self_adversarial_kernel(dhns::SelfAdversarial<T> a) {
  const int64_t b = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (b < a.batch) dhns::kernels::self_adversarial_row(a, b, dhns::kernels::Threads());
}

// A compile check wants a kernel or two and not all of them.
#ifndef DHNS_KERNEL_ONLY
template <class I, bool kFused, class S, class T>
void launch(dhns::HalEmbeddings<S, T> a, cudaStream_t stream) {
  const auto kernel = hal_embeddings_kernel<I, S, T, kFused>;
  const int64_t warps = (dhns::kernels::hal_threads<T>(a.dim, I::kParts) + 31) / 32, threads = 32 * warps;
  // Two blocks a multiprocessor: one computes while the other waits. Each has 1 kB beside its own.
  int device, most, all;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  const int64_t tables = dhns::kernels::HalTables(a.levels, a.modalities, kFused, a.normalize).numbers(warps) * int64_t(sizeof(T));
  const int64_t room = std::min<int64_t>(most, all / 2 - 1024) - tables - 16, slot = I::kParts * dhns::kernels::kUnit<T> * threads * int64_t(sizeof(S));
  a.kept = std::clamp<int64_t>(room / slot, 0, dhns::kernels::hal_vectors(a));
  const int64_t bytes = (tables + 15) / 16 * 16 + a.kept * slot;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<static_cast<unsigned>(a.blocks), static_cast<unsigned>(threads), bytes, stream>>>(a);
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
    dhns::kernels::with_interaction(a.interaction, [&](auto one) {
      using I = typename decltype(one)::type;
      a.attention ? launch<I, true>(a, stream) : launch<I, false>(a, stream);
    });
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
