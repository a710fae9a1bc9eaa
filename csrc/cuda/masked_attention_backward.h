// The backward of masked attention: which kernels make which gradient. What they are does not depend on which are
// needed, so that a gradient has the same bits whatever the others.
#pragma once

#include <type_traits>

#include "cuda/masked_attention_key_gradients.h"
#include "cuda/masked_attention_query_gradients.h"

namespace mpma::cuda {

template <class T, int kWidth, bool kDropout>
void launch_attention_backward_as(
    const Attention<T>& a, AttentionGradients<T> g, const Device& device, void* stream) {
  const KeyParts of = key_parts<T, kWidth>(a.sizes, device);
  if (of.parts > 1 && g.query.data != nullptr) launch_attention_query_gradients<T, kWidth, kDropout>(a, g, stream);
  if (of.parts > 1) g.query = {};
  if (g.query.data != nullptr || g.key.data != nullptr || g.value.data != nullptr)
    launch_attention_key_gradients<T, kWidth, kDropout>(a, g, of, stream);
}

template <class T>
void launch_attention_backward(
    const Attention<T>& a, const AttentionGradients<T>& g, const Device& device, void* stream) {
  const auto launch_of_width = [&](auto width) {
    if (a.dropout.seed != nullptr)
      launch_attention_backward_as<T, width, true>(a, g, device, stream);
    else
      launch_attention_backward_as<T, width, false>(a, g, device, stream);
  };
  if (a.sizes.width <= 64)
    launch_of_width(std::integral_constant<int, 64>{});
  else
    launch_of_width(std::integral_constant<int, 128>{});
}

}  // namespace mpma::cuda
