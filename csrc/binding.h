// What the files that register operators share. Only LibTorch's stable ABI is used: one binary serves torch 2.10 and later.
//
// Compiled operators live in torch.ops.dhns_fast_native. The public ones, torch.ops.dhns_fast, are registered from Python so that they
// exist without a compiler; they validate, allocate and choose a backend. The native ones trust their caller: contiguous tensors of the
// documented shapes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace dhns {
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }
}  // namespace dhns
