// Memory attention on CUDA: arguments from PyTorch, results back.

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/memory_attention_launch.h"
#include "cuda/tensors.h"

namespace mpma::cuda {

MPMA_MEMORY_LAUNCHERS(extern, Bfloat16)
MPMA_MEMORY_LAUNCHERS(extern, Half)
MPMA_MEMORY_LAUNCHERS(extern, float)

namespace {

using Optional = std::optional<Tensor>;

// ---- checks: Python has named what is wrong with the arguments; these guard the memory ------------------------------

void check(
    const Tensor& tensor, const char* name, const std::vector<int64_t>& shape, ScalarType type, const Tensor& query) {
  STD_TORCH_CHECK(
      std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()) == shape, "memory_attention: ", name,
      ": its shape does not fit the other operands'");
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.is_cuda() && tensor.get_device_index() == query.get_device_index(),
      "memory_attention: ", name, ": its dtype or device does not fit the query's");
}

// The stride of a dimension of which there is one element is never used, and may be any.
int64_t step(const Tensor& tensor, int dimension) {
  return tensor.size(dimension) < 2 ? 0 : tensor.stride(dimension);
}

template <class T>
MemoryRows<T> rows_of(const Tensor& tensor) {
  return memory_rows(
      static_cast<const T*>(tensor.const_data_ptr()), step(tensor, 0), step(tensor, 1), tensor.size(2));
}

// The operands, kept alive in the form in which the kernels read them.
struct Operands {
  Tensor query, key, value;
  int64_t rows, heads, width, slots;
  Dropout dropout;
  Optional seed;
  float scale;

  Operands(
      const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p, const Optional& dropout_seed)
      : query(readable(q)), key(readable(k)), value(readable(v)), rows(q.size(0)), heads(q.size(1)), width(q.size(2)),
        slots(k.size(0)), dropout(dropout_p, 0), seed(dropout_seed), scale(static_cast<float>(scale)) {
    if (!dropout.active()) return;
    STD_TORCH_CHECK(seed, "memory_attention: dropout_seed must be given where dropout_p > 0");
    STD_TORCH_CHECK(seed->numel() == 1, "memory_attention: dropout_seed must have one element");
    check(*seed, "dropout_seed", {seed->sizes().begin(), seed->sizes().end()}, ScalarType::Long, query);
  }

  template <class T>
  MemoryProblem<T> problem() const {
    return {
        rows_of<T>(query), rows_of<T>(key), rows_of<T>(value), rows, static_cast<int>(heads), static_cast<int>(slots),
        static_cast<int>(width), scale, dropout,
        dropout.active() ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr};
  }
};

void check_operands(const Tensor& query, const Tensor& key, const Tensor& value, int64_t topk) {
  STD_TORCH_CHECK(query.is_cuda() && query.dim() == 3, "memory_attention: query must have shape (R, H, D)");
  STD_TORCH_CHECK(key.dim() == 3, "memory_attention: memory_key must have shape (N, H, D)");
  const int64_t rows = query.size(0), heads = query.size(1), width = query.size(2), slots = key.size(0);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(key, "memory_key", {slots, heads, width}, query.scalar_type(), query);
  check(value, "memory_value", {slots, heads, width}, query.scalar_type(), query);
  STD_TORCH_CHECK(slots >= 1, "memory_attention: memory_key must hold at least one slot");
  STD_TORCH_CHECK(
      width <= kWidestHead, "memory_attention: the CUDA kernels serve head widths up to ", kWidestHead, ", this is ",
      width);
  STD_TORCH_CHECK(topk >= 0 && topk < slots, "memory_attention: topk must be 0 (dense) or below the slots");
  STD_TORCH_CHECK(
      topk <= kMostKept, "memory_attention: the CUDA kernels keep up to ", kMostKept, " slots, topk is ", topk);
  // Blocks and a head's entries are numbered in 32 bits, and loops step a little beyond the last.
  STD_TORCH_CHECK(
      slots <= kMost - 1024 && rows <= (kMost - 1024) / (topk > 0 ? topk : 1) && (rows + 31) / 32 * heads <= kMost &&
          slots * heads <= kMost,
      "memory_attention: the CUDA kernels do not serve ", rows, " rows of ", heads, " heads on ", slots, " slots");
}

template <class T>
T* data(const Tensor& tensor, bool needed = true) {
  return needed ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// ---- the operators --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> memory_attention(
    const Tensor& query, const Tensor& memory_key, const Tensor& memory_value, int64_t topk, double scale,
    double dropout_p, const Optional& dropout_seed) {
  check_operands(query, memory_key, memory_value, topk);
  const DeviceGuard guard(query.get_device_index());
  const Operands in(query, memory_key, memory_value, scale, dropout_p, dropout_seed);
  const Tensor output = torch::stable::new_empty(query, {in.rows, in.heads, in.width}, query.scalar_type());
  const Tensor logsumexp = torch::stable::new_empty(query, {in.rows, in.heads}, ScalarType::Float);
  const Tensor indices = torch::stable::new_empty(query, {in.rows, in.heads, topk}, ScalarType::Int);
  if (in.rows * in.heads == 0) return {output, logsumexp, indices};
  by_type(query, [&](auto element) {
    using T = decltype(element);
    const auto m = in.problem<T>();
    T* out = data<T>(output);
    float* statistic = data<float>(logsumexp);
    void* stream = current_stream(query);
    if (topk > 0)
      launch_memory_topk<T>(m, static_cast<int>(topk), out, statistic, data<int32_t>(indices), stream);
    else
      launch_memory_dense<T>(m, out, statistic, stream);
  });
  return {output, logsumexp, indices};
}

// A workspace goes back to the allocator when it leaves its scope, which keeps it for later launches on the same stream.
template <class T>
void topk_backward(
    const Operands& in, const MemoryGradients<T>& g, const Tensor& indices, const Tensor& like) {
  const auto m = in.problem<T>();
  const int64_t topk = indices.size(2);
  const bool bank = g.key != nullptr || g.value != nullptr;
  BySlot order{static_cast<const int32_t*>(indices.const_data_ptr()), in.rows, m.heads, m.slots,
               static_cast<int>(topk), slot_segment(m.slots, static_cast<int>(topk)), nullptr, nullptr, nullptr};
  const auto workspace = [&](int64_t count) { return torch::stable::new_empty(like, {bank ? count : 0}, ScalarType::Int); };
  const Tensor counts = workspace(in.heads * order.segments() * in.slots), starts = workspace(in.heads * (in.slots + 1)),
               places = workspace(in.rows * in.heads * topk), entries = workspace(4 * in.rows * in.heads * topk);
  order.counts = data<int32_t>(counts, bank);
  order.starts = data<int32_t>(starts, bank);
  order.places = data<int32_t>(places, bank);
  launch_memory_topk_backward<T>(m, g, order, data<Bytes16>(entries, bank), current_stream(like));
}

template <class T>
void dense_backward(
    const Operands& in, const MemoryGradients<T>& g, const Tensor& output, const Tensor& logsumexp, const Tensor& like) {
  const auto m = in.problem<T>();
  const bool scored = g.query != nullptr || g.key != nullptr;
  const int splits = dense_splits(in.rows, m.heads, m.slots, current_device().multiprocessors);
  const auto workspace = [&](int64_t count, bool needed) {
    return torch::stable::new_empty(like, {needed ? count : 0}, ScalarType::Float);
  };
  const bool key_parts = splits > 1 && g.key != nullptr, value_parts = splits > 1 && g.value != nullptr;
  const int64_t part = splits * in.slots * in.heads * in.width;
  const Tensor delta = workspace(in.rows * in.heads, scored), of_key = workspace(part, key_parts),
               of_value = workspace(part, value_parts);
  const DenseGradients<T> dense{
      g,      rows_of<T>(output), static_cast<const float*>(logsumexp.const_data_ptr()), data<float>(delta, scored),
      splits, data<float>(of_key, key_parts), data<float>(of_value, value_parts)};
  launch_memory_dense_backward<T>(m, dense, current_stream(like));
}

std::tuple<Tensor, Tensor, Tensor> memory_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& memory_key, const Tensor& memory_value,
    const Tensor& output, const Tensor& logsumexp, const Tensor& indices, double scale, double dropout_p,
    const Optional& dropout_seed, bool need_query, bool need_memory_key, bool need_memory_value) {
  STD_TORCH_CHECK(indices.dim() == 3, "memory_attention: indices must have shape (R, H, K)");
  const int64_t topk = indices.size(2);
  check_operands(query, memory_key, memory_value, topk);
  const int64_t rows = query.size(0), heads = query.size(1), width = query.size(2);
  check(grad_output, "grad_output", {rows, heads, width}, query.scalar_type(), query);
  check(output, "output", {rows, heads, width}, query.scalar_type(), query);
  check(logsumexp, "logsumexp", {rows, heads}, ScalarType::Float, query);
  check(indices, "indices", {rows, heads, topk}, ScalarType::Int, query);
  const DeviceGuard guard(query.get_device_index());
  const auto gradient = [&](const Tensor& of, bool needed) {
    std::vector<int64_t> shape = {0};
    if (needed) shape.assign(of.sizes().begin(), of.sizes().end());
    return torch::stable::new_empty(of, shape, of.scalar_type());
  };
  const Tensor grad_query = gradient(query, need_query), grad_key = gradient(memory_key, need_memory_key),
               grad_value = gradient(memory_value, need_memory_value);
  if (heads * width == 0 || !(need_query || need_memory_key || need_memory_value))
    return {grad_query, grad_key, grad_value};
  const Operands in(query, memory_key, memory_value, scale, dropout_p, dropout_seed);
  const Tensor grad = readable(grad_output), out = readable(output);
  const Tensor statistic = torch::stable::contiguous(logsumexp), slots = torch::stable::contiguous(indices);
  by_type(query, [&](auto element) {
    using T = decltype(element);
    const MemoryGradients<T> g{
        rows_of<T>(grad), data<T>(grad_query, need_query), data<T>(grad_key, need_memory_key),
        data<T>(grad_value, need_memory_value)};
    if (topk > 0)
      topk_backward<T>(in, g, slots, query);
    else
      dense_backward<T>(in, g, out, statistic, query);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace mpma::cuda

STABLE_TORCH_LIBRARY_IMPL(mpma, CUDA, m) {
  m.impl("memory_attention", TORCH_BOX(&mpma::cuda::memory_attention));
  m.impl("memory_attention_backward", TORCH_BOX(&mpma::cuda::memory_attention_backward));
}
