// One head of a group of tokens becomes one side of a record, in native order (layout.py).
#pragma once
#include "groups.cuh"

namespace occam {

// Rows of floats as far apart as reads without bank conflicts want: K is read down the tokens, V along the channels.
constexpr int K_ROW = WIDTH + 8, V_ROW = WIDTH + 4;
constexpr int GROUPS = WIDTH > GROUP * V_GROUPS ? WIDTH : GROUP * V_GROUPS;
constexpr int MOST_VALUES = GROUP > V_GROUP ? GROUP : V_GROUP;  // of a group

struct Packing {
  alignas(128) float x[GROUP * K_ROW];
  alignas(16) float minimum[GROUPS];
  alignas(16) float divisor[GROUPS];  // scale; before that the highest value, or the scale that 8 bits would need
  alignas(16) float inverse[GROUPS];
  float columns[MOST_VALUES / 4 * THREADS];  // `folded`
  float norms[GROUP];                        // or 1: what K is divided by
  float largest[WARPS];
  int is_last;
};

template <bool KEYS>
struct Side {
  static constexpr int BITS = KEYS ? K_BITS : V_BITS, ROW = KEYS ? K_ROW : V_ROW;
  static constexpr int COUNT = KEYS ? WIDTH : GROUP * V_GROUPS;  // of groups
  static constexpr int SUBGROUP_BYTES = WIDTH * BITS * 4;
  static constexpr int CODES = KEYS ? K_CODES : V_CODES;
  static constexpr int SCALE = KEYS ? K_SCALE : V_SCALE, MINIMUM = KEYS ? K_MINIMUM : V_MINIMUM;
  static constexpr float STEPS = (float)((1 << BITS) - 1);
};

// Values of one group: channel `number` of K, or tokens [group][token] of V.
template <bool KEYS>
struct Values {
  const float *first;
  int count;

  OKV_DEVICE Values(const float *x, int number) {
    if (KEYS) {
      first = x + number, count = GROUP;
    } else {
      const int channel = number / GROUP * V_GROUP;
      first = x + number % GROUP * V_ROW + channel;
      count = HEAD_DIM - channel < V_GROUP ? HEAD_DIM - channel : V_GROUP;
    }
  }

  OKV_DEVICE float operator()(int i) const { return first[KEYS ? i * K_ROW : i]; }

  OKV_DEVICE Range range() const {
    Range r = {first[0], first[0]};
#pragma unroll 4
    for (int i = 0; i < count; i += 4) {
      float y[4];
      if constexpr (!KEYS) load_floats(y, first + i);
      else
#pragma unroll
        for (int k = 0; k < 4; k++) y[k] = (*this)(i + k);
#pragma unroll
      for (int k = 0; k < 4; k++) r = {fminf(r.low, y[k]), fmaxf(r.high, y[k])};
    }
    return r;
  }
};

// Where metadata number `item` of 32 lies: channels of a block (K), or tokens of a V group (`_K_METADATA` of layout.py).
OKV_DEVICE int metadata_place(int item) {
  const int k = item / 8, p = item / 2 % 4, low = item % 2;
  return SMALL_METADATA ? 8 * p + 4 * (k / 2) + 2 * low + k % 2 : 8 * p + 2 * k + low;
}

template <bool KEYS>
OKV_DEVICE void store_metadata(u8 *record, int number, const Metadata &m) {
  const int token = number % GROUP, unit = KEYS ? number / 32 : token / 32 * V_GROUPS + number / GROUP;
  const int place = 32 * unit + metadata_place((KEYS ? number : token) % 32);
  if (SMALL_METADATA) {
    record[Side<KEYS>::SCALE + place] = (u8)m.stored_scale;
    record[Side<KEYS>::MINIMUM + place] = (u8)m.stored_minimum;
  } else {
    ((u16 *)(record + Side<KEYS>::SCALE))[place] = (u16)m.stored_scale;
    ((u16 *)(record + Side<KEYS>::MINIMUM))[place] = (u16)m.stored_minimum;
  }
}

// Of scales that the attend kernel's products can hold, `check_range` of layout.py.
template <bool KEYS>
OKV_DEVICE bool in_range(float scale) {
  if (!KEYS) return scale <= 1023.0f;
  return SMALL_METADATA || scale <= (NORM_BYTES ? 127.0f : 4094.0f);
}

// The largest of all threads' numbers.
OKV_DEVICE float largest_of(float x, Packing &shared) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
  if (thread() % 32 == 0) shared.largest[thread() / 32] = x;
  barrier();
#pragma unroll
  for (int w = 0; w < WARPS; w++) x = fmaxf(x, shared.largest[w]);
  return x;
}

// Choose the range of each group, store what is rounded of it and keep what that means. Returns flags.
template <bool KEYS>
OKV_DEVICE u32 choose_metadata(Packing &shared, const Rules &rules, u8 *record, u16 *super) {
  constexpr float STEPS = Side<KEYS>::STEPS;
  u32 flags = 0;
  const auto keep = [&](int number, const Metadata &m) {
    store_metadata<KEYS>(record, number, m);
    if (!in_range<KEYS>(m.scale)) flags |= BEYOND_RANGE;
    shared.minimum[number] = m.minimum;
    shared.divisor[number] = or_one(m.scale);
    shared.inverse[number] = 1.0f / or_one(m.scale);
  };
  float largest = 0.0f;
#pragma unroll 1
  for (int number = thread(); number < Side<KEYS>::COUNT; number += THREADS) {
    const Values<KEYS> values(shared.x, number);
    const Range r = on_grid(values.range(), values.count, rules.grid, KEYS ? rules.k_clip : rules.v_clip, STEPS,
                            shared.columns + thread(), values);
    if (!storable(r, STEPS)) flags |= DOES_NOT_FIT;
    if (SMALL_METADATA) {
      const float wanted = wanted_scale(r, STEPS);
      largest = fmaxf(largest, wanted);
      shared.minimum[number] = r.low, shared.divisor[number] = wanted;
    } else {
      keep(number, round_to_16_bits(r, STEPS));
    }
  }
  if (SMALL_METADATA) {
    const float unit = super_scale_of(largest_of(largest, shared));
    if (thread() == 0) *super = float_to_half(unit);
#pragma unroll 1
    for (int number = thread(); number < Side<KEYS>::COUNT; number += THREADS)
      keep(number, round_to_8_bits(shared.minimum[number], shared.divisor[number], unit));
  }
  barrier();
  return flags;
}

// The nearest code, as a division finds it. The corrected quotient is off by less than 2^-22 of its last bit from the
// true one before it is rounded; and as a divisor has 11 bits, no true quotient near k + 1/2 lies that close to the
// middle between two floats. Divisors have exponents from -24 to 24, so nothing that counts underflows on the way.
template <bool KEYS>
OKV_DEVICE u32 code_of(float x, float minimum, float divisor, float inverse) {
  const float above = x - minimum, near = above * inverse;
  const float q = fused(fused(-near, divisor, above), inverse, near);
  return float_to_bits(clamped(q, Side<KEYS>::STEPS) + 8388608.0f) & 15u;  // 2 ** 23 + code, half to even
}

// Where word `word` of a lane lies in bytes, of `words` that are loaded 4, then 2, then 1 at a time.
OKV_DEVICE constexpr int word_place(int words, int word, int lane) {
  const int run = word < words / 4 * 4 ? 4 : word < words / 2 * 2 ? 2 : 1;
  return 128 * (word / run * run) + 4 * run * lane + 4 * (word % run);
}

// Choose the codes of 32 tokens and 32 channels, a tile of a warp, and store them.
template <bool KEYS>
OKV_DEVICE void pack_tile(const Packing &shared, u8 *to, int subgroup, int block) {
  constexpr int BITS = Side<KEYS>::BITS, ROW = Side<KEYS>::ROW;
  const int lane = thread() % 32, row = lane / 4, pair = lane % 4;
  u32 words[4] = {0, 0, 0, 0}, third = 0;
#pragma unroll
  for (int outer = 0; outer < 4; outer++) {
    const int of_group = KEYS ? 32 * block + 8 * outer + 2 * pair
                              : (V_GROUPS == 1 ? 0 : 32 * block / V_GROUP * GROUP) + 32 * subgroup + 8 * outer + 2 * pair;
    float minimum[2], divisor[2], inverse[2];
    load_floats(minimum, shared.minimum + of_group);
    load_floats(divisor, shared.divisor + of_group);
    load_floats(inverse, shared.inverse + of_group);
#pragma unroll
    for (int inner = 0; inner < 4; inner++) {
      const int eights = KEYS ? inner : outer, channels = KEYS ? outer : inner;  // of tokens, of channels
      const int token = 32 * subgroup + 8 * eights + (KEYS ? row : 2 * pair);
      const int channel = 32 * block + 8 * channels + (KEYS ? 2 * pair : row);
      const float *at = shared.x + token * ROW + channel;
      const float x[2] = {at[0], at[KEYS ? 1 : ROW]};
      const int tile = eights >> 1, upper = eights & 1, step = channels >> 1, high = channels & 1;
#pragma unroll
      for (int low = 0; low < 2; low++) {
        u32 code = code_of<KEYS>(x[low], minimum[low], divisor[low], inverse[low]);
        if (!KEYS && WIDTH > HEAD_DIM && channel >= HEAD_DIM) code = 0;
        if (BITS == 4) {
          words[2 * step + tile] |= code << (16 * low + 8 * upper + 4 * high);
        } else {
          words[tile] |= (code & 3u) << (16 * low + 8 * upper + 4 * step + 2 * high);
          third |= (code >> 2) << (16 * low + 8 * (1 - tile) + 4 * step + 2 * high + 1 - upper);
        }
      }
    }
  }
  u8 *plane = to + subgroup * Side<KEYS>::SUBGROUP_BYTES;
  if (BITS == 4) store<4>(plane + word_place(4 * BLOCKS, 4 * block, lane), words);
  else store<2>(plane + word_place(2 * BLOCKS, 2 * block, lane), words);
  if (BITS == 3) store<1>(plane + 256 * BLOCKS + word_place(BLOCKS, block, lane), &third);
}

// Write one side of a record of the rows in `shared.x`. Returns flags.
template <bool KEYS>
OKV_DEVICE u32 pack_side(Packing &shared, const Rules &rules, u8 *record, u16 *super) {
  const u32 flags = choose_metadata<KEYS>(shared, rules, record, super);
#pragma unroll 1
  for (int tile = thread() / 32; tile < SUBGROUPS * BLOCKS; tile += WARPS)
    pack_tile<KEYS>(shared, record + Side<KEYS>::CODES, tile / BLOCKS, tile % BLOCKS);
  barrier();
  return flags;
}

// Write a record of one head, whose rows begin at these elements; `shared.norms` is known. Returns flags.
OKV_DEVICE u32 pack_head(Packing &shared, const Rules &rules, const View &k, i64 k_from, const View &v, i64 v_from,
                         const float *balance, u8 *record, u16 *supers) {
  const Way k_way = {balance, rules.k_block, rules.k_factor, NORM_BYTES ? shared.norms : nullptr};
  const Way v_way = {nullptr, rules.v_block, rules.v_factor, nullptr};
  bool finite = load_rows<K_ROW>(shared.x, GROUP, k, k_from, k_way);
  u32 flags = pack_side<true>(shared, rules, record, supers);
  finite &= load_rows<V_ROW>(shared.x, GROUP, v, v_from, v_way);
  flags |= pack_side<false>(shared, rules, record, supers + 1);
  return finite ? flags : flags | DOES_NOT_FIT;
}

}  // namespace occam
