// Whole and partial registers under one name, and arrays converted to and from what their type is computed in.
#pragma once

#include "gemm.h"

namespace seqrec_fast::SEQREC_TIER {

template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;

template <bool kPartial, class P>
SEQREC_INLINE auto load_lanes(const P* p, int count) {
  if constexpr (kPartial)
    return load_first(p, count);
  else
    return load(p);
}
template <bool kPartial, class P, class V>
SEQREC_INLINE void store_lanes(P* p, int count, V v) {
  if constexpr (kPartial)
    store_first(p, count, v);
  else
    store(p, v);
}

template <class T>
SEQREC_INLINE void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, (int)(count - i), load_first(from + i, (int)(count - i)));
}

template <class T>
SEQREC_INLINE void widen(const T* from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// The inverse of widen: rounds to T.
template <class T, class S>
SEQREC_INLINE void narrow(const S* from, int64_t count, T* to) {
  constexpr int kWidth = Compute<T>::kWidth;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_first(to + i, (int)(count - i), load_first(from + i, (int)(count - i)));
}

// x as it comes back from an array of T.
template <class T>
SEQREC_INLINE Vector<T> rounded(Vector<T> x) {
  if constexpr (kIsHalf<T>) {
    T stored[kLanes];
    store(stored, x);
    return load(stored);
  } else {
    return x;
  }
}

}  // namespace seqrec_fast::SEQREC_TIER
