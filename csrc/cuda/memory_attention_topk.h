// Memory attention over the K best slots of a row.
//
// A block owns some rows of one head and takes the bank a chunk of slots at a time: the scores of the chunk go to shared
// memory, and each warp takes those of its rows into their candidates. At the end the best of the candidates are weighted
// by their softmax, and their values gathered. No score leaves the block.
#pragma once

#include "cuda/memory_attention.h"
#include "cuda/memory_attention_scores.h"
#include "cuda/memory_attention_select.h"
#include "cuda/shared_memory.h"

#include <cmath>

namespace mpma::cuda {

// 32 rows and 512 slots fit the shared memory that every device has, and two blocks the larger ones.
constexpr int kTopkRows = 32, kTopkChunk = 512, kTopkThreads = 256;

struct TopkLayout {
  using Chunk = ScoreChunk<kTopkRows, kTopkChunk>;
  Chunk chunk;
  Bytes8* entries;  // kTopkRows x kCandidates
  int* counts;
  float* cuts;

  explicit MPMA_HOST_DEVICE TopkLayout(SharedMemory& memory)
      : chunk{memory.take<float>(Chunk::kSize)}, entries(memory.take<Bytes8>(kTopkRows * kCandidates)),
        counts(memory.take<int>(kTopkRows)), cuts(memory.take<float>(kTopkRows)) {}

  MPMA_DEVICE RowCandidates row(int i) const { return {entries + i * kCandidates, counts + i, cuts + i}; }
};

// Scores of the block's rows on the slots from slot0 on; -inf beyond the last.
template <class RowScorer>
MPMA_DEVICE void score_chunk(const RowScorer& scorer, const TopkLayout::Chunk& chunk, int slot0, int slots) {
  constexpr int kSlots = RowScorer::kSlots, kBlocks = kTopkChunk / kSlots, kWarps = kTopkThreads / kWarp;
  static_assert(kBlocks % kWarps == 0, "every warp has as many");
  // Every warp takes the blocks of 8 or 16 slots in turn, and reads the next one's keys while it multiplies.
  int column = warp_index() * kSlots;
  auto next = scorer.keys(slot0 + column);
  for (int block = 0; block < kBlocks / kWarps; ++block, column += kWarps * kSlots) {
    const auto keys = next;
    if (block + 1 < kBlocks / kWarps) next = scorer.keys(slot0 + column + kWarps * kSlots);
    auto sums = scorer.scores(keys);
    const int real = slots - slot0 - column;
    if (real < kSlots) sums.for_each([&](int, int j, float& x) { x = j < real ? x : -INFINITY; });
    MPMA_UNROLL
    for (int m = 0; m < decltype(sums)::kRowCount / 16; ++m)
      MPMA_UNROLL
      for (int n = 0; n < kSlots / 8; ++n)
        MPMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float* x = sums.sum[m][n].value + 2 * i;
          store_two(
              chunk.at(16 * m + 8 * i + lane_index() / 4, column + 8 * n + lane_index() % 4 * 2), x[0], x[1]);
        }
  }
}

// Softmax over a row's candidates, of which exactly topk are left, dropout and the weighted sum of their values.
template <class T, int kWidth>
MPMA_DEVICE void attend_to_candidates(
    const MemoryProblem<T>& m, const MemoryDropout& dropout, const RowCandidates& candidates, int topk, int head,
    int64_t row, bool aligned, T* output, float* logsumexp, int32_t* indices) {
  using P = Pieces<T, kWidth>;
  const int64_t at = row * m.heads + head;
  float weight[kMostKept / kWarp], top = -INFINITY, total = 0.f;
  int slot[kMostKept / kWarp] = {};
  MPMA_UNROLL
  for (int i = 0; i < kMostKept / kWarp; ++i) {
    const int place = i * kWarp + lane_index();
    weight[i] = -INFINITY;
    if (place >= topk) continue;
    const Bytes8 entry = load_8(candidates.entry + place);
    weight[i] = bits_float(entry.word[0]);
    slot[i] = static_cast<int>(entry.word[1]);
    indices[at * topk + place] = slot[i];
    top = weight[i] > top ? weight[i] : top;
  }
  top = warp_largest(top);
  MPMA_UNROLL
  for (int i = 0; i < kMostKept / kWarp; ++i) {
    if (i * kWarp + lane_index() >= topk) continue;
    weight[i] = exp_nonpositive(weight[i] - top);
    total += weight[i];
  }
  total = warp_total(total);
  if (lane_index() == 0) logsumexp[at] = top + log_accurate(total);
  warp_barrier();
  MPMA_UNROLL
  for (int i = 0; i < kMostKept / kWarp; ++i) {
    const int place = i * kWarp + lane_index();
    if (place >= topk) continue;
    float x = divide_rn(weight[i], total);
    if (dropout.active()) x *= dropout.factor(row, slot[i]);
    store_8(candidates.entry + place, Bytes8{{float_bits(x), static_cast<uint32_t>(slot[i])}});
  }
  warp_barrier();
  float sum[kVector<T>] = {};
  add_rows<T, kWidth>(m.value, head, m.width, topk, sum, [&](int i, float& by, int& row) {
    const Bytes8 entry = load_8(candidates.entry + i);
    by = bits_float(entry.word[0]);
    row = static_cast<int>(entry.word[1]);
  });
  MPMA_UNROLL
  for (int d = 0; d < kVector<T>; ++d) sum[d] = P::sum_of_rows(sum[d]);
  if (P::which() == 0) store_piece<T>(output + at * m.width, P::column(), m.width, aligned, sum);
}

template <class T, int kWidth>
MPMA_KERNEL(kTopkThreads, kWidth > 64 && kIsHalf<T> ? 1 : 2)  // the query takes twice the registers there
memory_topk_kernel(MemoryProblem<T> m, int topk, bool aligned, T* output, float* logsumexp, int32_t* indices) {
  SharedMemory memory = SharedMemory::this_block();
  const TopkLayout layout(memory);
  const int64_t tiles = (m.rows + kTopkRows - 1) / kTopkRows;
  const int head = static_cast<int>(block_x() / tiles);
  const int64_t row0 = block_x() % tiles * kTopkRows;
  const int rows = static_cast<int>(m.rows - row0 < kTopkRows ? m.rows - row0 : kTopkRows);
  {
    const Scorer<T, kTopkRows / 16, kWidth> scorer(m, head, row0);
    for (int slot0 = 0; slot0 < m.slots; slot0 += kTopkChunk) {
      score_chunk(scorer, layout.chunk, slot0, m.slots);
      barrier();
      for (int i = warp_index(); i < rows; i += warp_count())
        take_chunk(layout.row(i), layout.chunk, i, slot0, m.slots, topk);
      barrier();
    }
  }
  const MemoryDropout dropout(m, head);
  for (int i = warp_index(); i < rows; i += warp_count()) {
    const RowCandidates candidates = layout.row(i);
    if (*candidates.count > topk) keep_best(candidates, *candidates.count, topk);
    attend_to_candidates<T, kWidth>(
        m, dropout, candidates, topk, head, row0 + i, aligned, output, logsumexp, indices);
  }
}

// output (R, H, D), logsumexp (R, H), indices (R, H, K), contiguous; 1 <= topk <= kMostKept and topk < slots.
template <class T>
void launch_memory_topk(
    const MemoryProblem<T>& m, int topk, T* output, float* logsumexp, int32_t* indices, void* stream) {
  const Launch how = {{(m.rows + kTopkRows - 1) / kTopkRows * m.heads}, kTopkThreads, shared_bytes<TopkLayout>(), stream};
  const bool aligned = aligned_rows(output, m.width);
  if (m.width <= 64)
    launch<memory_topk_kernel<T, 64>>(how, m, topk, aligned, output, logsumexp, indices);
  else
    launch<memory_topk_kernel<T, 128>>(how, m, topk, aligned, output, logsumexp, indices);
}

}  // namespace mpma::cuda
