// The operators of masked attention: padded, packed as (query, key, value) and of packed sequences. They differ only in
// where the rows of a sequence lie, and share one forward and one backward.

#include <numeric>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/buffer.h"
#include "cpu/masked_attention.h"

#define MPMA_ISA_BODY "cpu/masked_attention_core.h"
#include "cpu/foreach_isa.h"

namespace mpma {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kHalf;
    default: STD_TORCH_CHECK(false, "masked attention: expected float32, bfloat16, float16 or float64");
  }
}

// The kernels need the elements of a row side by side.
Tensor readable(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) < 2 ? tensor : torch::stable::contiguous(tensor);
}

Shape shape_of(const Tensor& tensor) { return Shape(tensor.sizes().begin(), tensor.sizes().end()); }

Tensor new_output(const Tensor& query, const Shape& shape) { return torch::stable::new_empty(query, shape); }

Tensor new_statistics(const Tensor& query, const Shape& shape) {
  const bool wide = query.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(query, shape, wide ? ScalarType::Double : ScalarType::Float);
}

Tensor new_gradient(const Tensor& like, bool needed) {
  return torch::stable::new_empty(like, needed ? shape_of(like) : Shape{0});
}

// Python has checked the arguments and named what is wrong with them; this guards the memory.
void check(const Tensor& tensor, const Shape& shape, const Tensor& like, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(
      same && tensor.scalar_type() == like.scalar_type() && tensor.is_cpu(), name,
      ": shape, dtype or device does not fit the query");
}

void check_statistics(const Tensor& logsumexp, const Shape& shape) {
  STD_TORCH_CHECK(shape_of(logsumexp) == shape && logsumexp.is_cpu(), "logsumexp: its shape does not fit the query");
}

Dropout make_dropout(double p, const std::optional<Tensor>& seed) {
  if (p == 0) return Dropout(0, 0);
  STD_TORCH_CHECK(
      p > 0 && p < 1 && seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
      "dropout_p: expected 0 <= p < 1 and, above 0, a dropout_seed of one int64");
  return Dropout(p, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()));
}

// Data and strides in bytes. C is const char for what is read, char for what is written; empty tensors give no data.
template <typename C>
Operand<C> rows(const Tensor& t, int64_t batch, int64_t row, int64_t head) {
  if (t.numel() == 0) return {};
  const auto size = static_cast<int64_t>(t.element_size());
  C* data;
  if constexpr (std::is_const_v<C>) {
    data = static_cast<C*>(t.const_data_ptr());
  } else {
    data = static_cast<C*>(t.mutable_data_ptr());
  }
  return {data, batch * size, row * size, head * size};
}

template <typename C>
Operand<C> padded_rows(const Tensor& t) {  // (B, S, H, D)
  return t.numel() == 0 ? Operand<C>{} : rows<C>(t, t.stride(0), t.stride(1), t.stride(2));
}

template <typename C>
Operand<C> qkv_rows(const Tensor& t, int64_t which) {  // (B, S, 3, H, D)
  Operand<C> found = rows<C>(t, t.stride(0), t.stride(1), t.stride(3));
  if (found) found.data += which * t.stride(2) * static_cast<int64_t>(t.element_size());
  return found;
}

template <typename C>
Operand<C> packed_rows(const Tensor& t) {  // (N, H, D)
  return t.numel() == 0 ? Operand<C>{} : rows<C>(t, 0, t.stride(0), t.stride(1));
}

Operand<const bool> mask_rows(const std::optional<Tensor>& mask, int64_t batch, int64_t keys) {
  if (!mask) return {};
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == keys,
      "key_padding_mask: expected a bool tensor (batch, keys)");
  if (mask->numel() == 0) return {};
  return {mask->const_data_ptr<bool>(), mask->stride(0), mask->stride(1), 0};
}

std::vector<Span> whole(int64_t batch, int64_t rows) {
  return std::vector<Span>(batch, Span{0, rows});
}

// Sequence b has rows [offsets[b], offsets[b + 1]). Offsets are not validated: whatever they are, the spans lie within
// the rows and do not overlap.
std::vector<Span> spans(const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) > 0 && offsets.is_cpu(),
      "cu_seqlens: expected an int32 tensor (sequences + 1,)");
  const int32_t* data = offsets.const_data_ptr<int32_t>();
  const int64_t stride = offsets.stride(0);
  std::vector<Span> result;
  int64_t start = std::clamp<int64_t>(data[0], 0, rows);
  for (int64_t b = 1; b < offsets.size(0); ++b) {
    const int64_t end = std::clamp<int64_t>(data[b * stride], start, rows);
    result.push_back({start, end - start});
    start = end;
  }
  return result;
}

// Rows of no sequence: `bytes` bytes of zero in each head.
void clear_outside(const std::vector<Span>& sequences, int64_t rows, int64_t heads, int64_t bytes, const Output& to) {
  if (!to) return;
  const int64_t begin = sequences.empty() ? rows : sequences.front().start;
  const int64_t end = sequences.empty() ? rows : sequences.back().start + sequences.back().length;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t h = 0; h < heads && (i < begin || i >= end); ++h) std::memset(to.at(0, i, h), 0, bytes);
}

// (B, H, S), or (H, N) of packed sequences; A is const for what is read.
template <typename A>
Operand<A> statistics(const Tensor& t) {
  if (t.numel() == 0) return {};
  A* data;
  if constexpr (std::is_const_v<A>) {
    data = t.const_data_ptr<std::remove_const_t<A>>();
  } else {
    data = t.mutable_data_ptr<A>();
  }
  const int64_t last = t.dim() - 1;
  return {data, last == 2 ? t.stride(0) : 0, t.stride(last), t.stride(last - 1)};
}

// float64 is there for gradient checks: the portable version serves it.
void run_forward(const AttentionBatch& batch, const Output& output, const Tensor& logsumexp) {
  if (batch.element == Element::kDouble) {
    return portable::attention_forward(batch, output, statistics<double>(logsumexp));
  }
  MPMA_FASTEST(attention_forward<float>, batch.element == Element::kBFloat16)(
      batch, output, statistics<float>(logsumexp));
}

void run_backward(
    const AttentionBatch& batch, const Input& grad_output, const Input& output, const Tensor& logsumexp,
    const Output& query, const Output& key, const Output& value) {
  if (batch.element == Element::kDouble) {
    const AttentionGradients<double> all{grad_output, output, statistics<const double>(logsumexp), query, key, value};
    return portable::attention_backward(batch, all);
  }
  const AttentionGradients<float> all{grad_output, output, statistics<const float>(logsumexp), query, key, value};
  MPMA_FASTEST(attention_backward<float>, batch.element == Element::kBFloat16)(batch, all);
}

// ---- padded -------------------------------------------------------------------------------------------------------

AttentionBatch padded_batch(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double scale,
    const Dropout& dropout) {
  const int64_t batch = query.size(0), keys = key.size(1);
  return {
      padded_rows<const char>(query), padded_rows<const char>(key), padded_rows<const char>(value),
      whole(batch, query.size(1)), whole(batch, keys), mask_rows(mask, batch, keys),
      query.size(2), query.size(3), element_of(query), scale, dropout};
}

void check_padded(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "masked_attention: expected query and key (B, S, H, D)");
  const Shape shape{query.size(0), key.size(1), query.size(2), query.size(3)};
  check(key, shape, query, "key");
  check(value, shape, query, "value");
}

std::tuple<Tensor, Tensor> masked_attention(
    const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const std::optional<Tensor>& mask,
    double scale, double dropout_p, const std::optional<Tensor>& seed) {
  check_padded(query_in, key_in, value_in);
  const Tensor query = readable(query_in), key = readable(key_in), value = readable(value_in);
  Tensor output = new_output(query, shape_of(query));
  Tensor logsumexp = new_statistics(query, {query.size(0), query.size(2), query.size(1)});
  const auto batch = padded_batch(query, key, value, mask, scale, make_dropout(dropout_p, seed));
  run_forward(batch, padded_rows<char>(output), logsumexp);
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(
    const Tensor& grad_in, const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
    const Tensor& output_in, const Tensor& logsumexp, const std::optional<Tensor>& mask, double scale,
    double dropout_p, const std::optional<Tensor>& seed, bool need_query, bool need_key, bool need_value) {
  check_padded(query_in, key_in, value_in);
  check(grad_in, shape_of(query_in), query_in, "grad_output");
  check(output_in, shape_of(query_in), query_in, "output");
  check_statistics(logsumexp, {query_in.size(0), query_in.size(2), query_in.size(1)});
  const Tensor query = readable(query_in), key = readable(key_in), value = readable(value_in);
  const Tensor grad_output = readable(grad_in), output = readable(output_in);
  Tensor grad_query = new_gradient(query, need_query), grad_key = new_gradient(key, need_key);
  Tensor grad_value = new_gradient(value, need_value);
  run_backward(
      padded_batch(query, key, value, mask, scale, make_dropout(dropout_p, seed)),
      padded_rows<const char>(grad_output), padded_rows<const char>(output), logsumexp,
      padded_rows<char>(grad_query), padded_rows<char>(grad_key), padded_rows<char>(grad_value));
  return {grad_query, grad_key, grad_value};
}

// ---- packed as (query, key, value) ----------------------------------------------------------------------------------

AttentionBatch qkv_batch(
    const Tensor& qkv, const std::optional<Tensor>& mask, double scale, const Dropout& dropout) {
  const int64_t batch = qkv.size(0), rows = qkv.size(1);
  return {
      qkv_rows<const char>(qkv, 0), qkv_rows<const char>(qkv, 1), qkv_rows<const char>(qkv, 2), whole(batch, rows),
      whole(batch, rows), mask_rows(mask, batch, rows), qkv.size(3), qkv.size(4), element_of(qkv), scale, dropout};
}

std::tuple<Tensor, Tensor> masked_attention_qkvpacked(
    const Tensor& qkv_in, const std::optional<Tensor>& mask, double scale, double dropout_p,
    const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(qkv_in.dim() == 5 && qkv_in.size(2) == 3, "qkv: expected (B, S, 3, H, D)");
  const Tensor qkv = readable(qkv_in);
  Tensor output = new_output(qkv, {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)});
  Tensor logsumexp = new_statistics(qkv, {qkv.size(0), qkv.size(3), qkv.size(1)});
  run_forward(qkv_batch(qkv, mask, scale, make_dropout(dropout_p, seed)), padded_rows<char>(output), logsumexp);
  return {output, logsumexp};
}

Tensor masked_attention_qkvpacked_backward(
    const Tensor& grad_in, const Tensor& qkv_in, const Tensor& output_in, const Tensor& logsumexp,
    const std::optional<Tensor>& mask, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(qkv_in.dim() == 5 && qkv_in.size(2) == 3, "qkv: expected (B, S, 3, H, D)");
  const Shape shape{qkv_in.size(0), qkv_in.size(1), qkv_in.size(3), qkv_in.size(4)};
  check(grad_in, shape, qkv_in, "grad_output");
  check(output_in, shape, qkv_in, "output");
  check_statistics(logsumexp, {shape[0], shape[2], shape[1]});
  const Tensor qkv = readable(qkv_in), grad_output = readable(grad_in), output = readable(output_in);
  Tensor gradient = new_gradient(qkv, true);
  run_backward(
      qkv_batch(qkv, mask, scale, make_dropout(dropout_p, seed)), padded_rows<const char>(grad_output),
      padded_rows<const char>(output), logsumexp, qkv_rows<char>(gradient, 0), qkv_rows<char>(gradient, 1),
      qkv_rows<char>(gradient, 2));
  return gradient;
}

// ---- packed sequences -------------------------------------------------------------------------------------------

AttentionBatch packed_batch(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets_q, const Tensor& offsets_k,
    double scale, const Dropout& dropout) {
  return {
      packed_rows<const char>(query), packed_rows<const char>(key), packed_rows<const char>(value),
      spans(offsets_q, query.size(0)), spans(offsets_k, key.size(0)), {},
      query.size(1), query.size(2), element_of(query), scale, dropout};
}

void check_packed(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets_q, const Tensor& offsets_k) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "masked_attention_varlen: expected query and key (N, H, D)");
  const Shape shape{key.size(0), query.size(1), query.size(2)};
  check(key, shape, query, "key");
  check(value, shape, query, "value");
  STD_TORCH_CHECK(
      offsets_q.numel() == offsets_k.numel(), "cu_seqlens_k: expected as many sequences as cu_seqlens_q has");
}

std::tuple<Tensor, Tensor> masked_attention_varlen(
    const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& offsets_q,
    const Tensor& offsets_k, int64_t, int64_t, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  check_packed(query_in, key_in, value_in, offsets_q, offsets_k);
  const Tensor query = readable(query_in), key = readable(key_in), value = readable(value_in);
  const int64_t rows = query.size(0), heads = query.size(1), width = query.size(2);
  Tensor output = new_output(query, {rows, heads, width});
  // No row of it is read outside the sequences, where it says that there is nothing to attend to.
  Tensor logsumexp = new_statistics(query, {heads, rows});
  torch::stable::fill_(logsumexp, std::numeric_limits<double>::infinity());
  const auto batch = packed_batch(query, key, value, offsets_q, offsets_k, scale, make_dropout(dropout_p, seed));
  const auto bytes = width * static_cast<int64_t>(query.element_size());
  clear_outside(batch.queries, rows, heads, bytes, packed_rows<char>(output));
  run_forward(batch, packed_rows<char>(output), logsumexp);
  return {output, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_varlen_backward(
    const Tensor& grad_in, const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
    const Tensor& output_in, const Tensor& logsumexp, const Tensor& offsets_q, const Tensor& offsets_k, int64_t,
    int64_t, double scale, double dropout_p, const std::optional<Tensor>& seed, bool need_query, bool need_key,
    bool need_value) {
  check_packed(query_in, key_in, value_in, offsets_q, offsets_k);
  check(grad_in, shape_of(query_in), query_in, "grad_output");
  check(output_in, shape_of(query_in), query_in, "output");
  check_statistics(logsumexp, {query_in.size(1), query_in.size(0)});
  const Tensor query = readable(query_in), key = readable(key_in), value = readable(value_in);
  const Tensor grad_output = readable(grad_in), output = readable(output_in);
  Tensor grad_query = new_gradient(query, need_query), grad_key = new_gradient(key, need_key);
  Tensor grad_value = new_gradient(value, need_value);
  const auto batch = packed_batch(query, key, value, offsets_q, offsets_k, scale, make_dropout(dropout_p, seed));
  const auto bytes = batch.width * static_cast<int64_t>(query.element_size());
  clear_outside(batch.queries, query.size(0), batch.heads, bytes, packed_rows<char>(grad_query));
  clear_outside(batch.keys, key.size(0), batch.heads, bytes, packed_rows<char>(grad_key));
  clear_outside(batch.keys, key.size(0), batch.heads, bytes, packed_rows<char>(grad_value));
  run_backward(
      batch, packed_rows<const char>(grad_output), packed_rows<const char>(output), logsumexp,
      packed_rows<char>(grad_query), packed_rows<char>(grad_key), packed_rows<char>(grad_value));
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace mpma

STABLE_TORCH_LIBRARY_IMPL(mpma, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&mpma::masked_attention));
  m.impl("masked_attention_backward", TORCH_BOX(&mpma::masked_attention_backward));
  m.impl("masked_attention_qkvpacked", TORCH_BOX(&mpma::masked_attention_qkvpacked));
  m.impl("masked_attention_qkvpacked_backward", TORCH_BOX(&mpma::masked_attention_qkvpacked_backward));
  m.impl("masked_attention_varlen", TORCH_BOX(&mpma::masked_attention_varlen));
  m.impl("masked_attention_varlen_backward", TORCH_BOX(&mpma::masked_attention_varlen_backward));
}
