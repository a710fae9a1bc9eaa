// The gradients of dense memory attention, in the notation of masked attention's: with p the weights, z what dropout makes
// of them, dp the gradient of z p, and delta = <grad_output, output>,
//     ds = p (z dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = (z p)^T grad_output.
// Blocks that own rows sum dq over the slots, blocks that own slots sum dk and dv over the rows: each rebuilds the weights
// from the log-sum-exp, and every sum has one order. Where few blocks own slots, the rows are split among several, and
// their sums added up in order.
#pragma once

#include "cuda/memory_attention_dense.h"

namespace mpma::cuda {

// What the kernels read beside the problem and write.
template <class T>
struct DenseGradients {
  MemoryGradients<T> of;
  MemoryRows<T> output;
  const float* logsumexp;  // (R, H)
  float* delta;            // (R, H), workspace; null where only the values need a gradient
  int splits;
  float *key_parts, *value_parts;  // (splits, N, H, D), workspace; null with one split or where nobody needs them
};

template <class T, int kWidth>
MPMA_KERNEL(256, 2)
memory_delta_kernel(MemoryProblem<T> m, DenseGradients<T> g) {
  using P = Pieces<T, kWidth>;
  const int64_t at = (block_x() * warp_count() + warp_index()) * P::kTogether + P::which();
  const bool real = at < m.rows * m.heads;
  const int64_t row = real ? at / m.heads : 0;
  const int head = real ? static_cast<int>(at % m.heads) : 0;
  const MemoryRows<T>&grad = g.of.grad_output, &output = g.output;
  const Bytes16 x = load_piece(grad.at(row, head), P::column(), m.width, grad.aligned);
  const Bytes16 y = load_piece(output.at(row, head), P::column(), m.width, output.aligned);
  float sum = 0.f;
  MPMA_UNROLL
  for (int d = 0; d < kVector<T>; ++d) sum = fma_rn(element<T>(x, d), element<T>(y, d), sum);
  sum = P::sum_of_row(sum);
  if (real && P::column() == 0) g.delta[at] = sum;
}

// Blocks that own rows: the gradient of the query.
template <class T, int kWidth>
MPMA_KERNEL(kDenseThreads, 1)
memory_dense_rows_kernel(MemoryProblem<T> m, DenseGradients<T> g) {
  constexpr int kStream = kDenseStream<T, kWidth>;
  SharedMemory memory = SharedMemory::this_block();
  const DenseLayout<T, kWidth, 2> layout(memory);
  const int64_t tiles = (m.rows + kDenseOwned - 1) / kDenseOwned;
  const int head = static_cast<int>(block_x() / tiles), own_row = warp_index() * 16;
  const int64_t row0 = block_x() % tiles * kDenseOwned, row = row0 + own_row + lane_index() / 4;
  const auto load = [&](int slot, int buffer) {
    load_rows(layout.stream(buffer, 0), m.key, head, slot, m.slots, m.width);
    load_rows(layout.stream(buffer, 1), m.value, head, slot, m.slots, m.width);
    cp_async_commit();
  };
  load_rows(layout.owned(0), m.query, head, row0, m.rows, m.width);
  load_rows(layout.owned(1), g.of.grad_output, head, row0, m.rows, m.width);
  load(0, 0);
  float logsumexp[2], delta[2];
  MPMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool real = row + 8 * i < m.rows;
    logsumexp[i] = real ? g.logsumexp[(row + 8 * i) * m.heads + head] : 0.f;
    delta[i] = real ? g.delta[(row + 8 * i) * m.heads + head] : 0.f;
  }
  const MemoryDropout dropout(m, head);
  Accumulator<1, kWidth / 8> sums;
  sums.clear();
  for (int slot0 = 0, buffer = 0; slot0 < m.slots; slot0 += kStream, buffer ^= 1) {
    if (slot0 + kStream < m.slots) {
      load(slot0 + kStream, buffer ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    barrier();
    Accumulator<1, kStream / 8> scores, grads;
    scores.clear();
    grads.clear();
    multiply_rows(scores, layout.owned(0), own_row, layout.stream(buffer, 0));
    multiply_rows(grads, layout.owned(1), own_row, layout.stream(buffer, 1));
    MPMA_UNROLL
    for (int n = 0; n < kStream / 8; ++n) {
      Sum& x = grads.sum[0][n];
      if (dropout.active()) {
        const Sum factors = drop_rows(dropout, row, slot0 + 8 * n);
        MPMA_UNROLL
        for (int i = 0; i < 4; ++i) x.value[i] *= factors.value[i];
      }
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const bool real = slot0 + 8 * n + lane_index() % 4 * 2 + i % 2 < m.slots;
        const float weight =
            dense_weight<T>(multiply_rn(scores.sum[0][n].value[i], m.scale) - logsumexp[i / 2]);
        x.value[i] = real ? weight * (x.value[i] - delta[i / 2]) : 0.f;
      }
    }
    multiply<T>(sums, grads, by_columns(layout.stream(buffer, 0)));
    barrier();
  }
  sums.for_each([&](int, int, float& x) { x *= m.scale; });
  const int64_t left = m.rows - row0 - own_row;
  store_global<T>(sums, static_cast<int>(left < 16 ? left : 16), m.width, [&](int i) {
    return g.of.query + ((row0 + own_row + i) * m.heads + head) * m.width;
  });
}

// The same as drop_rows with slots as the accumulator's rows, `slot` and slot + 8 this lane's, and columns from `row` on.
// Four lanes share the words of two rows on two groups of slots: each draws one of these four counters.
MPMA_DEVICE Sum drop_columns(const MemoryDropout& dropout, int64_t row, int slot) {
  const int own = slot % 4;  // lanes 4 apart have consecutive slots
  const auto select = [](const uint32_t (&x)[4], int i) {
    const uint32_t low = i % 2 == 0 ? x[0] : x[1], high = i % 2 == 0 ? x[2] : x[3];
    return i < 2 ? low : high;
  };
  const int64_t of_row = row + lane_index() % 4 * 2 + own % 2;
  const PhiloxWords words = dropout.words(of_row, slot + own / 2 * 8);
  uint32_t got[4];  // of the counter that the lane of slot own ^ i drew
  MPMA_UNROLL
  for (int i = 0; i < 4; ++i) got[i] = shuffle_xor(select(words.word, own ^ i), 4 * i);
  Sum factors;
  MPMA_UNROLL
  for (int i = 0; i < 4; ++i) factors.value[i] = dropout.factor(select(got, own ^ i));
  return factors;
}

// Blocks that own slots: the gradients of their keys (with kKey) and values (with kValue), or a split of the rows' part of
// them.
template <class T, int kWidth, bool kKey, bool kValue>
MPMA_KERNEL(kDenseThreads, 1)
memory_dense_slots_kernel(MemoryProblem<T> m, DenseGradients<T> g) {
  constexpr int kStream = kDenseStream<T, kWidth>;
  SharedMemory memory = SharedMemory::this_block();
  const DenseLayout<T, kWidth, 2> layout(memory);
  const int tiles = (m.slots + kDenseOwned - 1) / kDenseOwned;
  const int head = static_cast<int>(block_x() / tiles), own_slot = warp_index() * 16;
  const int slot0 = static_cast<int>(block_x() % tiles) * kDenseOwned, slot = slot0 + own_slot + lane_index() / 4;
  const int64_t all = (m.rows + kStream - 1) / kStream, split = block_y();
  const int64_t first = all * split / g.splits * kStream, end = all * (split + 1) / g.splits * kStream;
  const bool need_key = kKey && g.of.key != nullptr, need_value = kValue && g.of.value != nullptr;
  const auto load = [&](int64_t row, int buffer) {
    load_rows(layout.stream(buffer, 0), m.query, head, row, m.rows, m.width);
    load_rows(layout.stream(buffer, 1), g.of.grad_output, head, row, m.rows, m.width);
    for (int i = thread_index(); i < kStream; i += thread_count()) {
      const bool real = row + i < m.rows;
      float* statistics = layout.statistics(buffer, i);
      statistics[0] = real ? g.logsumexp[(row + i) * m.heads + head] : 0.f;
      statistics[1] = real && need_key ? g.delta[(row + i) * m.heads + head] : 0.f;
    }
    cp_async_commit();
  };
  load_rows(layout.owned(0), m.key, head, slot0, m.slots, m.width);
  load_rows(layout.owned(1), m.value, head, slot0, m.slots, m.width);
  cp_async_commit();  // where there are no rows, nothing else does
  const MemoryDropout dropout(m, head);
  Accumulator<1, kWidth / 8> of_key, of_value;
  of_key.clear();
  of_value.clear();
  if (first < end) load(first, 0);
  int buffer = 0;
  for (int64_t row0 = first; row0 < end; row0 += kStream, buffer ^= 1) {
    if (row0 + kStream < end) {
      load(row0 + kStream, buffer ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    barrier();
    Accumulator<1, kStream / 8> weights, grads;
    weights.clear();
    grads.clear();
    multiply_rows(weights, layout.owned(0), own_slot, layout.stream(buffer, 0));
    if (need_key) multiply_rows(grads, layout.owned(1), own_slot, layout.stream(buffer, 1));
    MPMA_UNROLL
    for (int n = 0; n < kStream / 8; ++n) {
      Sum factors{{1.f, 1.f, 1.f, 1.f}};
      if (dropout.active()) factors = drop_columns(dropout, row0 + 8 * n, slot);
      MPMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + lane_index() % 4 * 2 + i % 2;
        const float* statistics = layout.statistics(buffer, column);
        const bool real = row0 + column < m.rows && slot + i / 2 * 8 < m.slots;
        float &x = weights.sum[0][n].value[i], &of_score = grads.sum[0][n].value[i];
        const float weight = real ? dense_weight<T>(multiply_rn(x, m.scale) - statistics[0]) : 0.f;
        of_score = real ? weight * (factors.value[i] * of_score - statistics[1]) : 0.f;
        x = weight * factors.value[i];
      }
    }
    if (need_value) multiply<T>(of_value, weights, by_columns(layout.stream(buffer, 1)));
    if (need_key) multiply<T>(of_key, grads, by_columns(layout.stream(buffer, 0)));
    barrier();
  }
  cp_async_wait<0>();
  of_key.for_each([&](int, int, float& x) { x *= m.scale; });
  const auto store = [&](const Accumulator<1, kWidth / 8>& sums, T* to, float* parts) {
    const int left = m.slots - slot0 - own_slot, rows = left < 16 ? left : 16;
    const auto place = [&](int64_t i) { return ((slot0 + own_slot + i) * m.heads + head) * m.width; };
    if (g.splits == 1)
      store_global<T>(sums, rows, m.width, [&](int i) { return to + place(i); });
    else
      store_global<float>(
          sums, rows, m.width, [&](int i) { return parts + split * m.slots * m.heads * m.width + place(i); });
  };
  if (need_key) store(of_key, g.of.key, g.key_parts);
  if (need_value) store(of_value, g.of.value, g.value_parts);
}

// to (count) = the sum of parts (splits, count).
template <class T>
MPMA_KERNEL(256, 2)
sum_splits_kernel(const float* parts, T* to, int64_t count, int splits) {
  const int64_t i = block_x() * thread_count() + thread_index();
  if (i >= count) return;
  float sum = 0.f;
  for (int split = 0; split < splits; ++split) sum += parts[split * count + i];
  to[i] = from_float<T>(sum);
}

// Into how many parts the rows are split: enough for four blocks a multiprocessor, and few enough to have 512 rows each.
inline int dense_splits(int64_t rows, int heads, int slots, int multiprocessors) {
  const int64_t blocks = int64_t{heads} * ((slots + kDenseOwned - 1) / kDenseOwned);
  const int64_t wanted = blocks == 0 ? 1 : (int64_t{4} * multiprocessors + blocks - 1) / blocks, most = rows / 512;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits < 1 ? 1 : splits < 64 ? splits : 64);
}

template <class T, int kWidth>
void launch_memory_dense_backward(const MemoryProblem<T>& m, const DenseGradients<T>& g, void* stream) {
  if (g.delta != nullptr) {
    constexpr int kRows = 256 / kWarp * Pieces<T, kWidth>::kTogether;
    launch<memory_delta_kernel<T, kWidth>>({{(m.rows * m.heads + kRows - 1) / kRows}, 256, 0, stream}, m, g);
  }
  if (g.of.query != nullptr) {
    const Launch how = {
        {(m.rows + kDenseOwned - 1) / kDenseOwned * m.heads}, kDenseThreads, shared_bytes<DenseLayout<T, kWidth, 2>>(),
        stream};
    launch<memory_dense_rows_kernel<T, kWidth>>(how, m, g);
  }
  if (g.of.key == nullptr && g.of.value == nullptr) return;
  const Launch how = {
      {int64_t{m.heads} * ((m.slots + kDenseOwned - 1) / kDenseOwned), g.splits}, kDenseThreads,
      shared_bytes<DenseLayout<T, kWidth, 2>>(), stream};
  if constexpr (!kIsHalf<T> && kWidth > 64) {  // registers do not hold the sums of both
    if (g.of.key) launch<memory_dense_slots_kernel<T, kWidth, true, false>>(how, m, g);
    if (g.of.value) launch<memory_dense_slots_kernel<T, kWidth, false, true>>(how, m, g);
  } else {
    launch<memory_dense_slots_kernel<T, kWidth, true, true>>(how, m, g);
  }
  if (g.splits == 1) return;
  const int64_t count = int64_t{m.slots} * m.heads * m.width;
  const Launch sum = {{(count + 255) / 256}, 256, 0, stream};
  if (g.of.key) launch<sum_splits_kernel<T>>(sum, g.key_parts, g.of.key, count, g.splits);
  if (g.of.value) launch<sum_splits_kernel<T>>(sum, g.value_parts, g.of.value, count, g.splits);
}

// Gradients contiguous, written in full.
template <class T>
void launch_memory_dense_backward(const MemoryProblem<T>& m, const DenseGradients<T>& g, void* stream) {
  if (m.width <= 64)
    launch_memory_dense_backward<T, 64>(m, g, stream);
  else
    launch_memory_dense_backward<T, 128>(m, g, stream);
}

}  // namespace mpma::cuda
