// The operators of masked attention on CUDA: padded, packed as (query, key, value) and of packed sequences. They differ
// only in where the rows of a sequence lie, and share one forward and one backward.

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/masked_attention_launch.h"
#include "cuda/masked_attention_offsets.h"
#include "cuda/tensors.h"

namespace mpma::cuda {

MPMA_ATTENTION_LAUNCHERS(extern, Bfloat16)
MPMA_ATTENTION_LAUNCHERS(extern, Half)
MPMA_ATTENTION_LAUNCHERS(extern, float)

namespace {

using Shape = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

Shape shape_of(const Tensor& tensor) { return Shape(tensor.sizes().begin(), tensor.sizes().end()); }

bool beside(const Tensor& tensor, const Tensor& query) {
  return tensor.is_cuda() && tensor.get_device_index() == query.get_device_index();
}

// ---- checks: Python has named what is wrong with the arguments; these guard the memory ------------------------------

void check(const Tensor& tensor, const Shape& shape, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      shape_of(tensor) == shape && tensor.scalar_type() == like.scalar_type() && beside(tensor, like), name,
      ": shape, dtype or device does not fit the query");
}

void check_statistics(const Tensor& logsumexp, const Shape& shape, const Tensor& query) {
  STD_TORCH_CHECK(
      shape_of(logsumexp) == shape && logsumexp.scalar_type() == ScalarType::Float && beside(logsumexp, query),
      "logsumexp: its shape, dtype or device does not fit the query");
}

void check_padded(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "masked_attention: expected query and key (B, S, H, D)");
  const Shape shape{query.size(0), key.size(1), query.size(2), query.size(3)};
  check(key, shape, query, "key");
  check(value, shape, query, "value");
}

void check_packed(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets_q, const Tensor& offsets_k) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "masked_attention_varlen: expected query and key (N, H, D)");
  const Shape shape{key.size(0), query.size(1), query.size(2)};
  check(key, shape, query, "key");
  check(value, shape, query, "value");
  for (const Tensor& offsets : {offsets_q, offsets_k}) {
    STD_TORCH_CHECK(
        offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) > 0 &&
            beside(offsets, query),
        "cu_seqlens: expected an int32 tensor (sequences + 1,) on the query's device");
  }
  STD_TORCH_CHECK(
      offsets_q.size(0) == offsets_k.size(0), "cu_seqlens_k: expected as many sequences as cu_seqlens_q has");
}

void check_qkv(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.is_cuda(), "qkv: expected (B, S, 3, H, D)");
}

// ---- where rows lie -------------------------------------------------------------------------------------------------

// The steps of an item, a row and a head of (items, rows, heads, width), or of packed (rows, heads, width).
template <class T>
Rows<T> rows_of(const Tensor& tensor) {
  Rows<T> rows;
  if (tensor.numel() == 0) return rows;
  if constexpr (std::is_const_v<T>)
    rows.data = static_cast<T*>(tensor.const_data_ptr());
  else
    rows.data = static_cast<T*>(tensor.mutable_data_ptr());
  const int64_t last = tensor.dim() - 1;
  rows.item = last == 3 ? tensor.stride(0) : 0;
  rows.row = tensor.stride(last - 2);
  rows.head = tensor.stride(last - 1);
  return rows;
}

// Of (B, S, 3, H, D): query, key or value.
template <class T>
Rows<T> third_of(const Tensor& tensor, int64_t which) {
  Rows<T> rows;
  if (tensor.numel() == 0) return rows;
  if constexpr (std::is_const_v<T>)
    rows.data = static_cast<T*>(tensor.const_data_ptr());
  else
    rows.data = static_cast<T*>(tensor.mutable_data_ptr());
  rows.data += which * tensor.stride(2);
  rows.item = tensor.stride(0), rows.row = tensor.stride(1), rows.head = tensor.stride(3);
  return rows;
}

// (B, H, S), or (H, N) of packed sequences.
template <class T>
Rows<T> statistics_of(const Tensor& tensor) {
  Rows<T> rows;
  if (tensor.numel() == 0) return rows;
  rows.data = static_cast<T*>(tensor.mutable_data_ptr());
  const int64_t last = tensor.dim() - 1;
  rows.item = last == 2 ? tensor.stride(0) : 0, rows.row = tensor.stride(last), rows.head = tensor.stride(last - 1);
  return rows;
}

// ---- one call -------------------------------------------------------------------------------------------------------

// What a forward and a backward are both given, whatever the element type.
struct Call {
  AttentionSizes sizes;
  Rows<const uint8_t> mask;
  Optional offsets_q, offsets_k;  // clean
  AttentionDropout dropout;
  double scale;
  void* stream;
};

Call make_call(
    const Tensor& query, const Shape& sizes, int64_t query_rows, int64_t key_rows, double scale, double p,
    const Optional& seed) {
  const int64_t items = sizes[0], heads = sizes[1], queries = sizes[2], keys = sizes[3], width = sizes[4];
  STD_TORCH_CHECK(
      width <= kWidestHead, "masked_attention: the CUDA kernels serve head widths up to ", kWidestHead, ", this is ",
      width);
  constexpr int64_t kMost = 1 << 30;  // positions within a sequence are 32-bit numbers
  STD_TORCH_CHECK(
      items < kMost && heads < kMost && queries < kMost && keys < kMost,
      "masked_attention: the CUDA kernels take less than 2^30 sequences, heads and rows of a sequence");
  Call call = {};
  call.sizes = {static_cast<int>(items), static_cast<int>(heads), static_cast<int>(queries), static_cast<int>(keys),
                query_rows, key_rows, static_cast<int>(width)};
  call.scale = scale;
  call.stream = current_stream(query);
  if (p == 0) return call;
  STD_TORCH_CHECK(
      p > 0 && p < 1 && seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && beside(*seed, query),
      "dropout_p: expected 0 <= p < 1 and, above 0, a dropout_seed of one int64 on the query's device");
  call.dropout = {
      static_cast<const int64_t*>(seed->const_data_ptr()), static_cast<uint32_t>(std::floor(std::ldexp(p, 32))),
      static_cast<float>(1 / (1 - p))};
  return call;
}

void set_mask(Call& call, const Optional& mask, const Tensor& query) {
  if (!mask) return;
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool && shape_of(*mask) == Shape({call.sizes.items, call.sizes.keys}) &&
          beside(*mask, query),
      "key_padding_mask: expected a bool tensor (batch, keys) on the query's device");
  if (mask->numel() == 0) return;
  call.mask.data = static_cast<const uint8_t*>(mask->const_data_ptr());
  call.mask.item = mask->stride(0), call.mask.row = mask->stride(1);
}

Call padded_call(
    const Tensor& query, int64_t keys, const Optional& mask, double scale, double p, const Optional& seed) {
  Call call = make_call(
      query, {query.size(0), query.size(2), query.size(1), keys, query.size(3)}, query.size(1), keys, scale, p, seed);
  set_mask(call, mask, query);
  return call;
}

Call qkv_call(const Tensor& qkv, const Optional& mask, double scale, double p, const Optional& seed) {
  const int64_t rows = qkv.size(1);
  Call call = make_call(qkv, {qkv.size(0), qkv.size(3), rows, rows, qkv.size(4)}, rows, rows, scale, p, seed);
  set_mask(call, mask, qkv);
  return call;
}

Call packed_call(
    const Tensor& query, const Tensor& key, const Tensor& offsets_q, const Tensor& offsets_k, int64_t longest_q,
    int64_t longest_k, double scale, double p, const Optional& seed) {
  const int64_t query_rows = query.size(0), key_rows = key.size(0), count = offsets_q.size(0);
  const auto longest = [](int64_t given, int64_t rows) { return std::clamp<int64_t>(given, 0, rows); };
  Call call = make_call(
      query,
      {count - 1, query.size(1), longest(longest_q, query_rows), longest(longest_k, key_rows), query.size(2)},
      query_rows, key_rows, scale, p, seed);
  call.offsets_q = torch::stable::new_empty(offsets_q, {count});
  call.offsets_k = torch::stable::new_empty(offsets_k, {count});
  OffsetsToClean clean;
  int i = 0;
  for (const auto& [from, to, rows] :
       {std::tuple(offsets_q, *call.offsets_q, query_rows), std::tuple(offsets_k, *call.offsets_k, key_rows)}) {
    clean.from[i] = static_cast<const int32_t*>(from.const_data_ptr());
    clean.step[i] = from.stride(0);
    clean.rows[i] = std::min<int64_t>(rows, INT32_MAX);
    clean.to[i++] = static_cast<int32_t*>(to.mutable_data_ptr());
  }
  clean.count = count;
  launch_clean_offsets(clean, call.stream);
  return call;
}

template <class T>
Attention<T> attention_of(
    const Call& call, const Rows<const T>& query, const Rows<const T>& key, const Rows<const T>& value) {
  Attention<T> a = {query, key, value, call.mask, nullptr, nullptr, call.sizes, static_cast<float>(call.scale),
                    call.dropout, false};
  if (call.offsets_q) {
    a.offsets_q = static_cast<const int32_t*>(call.offsets_q->const_data_ptr());
    a.offsets_k = static_cast<const int32_t*>(call.offsets_k->const_data_ptr());
  }
  a.aligned = aligned_rows(query) && aligned_rows(key) && aligned_rows(value) && call.sizes.width % kVector<T> == 0;
  return a;
}

template <class T>
void backward_of(
    const Call& call, const Attention<T>& a, const Tensor& grad_output, const Tensor& output, const Tensor& logsumexp,
    const Rows<T>& query, const Rows<T>& key, const Rows<T>& value) {
  if (query.data == nullptr && key.data == nullptr && value.data == nullptr) return;
  const Tensor grad = readable(grad_output), out = readable(output);
  AttentionGradients<T> g = {
      rows_of<const T>(grad), rows_of<const T>(out), statistics_of<const float>(logsumexp), query, key, value, false};
  g.aligned = aligned_rows(g.grad_output) && aligned_rows(g.output) && call.sizes.width % kVector<T> == 0;
  launch_attention_backward(a, g, current_device(), call.stream);
}

using Outputs = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Outputs new_outputs(const Tensor& query, const Shape& shape, const Shape& statistics) {
  return {torch::stable::new_empty(query, shape), torch::stable::new_empty(query, statistics, ScalarType::Float)};
}

Outputs forward(const Call& call, const Tensor& query_in, const Tensor& key_in, const Tensor& value_in) {
  const Tensor query = readable(query_in), key = readable(key_in), value = readable(value_in);
  const bool packed = query.dim() == 3;
  const Shape statistics = packed ? Shape{query.size(1), query.size(0)}
                                  : Shape{query.size(0), query.size(2), query.size(1)};
  Outputs made = new_outputs(query, shape_of(query), statistics);
  if (query.numel() == 0) return made;
  by_type(query, [&](auto element) {
    using T = decltype(element);
    launch_attention_forward<T>(
        attention_of<T>(call, rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value)),
        {rows_of<T>(std::get<0>(made)), statistics_of<float>(std::get<1>(made))}, call.stream);
  });
  return made;
}

Gradients backward(
    const Call& call, const Tensor& grad_output, const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
    const Tensor& output, const Tensor& logsumexp, bool need_query, bool need_key, bool need_value) {
  const Tensor query = readable(query_in), key = readable(key_in), value = readable(value_in);
  const auto new_gradient = [](const Tensor& like, bool needed) {
    return torch::stable::new_empty(like, needed ? shape_of(like) : Shape{0});
  };
  Gradients made = {new_gradient(query, need_query), new_gradient(key, need_key), new_gradient(value, need_value)};
  const auto& [grad_query, grad_key, grad_value] = made;
  by_type(query, [&, grad_query = grad_query, grad_key = grad_key, grad_value = grad_value](auto element) {
    using T = decltype(element);
    backward_of<T>(
        call, attention_of<T>(call, rows_of<const T>(query), rows_of<const T>(key), rows_of<const T>(value)),
        grad_output, output, logsumexp, rows_of<T>(grad_query), rows_of<T>(grad_key), rows_of<T>(grad_value));
  });
  return made;
}

// ---- the operators --------------------------------------------------------------------------------------------------

Outputs masked_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, double scale, double dropout_p,
    const Optional& seed) {
  check_padded(query, key, value);
  const DeviceGuard guard(query.get_device_index());
  return forward(padded_call(query, key.size(1), mask, scale, dropout_p, seed), query, key, value);
}

Gradients masked_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, const Optional& mask, double scale, double dropout_p, const Optional& seed,
    bool need_query, bool need_key, bool need_value) {
  check_padded(query, key, value);
  check(grad_output, shape_of(query), query, "grad_output");
  check(output, shape_of(query), query, "output");
  check_statistics(logsumexp, {query.size(0), query.size(2), query.size(1)}, query);
  const DeviceGuard guard(query.get_device_index());
  return backward(
      padded_call(query, key.size(1), mask, scale, dropout_p, seed), grad_output, query, key, value, output, logsumexp,
      need_query, need_key, need_value);
}

Outputs masked_attention_qkvpacked(
    const Tensor& qkv_in, const Optional& mask, double scale, double dropout_p, const Optional& seed) {
  check_qkv(qkv_in);
  const DeviceGuard guard(qkv_in.get_device_index());
  const Call call = qkv_call(qkv_in, mask, scale, dropout_p, seed);
  const Tensor qkv = readable(qkv_in);
  const Shape shape{qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
  Outputs made = new_outputs(qkv, shape, {shape[0], shape[2], shape[1]});
  if (qkv.numel() == 0) return made;
  by_type(qkv, [&](auto element) {
    using T = decltype(element);
    launch_attention_forward<T>(
        attention_of<T>(call, third_of<const T>(qkv, 0), third_of<const T>(qkv, 1), third_of<const T>(qkv, 2)),
        {rows_of<T>(std::get<0>(made)), statistics_of<float>(std::get<1>(made))}, call.stream);
  });
  return made;
}

Tensor masked_attention_qkvpacked_backward(
    const Tensor& grad_output, const Tensor& qkv_in, const Tensor& output, const Tensor& logsumexp,
    const Optional& mask, double scale, double dropout_p, const Optional& seed) {
  check_qkv(qkv_in);
  const Shape shape{qkv_in.size(0), qkv_in.size(1), qkv_in.size(3), qkv_in.size(4)};
  check(grad_output, shape, qkv_in, "grad_output");
  check(output, shape, qkv_in, "output");
  check_statistics(logsumexp, {shape[0], shape[2], shape[1]}, qkv_in);
  const DeviceGuard guard(qkv_in.get_device_index());
  const Call call = qkv_call(qkv_in, mask, scale, dropout_p, seed);
  const Tensor qkv = readable(qkv_in);
  Tensor gradient = torch::stable::new_empty(qkv, shape_of(qkv));
  by_type(qkv, [&](auto element) {
    using T = decltype(element);
    backward_of<T>(
        call, attention_of<T>(call, third_of<const T>(qkv, 0), third_of<const T>(qkv, 1), third_of<const T>(qkv, 2)),
        grad_output, output, logsumexp, third_of<T>(gradient, 0), third_of<T>(gradient, 1), third_of<T>(gradient, 2));
  });
  return gradient;
}

Outputs masked_attention_varlen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& offsets_q, const Tensor& offsets_k,
    int64_t longest_q, int64_t longest_k, double scale, double dropout_p, const Optional& seed) {
  check_packed(query, key, value, offsets_q, offsets_k);
  const DeviceGuard guard(query.get_device_index());
  return forward(
      packed_call(query, key, offsets_q, offsets_k, longest_q, longest_k, scale, dropout_p, seed), query, key, value);
}

Gradients masked_attention_varlen_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, const Tensor& offsets_q, const Tensor& offsets_k, int64_t longest_q, int64_t longest_k,
    double scale, double dropout_p, const Optional& seed, bool need_query, bool need_key, bool need_value) {
  check_packed(query, key, value, offsets_q, offsets_k);
  check(grad_output, shape_of(query), query, "grad_output");
  check(output, shape_of(query), query, "output");
  check_statistics(logsumexp, {query.size(1), query.size(0)}, query);
  const DeviceGuard guard(query.get_device_index());
  return backward(
      packed_call(query, key, offsets_q, offsets_k, longest_q, longest_k, scale, dropout_p, seed), grad_output, query,
      key, value, output, logsumexp, need_query, need_key, need_value);
}

}  // namespace
}  // namespace mpma::cuda

STABLE_TORCH_LIBRARY_IMPL(mpma, CUDA, m) {
  m.impl("masked_attention", TORCH_BOX(&mpma::cuda::masked_attention));
  m.impl("masked_attention_backward", TORCH_BOX(&mpma::cuda::masked_attention_backward));
  m.impl("masked_attention_qkvpacked", TORCH_BOX(&mpma::cuda::masked_attention_qkvpacked));
  m.impl("masked_attention_qkvpacked_backward", TORCH_BOX(&mpma::cuda::masked_attention_qkvpacked_backward));
  m.impl("masked_attention_varlen", TORCH_BOX(&mpma::cuda::masked_attention_varlen));
  m.impl("masked_attention_varlen_backward", TORCH_BOX(&mpma::cuda::masked_attention_varlen_backward));
}
