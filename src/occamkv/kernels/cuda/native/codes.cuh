// Codes and metadata as the registers of the tensor core: one logical operation for two codes.
#pragma once
#include "shared.cuh"

namespace occam {

// WORDS words of a lane, stored in chunks of 4, then 2, then 1 word for each of 32 lanes.
template <int WORDS>
OKV_DEVICE void load_words(u32 *to, const u8 *from, int lane) {
#pragma unroll
  for (int i = 0; i < WORDS / 4; i++) load<4>(to + 4 * i, from + 512 * i + 16 * lane);
  if constexpr (WORDS & 2) load<2>(to + WORDS / 4 * 4, from + 128 * (WORDS / 4 * 4) + 8 * lane);
  if constexpr (WORDS & 1) load<1>(to + WORDS / 2 * 2, from + 128 * (WORDS / 2 * 2) + 4 * lane);
}

// The codes of 32 tokens that one lane holds. `low` has the registers a0 and a1 (K) or a0 and a2 (V) of a tile
// product, `high` the other two; `step` is the half of a block of 32 channels, `tile` the half of the 32 tokens.
template <int BITS>
struct Codes;

struct Quad {
  half2 low[2], high[2];
};

template <>
struct Codes<2> {
  u32 words[2 * BLOCKS];

  OKV_DEVICE void read(const u8 *from, int lane) { load_words<2 * BLOCKS>(words, from, lane); }

  template <int STEP>
  OKV_DEVICE Quad quad(int block, int tile) const {
    constexpr u32 LOW = 0x00030003u << (4 * STEP), HIGH = 0x000c000cu << (4 * STEP);
    const u32 x = words[2 * block + tile], y = x >> 8;
    return {{x & LOW, y & LOW}, {x & HIGH, y & HIGH}};
  }
};

template <>
struct Codes<4> {
  u32 words[4 * BLOCKS];

  OKV_DEVICE void read(const u8 *from, int lane) { load_words<4 * BLOCKS>(words, from, lane); }

  template <int STEP>
  OKV_DEVICE Quad quad(int block, int tile) const {
    constexpr u32 LOW = 0x000f000fu, HIGH = 0x00f000f0u;
    const u32 x = words[4 * block + 2 * STEP + tile], y = x >> 8;
    return {{x & LOW, y & LOW}, {x & HIGH, y & HIGH}};
  }
};

template <>
struct Codes<3> {
  u32 words[2 * BLOCKS], bits[BLOCKS];

  OKV_DEVICE void read(const u8 *from, int lane) {
    load_words<2 * BLOCKS>(words, from, lane);
    load_words<BLOCKS>(bits, from + 256 * BLOCKS, lane);
  }

  // The third bits go where the neighbours of a 2-bit field were: bits 2, 4, 6, 8.
  template <int STEP>
  OKV_DEVICE Quad quad(int block, int tile) const {
    constexpr u32 LOW = 0x00070007u << (4 * STEP), HIGH = 0x001c001cu << (4 * STEP);
    constexpr u32 EVEN = 0x00330033u, ODD = 0x00cc00ccu;
    const u32 third = bits[block], x = words[2 * block + tile], y = x >> 8;
    const u32 of_x = tile ? third << 1 : third >> 7, of_y = tile ? third << 2 : third >> 6;
    return {{merge<EVEN>(x, of_x) & LOW, merge<EVEN>(y, of_y) & LOW},
            {merge<ODD>(x, of_x) & HIGH, merge<ODD>(y, of_y) & HIGH}};
  }

  template <u32 FIRST>
  OKV_DEVICE static u32 merge(u32 x, u32 third) {
    return (x & FIRST) | (third & ~FIRST);
  }
};

// 8-bit metadata: two of the four bytes of a word, as float16. A scale is 1 / 256 of the float8 it was; a minimum
// still lies at 1024 + 128 above its int8.
template <int ODD>
OKV_DEVICE half2 small_scale(u32 word) {
  return ODD ? (word & 0xff00ff00u) >> 1 : (word & 0x00ff00ffu) << 7;
}

template <int ODD>
OKV_DEVICE half2 small_minimum(u32 word) {
  return ((ODD ? word >> 8 : word) & 0x00ff00ffu) ^ 0x64806480u;
}

// (x - 1152) * 2 ** EXPONENT for such a minimum
template <int EXPONENT>
OKV_DEVICE half2 centred(half2 minimum) {
  constexpr half2 OFFSET = both(0x8080u | (u32)(25 + EXPONENT) << 10);
  return multiply_add(minimum, two_to_the(EXPONENT), OFFSET);
}

// Scales (or minimums) of K for 32 channels, as lane p of four holds them: half2 k has channels 8 k + 2 p, + 1. Of V the
// same for 32 tokens and one group: half2 k has tokens 8 k + 2 p, + 1.
struct Metadata {
  half2 of[4];

  OKV_DEVICE Metadata(const void *section, int block, int p) { load<4>(of, (const u8 *)section + 64 * block + 16 * p); }
};

OKV_DEVICE void store_pair(u32 *to, u32 first, u32 second) {
  const u32 words[2] = {first, second};
  store<2>(to, words);
}

// Make 8-bit metadata of a warp's tokens, from subgroup `number` of a page on, as wide as 16-bit metadata is, all lanes
// together. Then scales of K are 1 / 256 of what they were, without the record's factor, and minimums of K are in units of
// scale / 16, times 2 ** code_shift of step 0.
OKV_DEVICE void widen(const Page &page, int number, int lane, Wide *to) {
  constexpr int K_WORDS = WIDTH / 4, V_WORDS = 8 * V_GROUPS;
  warp_barrier();
#pragma unroll
  for (int i = lane; i < PARTS * K_WORDS; i += 32) {
    const int part = i / K_WORDS, word = i % K_WORDS;
    const u8 *from = page.records + (number + part) / SUBGROUPS * RECORD_BYTES + 4 * word;
    u32 scale, minimum;
    load<1>(&scale, from + K_SCALE), load<1>(&minimum, from + K_MINIMUM);
    store_pair(to[part].k_scale + 2 * word, small_scale<0>(scale), small_scale<1>(scale));
    half2 *k_minimum = to[part].k_minimum + word / 2 * 4 + word % 2;  // half2 0, 2, 1, 3: the order of a tile's factor
    k_minimum[0] = centred<code_shift(K_BITS, 0, 0)>(small_minimum<0>(minimum));
    k_minimum[2] = centred<code_shift(K_BITS, 0, 1)>(small_minimum<1>(minimum));
  }
#pragma unroll
  for (int i = lane; i < PARTS * V_WORDS; i += 32) {
    const int part = i / V_WORDS, word = i % V_WORDS, record = (number + part) / SUBGROUPS;
    const u8 *from = page.records + record * RECORD_BYTES + (number + part) % SUBGROUPS * V_SUBGROUP_META + 4 * word;
    const half2 v_super = both((page.supers[record] >> 16) + ((u32)SCALE_EXPONENT << 10));  // a power of two
    u32 scale, minimum;
    load<1>(&scale, from + V_SCALE), load<1>(&minimum, from + V_MINIMUM);
    const half2 first = multiply(small_scale<0>(scale), v_super), second = multiply(small_scale<1>(scale), v_super);
    store_pair(to[part].v_scale + 2 * word, first, second);
    store_pair(to[part].v_minimum + 2 * word, multiply(centred<-4>(small_minimum<0>(minimum)), first),
               multiply(centred<-4>(small_minimum<1>(minimum)), second));
  }
  warp_barrier();
}

}  // namespace occam
