// Offsets of packed sequences made safe: whatever they hold, no sequence lies outside the rows and no two overlap.
#pragma once

#include "cuda/masked_attention.h"

namespace mpma::cuda {

struct OffsetsToClean {
  const int32_t* from[2];  // of queries and of keys, (count), in steps of `step`
  int64_t step[2];
  int64_t rows[2];
  int32_t* to[2];  // (count), contiguous
  int64_t count;
};

// One warp a block: a running maximum, clamped to the rows. The first negative ones count as 0.
MPMA_KERNEL(32, 1)
clean_offsets_kernel(OffsetsToClean o) {
  const bool of_keys = block_x() == 1;
  const int32_t* from = of_keys ? o.from[1] : o.from[0];
  int32_t* to = of_keys ? o.to[1] : o.to[0];
  const int64_t step = of_keys ? o.step[1] : o.step[0], rows = of_keys ? o.rows[1] : o.rows[0];
  int32_t before = 0;
  for (int64_t first = 0; first < o.count; first += kWarp) {
    const int64_t i = first + lane_index();
    int32_t x = i < o.count ? from[i * step] : 0;
    if (lane_index() == 0 && x < before) x = before;
    MPMA_UNROLL
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int32_t other = shuffle_up(x, distance);
      x = other > x ? other : x;
    }
    if (x > rows) x = static_cast<int32_t>(rows);
    before = shuffle(x, kWarp - 1);
    if (i < o.count) to[i] = x;
  }
}

inline void launch_clean_offsets(const OffsetsToClean& o, void* stream) {
  launch<clean_offsets_kernel>({{2}, kWarp, 0, stream}, o);
}

}  // namespace mpma::cuda
