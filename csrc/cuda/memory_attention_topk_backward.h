// The gradients of memory attention over the K best slots, which are those of the forward.
//
// A warp owns a row of one head: it gathers its K keys and values, rebuilds the weights, sums the gradient of the query and
// leaves the entries of its slots, (row, weight after dropout, gradient of the score), sorted by slot. Then a block owns a
// slot and sums the gradients of its key and value over its entries, in an order that never varies.
#pragma once

#include <cmath>

#include "cuda/memory_attention.h"
#include "cuda/memory_attention_by_slot.h"
#include "cuda/shared_memory.h"

namespace mpma::cuda {

constexpr int kTopkBackwardThreads = 256, kTopkBackwardWarps = kTopkBackwardThreads / kWarp;

struct TopkRowsLayout {
  int* slot;           // a warp has kMostKept of each
  float *score, *grad;  // of the score, before the softmax and after it

  explicit MPMA_HOST_DEVICE TopkRowsLayout(SharedMemory& memory)
      : slot(memory.take<int>(kTopkBackwardWarps * kMostKept)),
        score(memory.take<float>(kTopkBackwardWarps * kMostKept)),
        grad(memory.take<float>(kTopkBackwardWarps * kMostKept)) {}
};

// places (R, H, K) and entries (H, R * K), or null where the bank needs no gradient.
template <class T, int kWidth>
MPMA_KERNEL(kTopkBackwardThreads, 2)
memory_topk_rows_kernel(
    MemoryProblem<T> m, MemoryGradients<T> g, int topk, bool aligned, const int32_t* indices, const int32_t* places,
    Bytes16* entries) {
  using P = Pieces<T, kWidth>;
  constexpr int kEach = kMostKept / kWarp;
  SharedMemory memory = SharedMemory::this_block();
  const TopkRowsLayout layout(memory);
  const int lane = lane_index(), column = P::column();
  int* slots = layout.slot + warp_index() * kMostKept;
  float *scores = layout.score + warp_index() * kMostKept, *grads = layout.grad + warp_index() * kMostKept;
  const int64_t item = block_x() * kTopkBackwardWarps + warp_index();
  if (item >= m.heads * m.rows) return;  // the whole warp, and nothing below waits for others
  const int head = static_cast<int>(item / m.rows);
  const int64_t row = item % m.rows, at = row * m.heads + head;
  const bool need_scores = g.query != nullptr || g.key != nullptr;

  int slot[kEach] = {};
  MPMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kWarp + lane;
    if (place >= topk) continue;
    slot[i] = slot_in_bank(indices[at * topk + place], m.slots);
    slots[place] = slot[i];
  }
  float q[kVector<T>], grad[kVector<T>];
  const Bytes16 query = load_piece(m.query.at(row, head), column, m.width, m.query.aligned);
  const Bytes16 grad_output = load_piece(g.grad_output.at(row, head), column, m.width, g.grad_output.aligned);
  MPMA_UNROLL
  for (int d = 0; d < kVector<T>; ++d) {
    q[d] = element<T>(query, d);
    grad[d] = element<T>(grad_output, d);
  }
  warp_barrier();

  // Products with the keys and the values.
  constexpr int kAtOnce = 2;
  for (int first = 0; first < topk; first += kAtOnce * P::kTogether) {
    Bytes16 key[kAtOnce], value[kAtOnce];
    MPMA_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * P::kTogether + P::which();
      key[j] = value[j] = {{0, 0, 0, 0}};
      if (i >= topk) continue;
      key[j] = load_piece(m.key.at(slots[i], head), column, m.width, m.key.aligned);
      if (need_scores) value[j] = load_piece(m.value.at(slots[i], head), column, m.width, m.value.aligned);
    }
    MPMA_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      float by_key = 0.f, by_value = 0.f;
      MPMA_UNROLL
      for (int d = 0; d < kVector<T>; ++d) {
        by_key = fma_rn(q[d], element<T>(key[j], d), by_key);
        by_value = fma_rn(grad[d], element<T>(value[j], d), by_value);
      }
      by_key = P::sum_of_row(by_key);
      by_value = P::sum_of_row(by_value);
      const int i = first + j * P::kTogether + P::which();
      if (i < topk && column == 0) {
        scores[i] = multiply_rn(by_key, m.scale);
        grads[i] = by_value;
      }
    }
  }
  warp_barrier();

  // The softmax anew, not exp(score - logsumexp): products summed in another order than the forward's would leave weights
  // that do not quite add up to 1, and the difference below is small against its terms.
  const MemoryDropout dropout(m, head);
  float weight[kEach], keep[kEach], of_weight[kEach], top = -INFINITY, total = 0.f, mean = 0.f;
  MPMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kWarp + lane;
    weight[i] = place < topk ? scores[place] : -INFINITY;
    of_weight[i] = place < topk ? grads[place] : 0.f;
    top = weight[i] > top ? weight[i] : top;
  }
  top = warp_largest(top);
  MPMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    weight[i] = i * kWarp + lane < topk ? exp_nonpositive(weight[i] - top) : 0.f;
    total += weight[i];
  }
  total = warp_total(total);
  MPMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    weight[i] = divide_rn(weight[i], total);
    keep[i] = 1.f;
    if (dropout.active() && i * kWarp + lane < topk) keep[i] = dropout.factor(row, slot[i]);
    of_weight[i] *= keep[i];
    if (i * kWarp + lane < topk) mean += weight[i] * of_weight[i];
  }
  mean = warp_total(mean);
  MPMA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kWarp + lane;
    if (place >= topk) continue;
    const float of_score = m.scale * weight[i] * (of_weight[i] - mean);
    grads[place] = of_score;
    if (entries == nullptr) continue;
    const int64_t to = head * m.rows * topk + places[at * topk + place];
    store_16(
        entries + to,
        Bytes16{{static_cast<uint32_t>(row), float_bits(weight[i] * keep[i]), float_bits(of_score), 0}});
  }
  if (g.query == nullptr) return;
  warp_barrier();
  float sum[kVector<T>] = {};
  add_rows<T, kWidth>(m.key, head, m.width, topk, sum, [&](int i, float& by, int& of) {
    by = grads[i];
    of = slots[i];
  });
  MPMA_UNROLL
  for (int d = 0; d < kVector<T>; ++d) sum[d] = P::sum_of_rows(sum[d]);
  if (P::which() == 0) store_piece<T>(g.query + at * m.width, column, m.width, aligned, sum);
}

template <int kWidth>
struct TopkSlotsLayout {
  float* sums;  // (warps, 2, kWidth)

  explicit MPMA_HOST_DEVICE TopkSlotsLayout(SharedMemory& memory)
      : sums(memory.take<float>(kTopkBackwardWarps * 2 * kWidth)) {}
};

template <class T, int kWidth>
MPMA_KERNEL(kTopkBackwardThreads, 2)
memory_topk_slots_kernel(
    MemoryProblem<T> m, MemoryGradients<T> g, int topk, const int32_t* starts, const Bytes16* entries) {
  using P = Pieces<T, kWidth>;
  SharedMemory memory = SharedMemory::this_block();
  const TopkSlotsLayout<kWidth> layout(memory);
  const int64_t slots = m.slots, head = block_x() / slots, slot = block_x() % slots;
  const int start = starts[head * (slots + 1) + slot], stop = starts[head * (slots + 1) + slot + 1];
  entries += head * m.rows * topk;
  const int column = P::column();
  float of_key[kVector<T>] = {}, of_value[kVector<T>] = {};
  constexpr int kAtOnce = 2, kBatch = kAtOnce * P::kTogether;
  for (int first = start + warp_index() * kBatch; first < stop; first += kTopkBackwardWarps * kBatch) {
    Bytes16 query[kAtOnce], grad[kAtOnce];
    float of_score[kAtOnce], weight[kAtOnce];
    MPMA_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * P::kTogether + P::which();
      query[j] = grad[j] = {{0, 0, 0, 0}};
      of_score[j] = weight[j] = 0.f;
      if (i >= stop) continue;
      const Bytes16 entry = load_16(entries + i);
      const int64_t row = entry.word[0];
      weight[j] = bits_float(entry.word[1]);
      of_score[j] = bits_float(entry.word[2]);
      if (row >= m.rows) continue;  // indices that no forward gives
      if (g.key) query[j] = load_piece(m.query.at(row, head), column, m.width, m.query.aligned);
      if (g.value) grad[j] = load_piece(g.grad_output.at(row, head), column, m.width, g.grad_output.aligned);
    }
    MPMA_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      MPMA_UNROLL
      for (int d = 0; d < kVector<T>; ++d) {
        of_key[d] = fma_rn(of_score[j], element<T>(query[j], d), of_key[d]);
        of_value[d] = fma_rn(weight[j], element<T>(grad[j], d), of_value[d]);
      }
  }
  float* own = layout.sums + warp_index() * 2 * kWidth;
  MPMA_UNROLL
  for (int d = 0; d < kVector<T>; ++d) {
    const float x = P::sum_of_rows(of_key[d]), y = P::sum_of_rows(of_value[d]);
    if (P::which() != 0) continue;
    own[column + d] = x;
    own[kWidth + column + d] = y;
  }
  barrier();
  for (int i = thread_index(); i < 2 * kWidth; i += thread_count()) {
    T* to = i < kWidth ? g.key : g.value;
    if (to == nullptr || i % kWidth >= m.width) continue;
    float sum = 0.f;
    MPMA_UNROLL
    for (int warp = 0; warp < kTopkBackwardWarps; ++warp) sum += layout.sums[warp * 2 * kWidth + i];
    to[(slot * m.heads + head) * m.width + i % kWidth] = from_float<T>(sum);
  }
}

template <class T, int kWidth>
void launch_memory_topk_backward(
    const MemoryProblem<T>& m, const MemoryGradients<T>& g, const BySlot& order, Bytes16* entries, void* stream) {
  const bool bank = g.key != nullptr || g.value != nullptr;
  if (bank) launch_by_slot(order, stream);
  const Launch rows = {
      {(m.heads * m.rows + kTopkBackwardWarps - 1) / kTopkBackwardWarps}, kTopkBackwardThreads,
      shared_bytes<TopkRowsLayout>(), stream};
  launch<memory_topk_rows_kernel<T, kWidth>>(
      rows, m, g, order.topk, aligned_rows(g.query, m.width), order.indices, order.places, bank ? entries : nullptr);
  if (!bank) return;
  const Launch slots = {
      {int64_t{m.heads} * m.slots}, kTopkBackwardThreads, shared_bytes<TopkSlotsLayout<kWidth>>(), stream};
  launch<memory_topk_slots_kernel<T, kWidth>>(slots, m, g, order.topk, order.starts, entries);
}

// Gradients contiguous, written in full. order is without its results, entries (H, R * K) workspace; both may be null where
// the bank needs no gradient.
template <class T>
void launch_memory_topk_backward(
    const MemoryProblem<T>& m, const MemoryGradients<T>& g, const BySlot& order, Bytes16* entries, void* stream) {
  if (m.width <= 64)
    launch_memory_topk_backward<T, 64>(m, g, order, entries, stream);
  else
    launch_memory_topk_backward<T, 128>(m, g, order, entries, stream);
}

}  // namespace mpma::cuda
