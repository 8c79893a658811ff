// Sets of ids as hash tables at most half full: for a user's history they stay in L1, and building one takes a tenth of
// the time of sorting the list.
#pragma once

#include <stdint.h>

namespace seqrec_fast {

constexpr int64_t kNoId = -1;  // an empty place

// Places for n ids.
static inline int64_t id_places(int64_t n) {
  int64_t places = 16;
  while (places < 2 * n) places *= 2;
  return places;
}

// The first `bits` bits of a number that differs in many bits for ids that are close together: multiplication by 2^64 /
// golden ratio.
static inline __attribute__((always_inline)) int64_t spread_id(int64_t id, int bits) {
  return static_cast<int64_t>((static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - bits));
}

// Where the id is, or the empty place where it belongs.
static inline __attribute__((always_inline)) int64_t place_of_id(const int64_t* table, int64_t places, int64_t id) {
  int64_t place = spread_id(id, __builtin_ctzll(static_cast<uint64_t>(places)));
  while (table[place] != kNoId && table[place] != id) place = (place + 1) & (places - 1);
  return place;
}

// A table of many rows' sets does not stay in the caches. A filter of four bits a place does, and tells of seven ids in
// eight that they are not in the set.
static inline int64_t filter_words(int64_t places) { return places / 16; }
static inline __attribute__((always_inline)) int64_t filter_bit(int64_t places, int64_t id) {
  return spread_id(id, __builtin_ctzll(static_cast<uint64_t>(4 * places)));
}

}  // namespace seqrec_fast
