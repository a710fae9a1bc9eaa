// Where the entries of memory attention's rows stand when those of a head are sorted by slot, and within a slot by row: a
// counting sort. The slots of a row are distinct, so that a warp places all of a row at once, and takes the rows of
// its segment one after the other: the order is that of the rows, whatever the threads do.
#pragma once

#include "cuda/memory_attention.h"
#include "cuda/shared_memory.h"

namespace mpma::cuda {

// Counters a block holds in shared memory: a larger bank is taken in ranges.
constexpr int kSlotRange = 8192;

struct BySlot {
  const int32_t* indices;  // (R, H, K)
  int64_t rows;
  int heads, slots, topk;
  int64_t segment;  // rows
  int32_t* counts;  // (H, segments, N): entries of a segment and a slot, then those of earlier segments
  int32_t* starts;  // (H, N + 1): where a slot begins
  int32_t* places;  // (R, H, K)

  MPMA_HOST_DEVICE int64_t segments() const { return (rows + segment - 1) / segment; }
};

// Rows of a segment: so many that there are fewer counters than entries.
inline int64_t slot_segment(int slots, int topk) {
  const int64_t least = int64_t{2} * slots / topk;
  return least > 128 ? least : 128;
}

struct SlotRangeLayout {
  int32_t* counter;

  SlotRangeLayout() = default;
  explicit MPMA_HOST_DEVICE SlotRangeLayout(SharedMemory& memory, int slots)
      : counter(memory.take<int32_t>(slots < kSlotRange ? slots : kSlotRange)) {}
};

// The rows and slots of one block.
struct SlotBlock {
  int head, first, count;  // slots
  int64_t segment, row, end;

  explicit MPMA_DEVICE SlotBlock(const BySlot& s)
      : head(static_cast<int>(block_x() / s.segments())), first(static_cast<int>(block_y()) * kSlotRange),
        count(s.slots - first < kSlotRange ? s.slots - first : kSlotRange), segment(block_x() % s.segments()),
        row(segment * s.segment), end(row + s.segment < s.rows ? row + s.segment : s.rows) {}
};

// A slot that is not in the bank, which no forward gives, is taken for its nearest: nothing is read out of bounds.
MPMA_DEVICE int slot_in_bank(int32_t slot, int slots) { return slot < 0 ? 0 : slot < slots ? slot : slots - 1; }

MPMA_KERNEL(128, 1)
count_by_slot_kernel(BySlot s) {
  SharedMemory memory = SharedMemory::this_block();
  const SlotRangeLayout layout(memory, s.slots);
  const SlotBlock b(s);
  for (int i = thread_index(); i < b.count; i += thread_count()) layout.counter[i] = 0;
  barrier();
  const auto topk = static_cast<uint32_t>(s.topk), entries = static_cast<uint32_t>(b.end - b.row) * topk;
  for (uint32_t i = thread_index(); i < entries; i += thread_count()) {
    const int64_t row = b.row + i / topk;
    const int slot = slot_in_bank(s.indices[(row * s.heads + b.head) * s.topk + i % topk], s.slots) - b.first;
    if (slot >= 0 && slot < b.count) atomic_add(layout.counter + slot, 1);
  }
  barrier();
  int32_t* counts = s.counts + (b.head * s.segments() + b.segment) * s.slots + b.first;
  for (int i = thread_index(); i < b.count; i += thread_count()) counts[i] = layout.counter[i];
}

// A thread a slot: what earlier segments have of it, and all segments together, which is left in starts.
MPMA_KERNEL(128, 1)
sum_segments_kernel(BySlot s) {
  const int64_t tiles = (s.slots + 127) / 128;
  const int64_t head = block_x() / tiles, slot = block_x() % tiles * 128 + thread_index();
  if (slot >= s.slots) return;
  int32_t total = 0;
  for (int64_t segment = 0; segment < s.segments(); ++segment) {
    int32_t& count = s.counts[(head * s.segments() + segment) * s.slots + slot];
    const int32_t own = count;
    count = total;
    total += own;
  }
  s.starts[head * (s.slots + 1) + slot] = total;
}

struct StartsLayout {
  int* of_warp;

  explicit MPMA_HOST_DEVICE StartsLayout(SharedMemory& memory) : of_warp(memory.take<int>(8)) {}
};

// A block a head: the slots' numbers of entries become where they begin.
MPMA_KERNEL(256, 1)
sum_slots_kernel(BySlot s) {
  SharedMemory memory = SharedMemory::this_block();
  const StartsLayout layout(memory);
  int32_t* starts = s.starts + block_x() * (s.slots + 1);
  int before = 0;
  for (int64_t first = 0; first < s.slots; first += thread_count()) {
    const int64_t slot = first + thread_index();
    int of_warp;
    int own = sum_before(slot < s.slots ? starts[slot] : 0, of_warp);
    if (lane_index() == 0) layout.of_warp[warp_index()] = of_warp;
    barrier();
    own += before;
    for (int i = 0; i < warp_count(); ++i) {
      if (i < warp_index()) own += layout.of_warp[i];
      before += layout.of_warp[i];
    }
    barrier();
    if (slot < s.slots) starts[slot] = own;
  }
  if (thread_index() == 0) starts[s.slots] = before;
}

MPMA_KERNEL(32, 1)
place_by_slot_kernel(BySlot s) {
  SharedMemory memory = SharedMemory::this_block();
  const SlotRangeLayout layout(memory, s.slots);
  const SlotBlock b(s);
  constexpr int kEach = kMostKept / kWarp;
  const int lane = lane_index();
  const int32_t* counts = s.counts + (b.head * s.segments() + b.segment) * s.slots + b.first;
  const int32_t* starts = s.starts + static_cast<int64_t>(b.head) * (s.slots + 1) + b.first;
  for (int i = lane; i < b.count; i += kWarp) layout.counter[i] = starts[i] + counts[i];
  warp_barrier();
  const auto read = [&](int64_t row, int32_t (&slot)[kEach]) {
    MPMA_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int j = i * kWarp + lane;
      slot[i] = j < s.topk && row < b.end ? s.indices[(row * s.heads + b.head) * s.topk + j] : 0;
    }
  };
  int32_t next[kEach];
  read(b.row, next);
  for (int64_t row = b.row; row < b.end; ++row) {
    int32_t slot[kEach];
    MPMA_UNROLL
    for (int i = 0; i < kEach; ++i) slot[i] = slot_in_bank(next[i], s.slots) - b.first;
    read(row + 1, next);
    MPMA_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int j = i * kWarp + lane;
      if (j >= s.topk || slot[i] < 0 || slot[i] >= b.count) continue;
      const int32_t place = layout.counter[slot[i]];
      layout.counter[slot[i]] = place + 1;
      s.places[(row * s.heads + b.head) * s.topk + j] = place;
    }
    warp_barrier();
  }
}

// Fills starts and places.
inline void launch_by_slot(const BySlot& s, void* stream) {
  const Grid grid{s.heads * s.segments(), (s.slots + kSlotRange - 1) / kSlotRange};
  const int shared = shared_bytes<SlotRangeLayout>(s.slots);
  launch<count_by_slot_kernel>({grid, 128, shared, stream}, s);
  launch<sum_segments_kernel>({{(s.slots + int64_t{127}) / 128 * s.heads}, 128, 0, stream}, s);
  launch<sum_slots_kernel>({{s.heads}, 256, shared_bytes<StartsLayout>(), stream}, s);
  launch<place_by_slot_kernel>({grid, 32, shared, stream}, s);
}

}  // namespace mpma::cuda
