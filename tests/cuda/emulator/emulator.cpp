// The machine behind emulator.h: barriers, operations of warps, copies, launches. Compiled without -fsanitize=thread; it
// defines the functions that the sanitiser's instrumentation calls.
#include "emulator.h"

#include "device_memory.h"
#include "fibers.h"

namespace mpma::cuda {

// --- Barriers and exchanges ------------------------------------------------------------------------------------------

void barrier() { barrier_any(false); }

bool barrier_any(bool x) {
  any_of_barrier |= x;
  if (++at_barrier < threads) {
    reschedule();
    return result_of_barrier;
  }
  at_barrier = 0;
  result_of_barrier = any_of_barrier;
  any_of_barrier = false;
  ++epoch;
  for (int w = 0; w < threads / kWarp; ++w) warps[w].epoch = 0;
  for (int t = 0; t < threads; ++t)
    if (t != current) ready.push_back(t);
  return result_of_barrier;
}

void warp_barrier() {
  site = __builtin_return_address(0);
  together("warp_barrier", [](Lane*) { ++warp().epoch; }, nullptr, nullptr);
}

namespace {

// Every lane i gets the value of lane kFrom(i, by), `by` being its own.
template <int (*kFrom)(int, int)>
uint64_t exchange(const char* name, uint64_t x, int by) {
  uint64_t y;
  together(
      name,
      [](Lane* lane) {
        for (int i = 0; i < kWarp; ++i) out<uint64_t>(lane[i]) = in<uint64_t>(lane[kFrom(i, in<int>(lane[i], 1))]);
      },
      &x, &y, &by);
  return y;
}

int across(int lane, int by) { return (lane ^ by) % kWarp; }
int at(int, int by) { return by & (kWarp - 1); }
int below(int lane, int by) { return lane < by ? lane : lane - by; }

}  // namespace

uint64_t exchange_xor(uint64_t x, int lanes) {
  site = __builtin_return_address(0);
  return exchange<across>("shuffle_xor", x, lanes);
}
uint64_t exchange_from(uint64_t x, int from) {
  site = __builtin_return_address(0);
  return exchange<at>("shuffle", x, from);
}
uint64_t exchange_up(uint64_t x, int lanes) {
  site = __builtin_return_address(0);
  return exchange<below>("shuffle_up", x, lanes);
}

uint32_t ballot(bool x) {
  site = __builtin_return_address(0);
  uint32_t y;
  together(
      "ballot",
      [](Lane* lane) {
        uint32_t votes = 0;
        for (int i = 0; i < kWarp; ++i) votes |= static_cast<uint32_t>(in<bool>(lane[i])) << i;
        for (int i = 0; i < kWarp; ++i) out<uint32_t>(lane[i]) = votes;
      },
      &x, &y);
  return y;
}

int32_t atomic_add(int32_t* at, int32_t x) {
  site = __builtin_return_address(0);
  check(at, 4, 4, Access::kAtomic);
  const int32_t before = *at;
  *at += x;
  return before;
}

namespace {

template <class T>
T load_vector(const void* from) {
  check(from, sizeof(T), sizeof(T), Access::kRead);
  return *static_cast<const T*>(from);
}
template <class T>
void store_vector(void* to, const T& x) {
  check(to, sizeof(T), sizeof(T), Access::kWrite);
  *static_cast<T*>(to) = x;
}

}  // namespace

Bytes8 load_8(const void* from) {
  site = __builtin_return_address(0);
  return load_vector<Bytes8>(from);
}
void store_8(void* to, const Bytes8& x) {
  site = __builtin_return_address(0);
  store_vector(to, x);
}
Bytes16 load_16(const void* from) {
  site = __builtin_return_address(0);
  return load_vector<Bytes16>(from);
}
void store_16(void* to, const Bytes16& x) {
  site = __builtin_return_address(0);
  store_vector(to, x);
}

// --- Conversions -----------------------------------------------------------------------------------------------------

float half_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3FF;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), bits_float(sign | 0x3F800000));
  return bits_float(sign | (exponent == 31 ? 0xFFu : exponent + 112) << 23 | fraction << 13);
}

uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000)  // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(bits_float(magnitude), 24))));
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

// --- Asynchronous copies ---------------------------------------------------------------------------------------------

void cp_async_16(void* to, const void* from, bool real) {
  site = __builtin_return_address(0);
  const auto target = static_cast<char*>(to);
  if (target < shared || target >= shared + kSharedBytes) fail("cp_async_16 to what is not shared memory");
  check(to, 16, 16, Access::kWrite);
  if (real) check(from, 16, 16, Access::kRead);
  std::memset(to, 0xFF, 16);  // what is read too early is a NaN
  for (int i = 0; i < 16; ++i) shared_writes[target - shared + i].who = kCopy;
  Fiber& fiber = fibers[current];
  fiber.copies.push_back({target, real ? static_cast<const char*>(from) : nullptr, fiber.groups});
}

void cp_async_commit() { ++fibers[current].groups; }

void cp_async_wait_groups(int groups) {
  Fiber& fiber = fibers[current];
  const auto waited = [&](const Copy& copy) { return copy.group < fiber.groups - groups; };
  for (const Copy& copy : fiber.copies) {
    if (!waited(copy)) continue;
    if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
    for (int i = 0; i < 16; ++i)
      shared_writes[copy.to - shared + i] = {epoch, warp().epoch, static_cast<uint16_t>(current)};
  }
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), waited), fiber.copies.end());
}

// --- Tensor cores ----------------------------------------------------------------------------------------------------

namespace {

template <bool kTransposed>
void load_matrices(Lane* lane) {
  for (int m = 0; m < 4; ++m) {
    const uint16_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<const uint16_t*>(lane[8 * m + i].in[0]);
    for (int l = 0; l < kWarp; ++l) {
      const int i = l / 4, j = l % 4 * 2;
      const uint32_t low = kTransposed ? rows[j][i] : rows[i][j], high = kTransposed ? rows[j + 1][i] : rows[i][j + 1];
      out<Registers4>(lane[l]).r[m] = low | high << 16;
    }
  }
}

// Rows are checked by the lane that names them: it counts as their reader.
template <bool kTransposed>
Registers4 load_matrices_together(const void* row) {
  const auto address = static_cast<const char*>(row);
  if (address < shared || address >= shared + kSharedBytes) fail("ldmatrix of what is not shared memory");
  check(row, 16, 16, Access::kRead);
  Registers4 m;
  together(kTransposed ? "ldmatrix_transposed" : "ldmatrix", load_matrices<kTransposed>, row, &m);
  return m;
}

// The power of two at or below |x|, 2^-126 for what is smaller.
double magnitude_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits &= uint64_t{0x7FF} << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return std::max(power, 0x1p-126);
}

// x without what lies below `quantum`, a power of two; |x| is less than 2^52 of it.
double cut_off(double x, double quantum) {
  const double size = std::abs(x), nearest = size + quantum * 0x1p52 - quantum * 0x1p52;
  return std::copysign(nearest - (nearest > size ? quantum : 0.0), x);
}

// c += a b (kDepth, 8), as the A100's tensor cores add kTogether products at once: each of them is exact; where they are
// added to the sum so far, what is more than a bit below float32's last of the largest of them is cut off, and so is what
// the new sum has beyond float32. (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science, 2021;
// Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv 2512.07004.)
template <int kTogether, int kDepth>
void add_row(float (&c)[8], const float (&a)[kDepth], const float (&b)[kDepth][8]) {
  for (int first = 0; first < kDepth; first += kTogether) {
    double term[kTogether + 1][8], whole[8], largest[8], sum[8] = {};
    for (int j = 0; j < 8; ++j) whole[j] = term[kTogether][j] = c[j], largest[j] = std::abs(term[kTogether][j]);
    for (int k = 0; k < kTogether; ++k)
      for (int j = 0; j < 8; ++j) {
        term[k][j] = static_cast<double>(a[first + k]) * b[first + k][j];
        whole[j] += term[k][j];
        largest[j] = std::max(largest[j], std::abs(term[k][j]));
      }
    for (int j = 0; j < 8; ++j) largest[j] = magnitude_of(largest[j]);
    for (const auto& x : term)
      for (int j = 0; j < 8; ++j) sum[j] += cut_off(x[j], largest[j] * 0x1p-24);
    for (int j = 0; j < 8; ++j) sum[j] = cut_off(sum[j], magnitude_of(sum[j]) * 0x1p-23);
    for (int j = 0; j < 8; ++j) c[j] = static_cast<float>(std::isfinite(whole[j]) ? sum[j] : whole[j]);
  }
}

template <int kTogether, int kDepth>
void multiply_fragments(Lane* lane, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float c[16][8];
  const auto each = [&](auto&& f) {
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) f(out<Sum>(lane[l]).value[i], c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  };
  each([](float value, float& at) { at = value; });
  for (int i = 0; i < 16; ++i) add_row<kTogether>(c[i], a[i], b);
  each([](float& value, float at) { value = at; });
}

template <class T>
void multiply_halves(Lane* lane) {
  float a[16][16], b[16][8];
  const auto value = [](uint32_t r, int i) { return to_float(T{static_cast<uint16_t>(r >> 16 * i)}); };
  for (int l = 0; l < kWarp; ++l)
    for (int j = 0; j < 2; ++j) {
      const int row = l / 4, column = l % 4 * 2 + j;
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][column + i / 2 * 8] = value(in<Registers4>(lane[l]).r[i], j);
      for (int i = 0; i < 2; ++i) b[column + i * 8][row] = value(in<Registers2>(lane[l], 1).r[i], j);
    }
  multiply_fragments<8>(lane, a, b);
}

void multiply_tf32(Lane* lane) {
  float a[16][8], b[8][8];
  const auto value = [](uint32_t r) { return bits_float(r & ~0x1FFFu); };  // the other bits are not looked at
  for (int l = 0; l < kWarp; ++l) {
    const int row = l / 4, column = l % 4;
    for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][column + i / 2 * 4] = value(in<Registers4>(lane[l]).r[i]);
    for (int i = 0; i < 2; ++i) b[column + i * 4][row] = value(in<Registers2>(lane[l], 1).r[i]);
  }
  multiply_fragments<4>(lane, a, b);
}

}  // namespace

Registers4 ldmatrix(const void* row) {
  site = __builtin_return_address(0);
  return load_matrices_together<false>(row);
}
Registers4 ldmatrix_transposed(const void* row) {
  site = __builtin_return_address(0);
  return load_matrices_together<true>(row);
}

template <>
void mma<Bfloat16>(Sum& c, const Registers4& a, const Registers2& b) {
  together("mma of bfloat16", multiply_halves<Bfloat16>, &a, &c, &b);
}
template <>
void mma<Half>(Sum& c, const Registers4& a, const Registers2& b) {
  together("mma of half", multiply_halves<Half>, &a, &c, &b);
}
void mma_tf32(Sum& c, const Registers4& a, const Registers2& b) { together("mma_tf32", multiply_tf32, &a, &c, &b); }

// --- Shared memory and launches --------------------------------------------------------------------------------------

char* shared_start() { return shared; }

void* shared_piece(int offset, size_t bytes) {
  char* piece = shared + 2 * static_cast<size_t>(offset);
  for (const Piece& known : pieces)
    if (known.offset == offset && known.bytes >= bytes) return piece;
  if (offset + bytes > static_cast<size_t>(shared_limit))
    fail("pieces of shared memory take " + std::to_string(offset + bytes) + " bytes and the launch gives " +
         std::to_string(shared_limit));
  std::memset(shared_taken + 2 * offset, 1, bytes);
  pieces.push_back({offset, bytes});
  return piece;
}

void emulator_run(
    const char* name, int64_t x, int64_t y, int64_t z, int block_threads, int shared_bytes, void (*body)(const void*),
    const void* closure) {
  if (block_threads % kWarp != 0 || block_threads < kWarp || block_threads > kMaxThreads)
    throw std::runtime_error("a block must have whole warps, up to 1024 threads");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("a block has at most 227 KB of shared memory");
  kernel_name = name, kernel_body = body, kernel_closure = closure, threads = block_threads, shared_limit = shared_bytes;
  launch_epoch = epoch + 1;
  std::vector<int64_t> order(x * y * z);
  for (size_t i = 0; i < order.size(); ++i) {  // shuffled as it grows
    const size_t j = draw(i + 1);
    order[i] = order[j];
    order[j] = static_cast<int64_t>(i);
  }
  violation.clear();
  for (int64_t block : order) {
    emulator_position = {0, threads, {block % x, block / x % y, block / x / y}, {x, y, z}};
    block_epoch = ++epoch;
    for (const Piece& piece : pieces) std::memset(shared_taken + 2 * piece.offset, 0, piece.bytes);
    pieces.clear();
    ready.clear();
    live = threads;
    at_barrier = 0;
    any_of_barrier = false;
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.done = false;
      fiber.groups = 0;
      fiber.copies.clear();
      // Stacks begin at different offsets, or they would share a few sets of the caches.
      char* top = stacks + (t + 1) * kStackBytes - t % 64 * 1088;
      auto slot = reinterpret_cast<void**>(top) - 8;
      slot[6] = reinterpret_cast<void*>(start_fiber);
      slot[7] = nullptr;
      fiber.stack_pointer = slot;
      ready.push_back(t);
      if (t % kWarp == 0) warps[t / kWarp].epoch = 0, warps[t / kWarp].arrived = 0;
    }
    const size_t drawn = draw(ready.size());
    current = emulator_position.thread = ready[drawn];
    ready[drawn] = ready.back();
    ready.pop_back();
    emulator_switch(&host_stack, fibers[current].stack_pointer);
    current = -1;
    if (!violation.empty()) throw std::runtime_error(violation);
  }
  ++epoch;
}

}  // namespace mpma::cuda

using mpma::cuda::Access;
using mpma::cuda::check;

extern "C" {

// --- Global memory ---------------------------------------------------------------------------------------------------

void* mpma_emulator_allocate(int64_t bytes, int kind) {
  using namespace mpma::cuda;
  char* begin = arena + kRedZone;
  size_t at = 0;
  for (; at < regions.size(); ++at) {  // the first gap that is large enough
    if (begin + bytes + kRedZone <= regions[at].begin) break;
    begin = arena + (regions[at].begin + regions[at].bytes - arena + kRedZone + 255) / 256 * 256;
  }
  if (begin + bytes + kRedZone > arena + kArenaBytes) return nullptr;
  Region region = {begin, static_cast<size_t>(bytes), nullptr, nullptr};
  if (kind != 0) {
    region.writes = reinterpret_cast<Cell*>(map(std::max<size_t>(1, 2 * bytes * sizeof(Cell))));
    region.reads = region.writes + bytes;
    if (kind == 2) std::fill(region.writes, region.writes + bytes, Cell{1, 0, 0});
    if (kind == 1) std::memset(begin, 0xFF, bytes);
  }
  regions.insert(regions.begin() + at, region);
  last_region = nullptr;
  return begin;
}

void mpma_emulator_free(void* memory) {
  using namespace mpma::cuda;
  const auto at = std::find_if(regions.begin(), regions.end(), [&](const Region& r) { return r.begin == memory; });
  if (at == regions.end()) return;
  if (at->writes) munmap(at->writes, std::max<size_t>(1, 2 * at->bytes * sizeof(Cell)));
  regions.erase(at);
  last_region = nullptr;
}

void mpma_emulator_take_host_memory() { mpma::cuda::host_memory_too = true; }

void mpma_emulator_seed(uint64_t seed) { mpma::cuda::random_state = seed * 2 + 1; }

// --- What the instrumentation calls ----------------------------------------------------------------------------------

#define MPMA_CHECK(BYTES, ALIGNMENT, ACCESS)                        \
  {                                                                 \
    mpma::cuda::site = __builtin_return_address(0);                 \
    check(p, BYTES, ALIGNMENT, Access::ACCESS);                     \
  }
#define MPMA_ACCESS(N)                                              \
  void __tsan_read##N(void* p) MPMA_CHECK(N, N, kRead)              \
  void __tsan_write##N(void* p) MPMA_CHECK(N, N, kWrite)            \
  void __tsan_unaligned_read##N(void* p) MPMA_CHECK(N, 1, kRead)    \
  void __tsan_unaligned_write##N(void* p) MPMA_CHECK(N, 1, kWrite)
MPMA_ACCESS(1)
MPMA_ACCESS(2)
MPMA_ACCESS(4)
MPMA_ACCESS(8)
MPMA_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) MPMA_CHECK(bytes, 1, kRead)
void __tsan_write_range(void* p, size_t bytes) MPMA_CHECK(bytes, 1, kWrite)
#undef MPMA_ACCESS
#undef MPMA_CHECK
// Counters of references, on the host.
int __tsan_atomic32_fetch_add(volatile int* at, int by, int) { return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
