// Memory attention on the CPU: arguments from PyTorch, results back. The arithmetic stands in memory_topk.h and
// memory_dense.h; bfloat16 and float16 are computed in float32, float64 in itself.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/buffer.h"
#include "cpu/memory_attention.h"

#define MPMA_ISA_BODY "cpu/memory_attention_core.h"
#include "cpu/foreach_isa.h"

namespace mpma::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor as the kernels read it: in the compute type and with a contiguous last dimension, copied if need be.
Tensor readable(const Tensor& t, ScalarType type) {
  const Tensor typed = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return typed.stride(2) == 1 || typed.size(2) == 1 ? typed : torch::stable::contiguous(typed);
}

template <class T>
MemoryView<T> view(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

Tensor in_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

void check_shape(const Tensor& t, const char* name, int64_t rows, int64_t heads, int64_t width) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == rows && t.size(1) == heads && t.size(2) == width, "memory_attention: ", name,
      " must have shape (", rows, ", ", heads, ", ", width, ")");
}

// The operands, kept alive in the form in which the kernels read them.
struct Operands {
  ScalarType type;
  Tensor query, key, value;
  int64_t rows, heads, width, slots;

  Operands(const Tensor& q, const Tensor& k, const Tensor& v)
      : type(compute_type(q)), query(readable(q, type)), key(readable(k, type)), value(readable(v, type)),
        rows(q.size(0)), heads(q.size(1)), width(q.size(2)), slots(k.size(0)) {
    STD_TORCH_CHECK(slots >= 1, "memory_attention: memory_key must hold at least one slot");
    STD_TORCH_CHECK(
        slots <= std::numeric_limits<int32_t>::max() && rows <= std::numeric_limits<int32_t>::max(),
        "memory_attention: rows and slots are numbered in 32 bits");
    check_shape(key, "memory_key", slots, heads, width);
    check_shape(value, "memory_value", slots, heads, width);
  }

  template <class T>
  MemoryProblem<T> problem(double scale, double dropout_p, const std::optional<Tensor>& seed) const {
    STD_TORCH_CHECK(dropout_p == 0 || seed, "memory_attention: dropout_seed must be given where dropout_p > 0");
    const uint64_t number = dropout_p > 0 ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0;
    return {view<T>(query), view<T>(key), view<T>(value), rows, heads, slots, width,
            static_cast<T>(scale), Dropout(dropout_p, number)};
  }
};

// The kernel for the type T of a generic lambda. float64 serves checks of gradients: one build of it is enough.
#define MPMA_MEMORY_KERNEL(function, bfloat16)                                      \
  [](bool rounded) {                                                                \
    if constexpr (std::is_same_v<T, double>) return &portable::memory::function<T>; \
    else return MPMA_FASTEST(memory::function<T>, rounded);                         \
  }(bfloat16)

// body(T{}) for the compute type.
template <class Body>
void dispatch(ScalarType type, const Body& body) {
  if (type == ScalarType::Double)
    body(double{});
  else
    body(float{});
}

std::tuple<Tensor, Tensor, Tensor> memory_attention(
    const Tensor& query, const Tensor& memory_key, const Tensor& memory_value, int64_t topk, double scale,
    double dropout_p, const std::optional<Tensor>& dropout_seed) {
  STD_TORCH_CHECK(query.dim() == 3, "memory_attention: query must have shape (R, H, D)");
  const Operands in(query, memory_key, memory_value);
  STD_TORCH_CHECK(topk >= 0 && topk < in.slots, "memory_attention: topk must be 0 (dense) or below the slots");
  const Tensor output = torch::stable::new_empty(query, {in.rows, in.heads, in.width}, in.type);
  const Tensor logsumexp = torch::stable::new_empty(query, {in.rows, in.heads}, in.type);
  const Tensor indices = torch::stable::new_empty(query, {in.rows, in.heads, topk}, ScalarType::Int);
  const bool bfloat16 = query.scalar_type() == ScalarType::BFloat16;
  dispatch(in.type, [&](auto number) {
    using T = decltype(number);
    const auto m = in.problem<T>(scale, dropout_p, dropout_seed);
    T *out = output.mutable_data_ptr<T>(), *lse = logsumexp.mutable_data_ptr<T>();
    if (topk > 0)
      MPMA_MEMORY_KERNEL(topk_forward, bfloat16)(m, topk, out, lse, indices.mutable_data_ptr<int32_t>());
    else
      MPMA_MEMORY_KERNEL(dense_forward, bfloat16)(m, out, lse);
  });
  return {in_type(output, query.scalar_type()), logsumexp, indices};
}

std::tuple<Tensor, Tensor, Tensor> memory_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& memory_key, const Tensor& memory_value,
    const Tensor& output, const Tensor& logsumexp, const Tensor& indices, double scale, double dropout_p,
    const std::optional<Tensor>& dropout_seed, bool need_query, bool need_memory_key, bool need_memory_value) {
  STD_TORCH_CHECK(query.dim() == 3, "memory_attention: query must have shape (R, H, D)");
  const Operands in(query, memory_key, memory_value);
  check_shape(grad_output, "grad_output", in.rows, in.heads, in.width);
  check_shape(output, "output", in.rows, in.heads, in.width);
  check_shape(indices, "indices", in.rows, in.heads, indices.size(-1));
  STD_TORCH_CHECK(
      logsumexp.dim() == 2 && logsumexp.size(0) == in.rows && logsumexp.size(1) == in.heads,
      "memory_attention: logsumexp must have shape (", in.rows, ", ", in.heads, ")");
  const int64_t topk = indices.size(2);
  const Tensor grad = readable(grad_output, in.type), out = readable(output, in.type);
  const Tensor lse = torch::stable::contiguous(logsumexp), slots = torch::stable::contiguous(indices);
  const int32_t* numbers = slots.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(
      std::all_of(numbers, numbers + slots.numel(), [&](int32_t i) { return i >= 0 && i < in.slots; }),
      "memory_attention: indices must lie in [0, ", in.slots, ")");

  const auto gradient = [&](const Tensor& of, bool needed) {
    return needed ? torch::stable::new_empty(of, of.sizes(), in.type)
                  : torch::stable::new_empty(of, {0}, of.scalar_type());
  };
  const Tensor grad_query = gradient(query, need_query), grad_key = gradient(memory_key, need_memory_key),
               grad_value = gradient(memory_value, need_memory_value);
  const bool bfloat16 = query.scalar_type() == ScalarType::BFloat16;
  dispatch(in.type, [&](auto number) {
    using T = decltype(number);
    const auto data = [](const Tensor& t, bool needed) { return needed ? t.mutable_data_ptr<T>() : nullptr; };
    const auto m = in.problem<T>(scale, dropout_p, dropout_seed);
    const MemoryGradients<T> g{
        view<T>(grad), view<T>(out), lse.const_data_ptr<T>(), data(grad_query, need_query),
        data(grad_key, need_memory_key), data(grad_value, need_memory_value)};
    if (topk > 0)
      MPMA_MEMORY_KERNEL(topk_backward, bfloat16)(m, topk, g, numbers);
    else
      MPMA_MEMORY_KERNEL(dense_backward, bfloat16)(m, g);
  });
  const ScalarType type = query.scalar_type();
  return {in_type(grad_query, type), in_type(grad_key, type), in_type(grad_value, type)};
}

}  // namespace
}  // namespace mpma::cpu

STABLE_TORCH_LIBRARY_IMPL(mpma, CPU, m) {
  m.impl("memory_attention", TORCH_BOX(&mpma::cpu::memory_attention));
  m.impl("memory_attention_backward", TORCH_BOX(&mpma::cpu::memory_attention_backward));
}
