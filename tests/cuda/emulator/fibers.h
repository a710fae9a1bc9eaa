// The threads of a block as fibers, and who runs when. A part of emulator.cpp.
#pragma once

#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 assembly"
#endif

// void emulator_switch(void** save, void* to): saves this stack in *save and goes on with `to`.
extern "C" void emulator_switch(void** save, void* to);
__asm__(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace mpma::cuda {

Position emulator_position;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("the emulator finds no address space");
  return static_cast<char*>(memory);
}

// Epochs count the blocks and their barriers through all launches, so that shadows need no clearing. A warp's epoch
// counts its own barriers within one of these.
uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;

struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
  int group;
};

struct Fiber {
  void* stack_pointer;
  bool done;
  int groups;  // of asynchronous copies, committed
  std::vector<Copy> copies;
};

// An operation of a warp: the last lane to come does it for all.
struct Lane {
  const void* in[3];
  void* out;
};
using Operation = void (*)(Lane*);
struct Warp {
  uint16_t epoch;
  int arrived;
  Operation operation;
  const char* name;
  Lane lanes[kWarp];
};

const char* kernel_name;
void (*kernel_body)(const void*);
const void* kernel_closure;
int threads, shared_limit;
Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kWarp];
std::vector<int> ready;
int live, at_barrier;
bool any_of_barrier, result_of_barrier;
int current = -1;  // the thread that runs, -1 on the host
void* host_stack;
char* const stacks = [] {
  char* all = map(kMaxThreads * kStackBytes);
  for (int t = 0; t < kMaxThreads; ++t) mprotect(all + t * kStackBytes, 4096, PROT_NONE);  // what overflows, faults
  return all;
}();
std::string violation;
const void* site;  // of the access or operation that is checked
uint64_t random_state = 1;

uint64_t draw(uint64_t below) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state % below;
}

Warp& warp() { return warps[current / kWarp]; }

// Of the name of launch<kernel>, the kernel's.
std::string kernel_of_launch() {
  const std::string name = kernel_name, begin = "kKernel = ", end = "; Arguments = ";
  const size_t from = name.find(begin);
  return from == std::string::npos ? name : name.substr(from + begin.size(), name.find(end) - from - begin.size());
}

// Where in the library `site` is: tests/cuda/emulation.py finds the line of the source.
std::string place(const void* site) {
  Dl_info library;
  if (!site || !dladdr(site, &library)) return "";
  char text[32];
  const auto offset = static_cast<const char*>(site) - static_cast<const char*>(library.dli_fbase);
  std::snprintf(text, sizeof text, " [at 0x%zx]", static_cast<size_t>(offset));
  return text;
}

// Leaves the launch for good: fibers are dropped where they stand.
[[noreturn]] void fail(const std::string& what) {
  const Position& p = emulator_position;
  violation = "kernel " + kernel_of_launch() + ", block (" + std::to_string(p.block[0]) + ", " +
              std::to_string(p.block[1]) + ", " + std::to_string(p.block[2]) + ")" +
              (current >= 0 ? ", thread " + std::to_string(current) + ": " + what + place(site) : ": " + what);
  void* dropped;
  emulator_switch(&dropped, host_stack);
  __builtin_unreachable();
}

// Goes on with a thread drawn from those that can run; comes back when this one is drawn again.
void reschedule() {
  if (ready.empty()) {
    if (live == 0) {
      void* dropped;
      emulator_switch(&dropped, host_stack);
    }
    std::string what = "not all threads reach the same point: " + std::to_string(threads - live) + " have ended, " +
                       std::to_string(at_barrier) + " wait at a barrier of the block";
    for (int w = 0; w < threads / kWarp; ++w)
      if (warps[w].arrived)
        what += ", " + std::to_string(warps[w].arrived) + " of warp " + std::to_string(w) + " at " + warps[w].name;
    current = -1;
    fail(what);
  }
  const size_t drawn = draw(ready.size());
  const int next = ready[drawn];
  ready[drawn] = ready.back();
  ready.pop_back();
  const int previous = current;
  current = emulator_position.thread = next;
  if (next != previous) emulator_switch(&fibers[previous].stack_pointer, fibers[next].stack_pointer);
}

void start_fiber() {
  kernel_body(kernel_closure);
  Fiber& fiber = fibers[current];
  if (!fiber.copies.empty()) fail("a thread ends before its asynchronous copies were waited for");
  fiber.done = true;
  --live;
  reschedule();
  __builtin_unreachable();
}

// A warp's operation. in and out stay valid until the lane goes on.
void together(
    const char* name, Operation operation, const void* in0, void* out, const void* in1 = nullptr,
    const void* in2 = nullptr) {
  if (current < 0) throw std::runtime_error("an operation of a warp outside a kernel");
  Warp& w = warp();
  if (w.arrived == 0) {
    w.operation = operation;
    w.name = name;
  } else if (w.operation != operation) {
    fail(std::string("not all lanes reach the same operation of the warp: ") + w.name + " and " + name);
  }
  w.lanes[current % kWarp] = {{in0, in1, in2}, out};
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    operation(w.lanes);
    const int first = current / kWarp * kWarp;
    for (int lane = 0; lane < kWarp; ++lane)
      if (first + lane != current) ready.push_back(first + lane);
  } else {
    reschedule();
  }
}

template <class T>
const T& in(const Lane& lane, int i = 0) {
  return *static_cast<const T*>(lane.in[i]);
}
template <class T>
T& out(const Lane& lane) {
  return *static_cast<T*>(lane.out);
}

}  // namespace

}  // namespace mpma::cuda
