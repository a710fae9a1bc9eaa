// A head's keys and values, a tile at a time. While one tile is worked on the next one is copied; tiles without a key
// that takes part are left out.
#pragma once

#include "cuda/masked_attention.h"

namespace mpma::cuda {

// For all threads of a block. `layout` has the tiles key(buffer) and value(buffer) of Shape::kKeys rows.
template <class T, class Layout>
class KeyTiles {
 public:
  static constexpr int kKeys = Layout::Shape::kKeys;
  using Real = RealRows<kKeys>;

  // Begins to copy the first one.
  MPMA_DEVICE KeyTiles(const Attention<T>& a, const Layout& layout, const Place& place, const Extent& keys)
      : a_(a), layout_(layout), item_(place.item), keys_(keys), key_(a.key.at(place.item, keys.start, place.head)),
        value_(a.value.at(place.item, keys.start, place.head)) {
    go_to(0);
    load(0);
  }

  // Of those that are left.
  MPMA_DEVICE bool any() const { return first_ < keys_.length; }

  // f(the tile's first key, which of its keys take part, the buffer where it lies) for each.
  template <class F>
  MPMA_DEVICE void for_each(const F& f) {
    for (int buffer = 0; any(); buffer = 1 - buffer) {
      cp_async_wait<0>();
      barrier();  // this tile is there, and everybody is done with the one before
      const int first = first_;
      const Real real = real_;
      go_to(first + kKeys);
      load(1 - buffer);
      f(first, real, buffer);
    }
    cp_async_wait<0>();  // what else was being copied, where there was no key
  }

 private:
  // The next one from key `first` on.
  MPMA_DEVICE void go_to(int first) {
    for (first_ = first; any(); first_ += kKeys) {
      real_ = real_keys<kKeys>(a_, item_, keys_, first_);
      if (real_ != 0) break;
    }
  }

  MPMA_DEVICE void load(int buffer) const {
    if (!any()) return;
    const int width = a_.sizes.width, thread = thread_index(), threads = thread_count();
    load_rows(
        layout_.key(buffer), key_ + first_ * a_.key.row, a_.key.row, real_, width, a_.aligned, thread, threads);
    load_rows(
        layout_.value(buffer), value_ + first_ * a_.value.row, a_.value.row, real_, width, a_.aligned, thread, threads);
    cp_async_commit();
  }

  const Attention<T>& a_;
  const Layout& layout_;
  int item_;
  Extent keys_;
  const T *key_, *value_;
  int first_;
  Real real_;
};

}  // namespace mpma::cuda
