// Shared and global memory, and the check of every access. A part of emulator.cpp.
#pragma once

#include <algorithm>

#include "fibers.h"

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace mpma::cuda {

namespace {

constexpr size_t kSharedBytes = 512 << 10;  // twice what any device has: pieces lie apart
constexpr size_t kArenaBytes = size_t{1} << 36;
constexpr size_t kRedZone = 4096;

enum class Access { kRead, kWrite, kAtomic };

// Who last touched a byte. Beside numbers of threads, `who` says: several lanes of one warp, several warps, atomics of one
// warp or of several, an asynchronous copy under way.
struct Cell {
  uint32_t epoch;
  uint16_t warp_epoch, who;
};
constexpr uint16_t kLanes = 0x2000, kAtomics = 0x4000, kWarps = 0x8000, kAtomicWarps = 0x8001, kCopy = 0x8002;

char* const shared = map(kSharedBytes);
Cell* const shared_writes = reinterpret_cast<Cell*>(map(kSharedBytes * sizeof(Cell)));
Cell* const shared_reads = reinterpret_cast<Cell*>(map(kSharedBytes * sizeof(Cell)));
char* const shared_taken = map(kSharedBytes);
struct Piece {
  int offset;
  size_t bytes;
};
std::vector<Piece> pieces;

struct Region {
  char* begin;
  size_t bytes;
  Cell *writes, *reads;  // nullptr for an input
};
char* const arena = map(kArenaBytes);
std::vector<Region> regions;  // in the order of addresses
const Region* last_region = nullptr;
bool host_memory_too = false;  // PyTorch's own, of which only the alignment is checked

std::string describe(const char* kind, Access access, size_t bytes) {
  const char* name = access == Access::kRead ? "read of " : access == Access::kWrite ? "write of " : "atomic access of ";
  return name + std::to_string(bytes) + " bytes of " + kind + " memory ";
}

// Whether `cell` came before the thread that runs now, because of a barrier or because it is its own.
bool ordered(const Cell& cell, uint16_t warp_epoch) {
  if (cell.epoch != epoch || cell.who == current) return true;
  if (cell.who >= kWarps) return false;
  const int of_warp = cell.who & (kLanes | kAtomics) ? cell.who & 0x3F : cell.who / kWarp;
  return of_warp == current / kWarp && cell.warp_epoch < warp_epoch;
}

// The last piece taken that holds a byte.
const Piece& piece_at(size_t at) {
  const auto holds = [&](const Piece& piece) {
    return at >= size_t{2} * piece.offset && at < size_t{2} * piece.offset + piece.bytes;
  };
  return *std::find_if(pieces.rbegin(), pieces.rend(), holds);
}

void touch(const char* kind, size_t offset, Cell* writes, Cell* reads, size_t bytes, Access access) {
  const uint16_t warp_epoch = warp().epoch, me = static_cast<uint16_t>(current), my_warp = me / kWarp;
  const bool is_shared = writes == shared_writes + offset;
  const auto where = [&](size_t i) {
    const std::string of_piece = is_shared ? "of the piece at " + std::to_string(piece_at(offset + i).offset) + " " : "";
    return "at byte " + std::to_string(offset + i - (is_shared ? 2 * piece_at(offset + i).offset : 0)) + " " + of_piece;
  };
  for (size_t i = 0; i < bytes; ++i) {
    Cell& w = writes[i];
    Cell& r = reads[i];
    if (w.who == kCopy && w.epoch >= block_epoch)
      fail(describe(kind, access, bytes) + where(i) + "that an asynchronous copy still writes");
    const bool atomics = access == Access::kAtomic && (w.who & kAtomics || w.who == kAtomicWarps);
    if (!is_shared && !atomics && w.epoch >= launch_epoch && w.epoch < block_epoch)
      fail(describe(kind, access, bytes) + where(i) + "that another block writes");
    if (!is_shared && access != Access::kRead && r.epoch >= launch_epoch && r.epoch < block_epoch)
      fail(describe(kind, access, bytes) + where(i) + "that another block reads");
    if (!atomics && !ordered(w, warp_epoch))
      fail("race: " + describe(kind, access, bytes) + where(i) + "with the write of another thread");
    if (access != Access::kWrite && (is_shared ? w.epoch < block_epoch : w.epoch == 0))
      fail(describe(kind, access, bytes) + where(i) + "that was never written");
    if (access == Access::kRead) {
      // Earlier reads of the same warp before its last barrier need no memory: whatever they race with, this one does.
      const bool fresh = r.epoch != epoch || r.who == me || ordered(r, warp_epoch);
      const bool same_warp = r.who < kWarps && (r.who & kLanes ? r.who & 0x3F : r.who / kWarp) == my_warp;
      r = {epoch, warp_epoch, fresh ? me : same_warp ? static_cast<uint16_t>(kLanes | my_warp) : kWarps};
    } else {
      if (!ordered(r, warp_epoch))
        fail("race: " + describe(kind, access, bytes) + where(i) + "with the read of another thread");
      if (access == Access::kWrite)
        w = {epoch, warp_epoch, me};
      else
        w = {epoch, warp_epoch,
             !atomics || w.epoch != epoch || w.who == (kAtomics | my_warp) ? static_cast<uint16_t>(kAtomics | my_warp)
                                                                           : kAtomicWarps};
    }
  }
}

const Region* find_region(const char* address) {
  if (last_region && address >= last_region->begin && address < last_region->begin + last_region->bytes)
    return last_region;
  for (const Region& region : regions)
    if (address >= region.begin && address < region.begin + region.bytes) return last_region = &region;
  return nullptr;
}

std::string nearest_region(const char* address) {
  const Region* near = nullptr;
  for (const Region& region : regions)
    if (region.begin <= address) near = &region;
  if (!near) return "outside every allocation";
  return "outside the allocations, at byte " + std::to_string(address - near->begin) + " of one of " +
         std::to_string(near->bytes);
}

void check(const void* pointer, size_t bytes, size_t alignment, Access access) {
  if (current < 0) return;  // the host's own
  const auto address = static_cast<const char*>(pointer);
  if (address >= stacks && address < stacks + kMaxThreads * kStackBytes) return;
  const bool misaligned = reinterpret_cast<uintptr_t>(pointer) % alignment != 0;
  if (address >= shared && address < shared + kSharedBytes) {
    const size_t offset = address - shared;
    if (misaligned) fail(describe("shared", access, bytes) + "that is misaligned");
    for (size_t i = 0; i < bytes; ++i)
      if (offset + i >= kSharedBytes || !shared_taken[offset + i])
        fail(describe("shared", access, bytes) + "outside the pieces that were taken");
    touch("shared", offset, shared_writes + offset, shared_reads + offset, bytes, access);
    return;
  }
  if (const Region* region = find_region(address)) {
    const size_t offset = address - region->begin;
    if (misaligned) fail(describe("global", access, bytes) + "that is misaligned");
    if (offset + bytes > region->bytes) fail(describe("global", access, bytes) + nearest_region(address));
    if (region->writes)
      touch("global", offset, region->writes + offset, region->reads + offset, bytes, access);
    else if (access != Access::kRead)
      fail(describe("global", access, bytes) + "that is an input");
    return;
  }
  if (address >= __ehdr_start && address < _end && access == Access::kRead) return;  // constants
  if (host_memory_too) {
    if (misaligned) fail(describe("global", access, bytes) + "that is misaligned");
    return;
  }
  fail(
      describe("global", access, bytes) +
      (address >= arena && address < arena + kArenaBytes ? nearest_region(address) : "at no device address"));
}

}  // namespace

}  // namespace mpma::cuda
