// Packed tokens: each warp reads 32 tokens of a page, straight from the codes.
//
// logit = norm * (sum of code * (q * scale) + minimum * q), result = sum of code * (p * scale) + minimum * p
#pragma once
#include "codes.cuh"
#include "ring.cuh"
#include "softmax.cuh"

namespace occam {

// q of one column as the second factor of tile products, divided by 2 ** code_shift of each channel.
struct Queries {
  half2 pairs[2 * TILES];  // number k: channels 8 k + 2 pair, + 1
  float unit[2];           // what a logit of columns 2 pair, 2 pair + 1 must be multiplied by, but for softmax scale

  OKV_DEVICE Queries(const Shared &shared, const Place &at) {
    const float *q = shared.q[at.row];
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < 2 * TILES; k++)
      largest = fmaxf(largest, fmaxf(fabsf(q[8 * k + 2 * at.pair]), fabsf(q[8 * k + 2 * at.pair + 1])));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const float scale = row_scale(largest, Q_EXPONENT);
#pragma unroll
    for (int k = 0; k < 2 * TILES; k++) {
      const float factor = scale * power(-code_shift(K_BITS, k >> 1 & 1, k & 1));
      pairs[k] = to_half2(q[8 * k + 2 * at.pair] * factor, q[8 * k + 2 * at.pair + 1] * factor);
    }
    unit[0] = 1.0f / shuffle(scale, 8 * at.pair);
    unit[1] = 1.0f / shuffle(scale, 8 * at.pair + 4);
  }
};

// The packed tokens that the columns see: none outside `first` .. `end`, all inside `inner_first` .. `inner_end`.
struct Seen {
  int first = 0x7fffffff, end = 0, inner_first = 0, inner_end = 0x7fffffff;

  OKV_DEVICE explicit Seen(const Shared &shared) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      if (shared.position[c] == -2) continue;
      if (shared.first[c] < shared.end[c]) {
        first = first < shared.first[c] ? first : shared.first[c];
        end = end > shared.end[c] ? end : shared.end[c];
      }
      inner_first = inner_first > shared.first[c] ? inner_first : shared.first[c];
      inner_end = inner_end < shared.end[c] ? inner_end : shared.end[c];
    }
  }
};

// 3.5 or 7.5, times 2 ** shift
OKV_DEVICE constexpr half2 middle_code(int shift) {
  return both((K_BITS == 4 ? 0x4780u : 0x4300u) + (u32)(shift << 10));
}

// sums[t]: codes times q times scale, of tokens 16 t + row and + 8.
template <int STEP>
OKV_DEVICE void k_step(const Codes<K_BITS> &codes, const half2 (&scaled)[4], int block, float (&sums)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
    const Quad x = codes.template quad<STEP>(block, tile);
    multiply_tiles(sums[tile], x.low[0], x.low[1], x.high[0], x.high[1], scaled[2 * STEP], scaled[2 * STEP + 1]);
  }
}

// q times 2 ** code_shift again
template <int K>
OKV_DEVICE half2 plain(half2 q) {
  constexpr int SHIFT = code_shift(K_BITS, K >> 1, K & 1);
  return SHIFT ? multiply_again(q, two_to_the(SHIFT)) : q;
}

template <int K>
OKV_DEVICE half2 plain_minimum(const KMetadata &minimum) {  // in units of scale / 16, and of 2 ** -code_shift
  return centred<code_shift(K_BITS, K >> 1, K & 1) - 4>(minimum.template minimum<K>());
}

// What rounding q times scale has lost. It counts with the middle code, which is large for 3 and 4 bits.
template <int STEP>
OKV_DEVICE void add_lost(const half2 *q, const half2 (&scales)[4], const half2 (&scaled)[4], float (&sums)[4]) {
  constexpr int K = 2 * STEP;
  constexpr half2 LOW = middle_code(code_shift(K_BITS, STEP, 0)), HIGH = middle_code(code_shift(K_BITS, STEP, 1));
  const half2 lost_low = multiply_add(q[K], scales[K], negative(scaled[K]));
  const half2 lost_high = multiply_add(q[K + 1], scales[K + 1], negative(scaled[K + 1]));
  multiply_tiles(sums, LOW, LOW, HIGH, HIGH, lost_low, lost_high);
}

// 32 channels. Products of minimum and q are the same for all tokens, so two tile products take the same registers:
// what counts are the first rows of `lower` and the last of `upper`.
OKV_DEVICE void k_block(const Codes<K_BITS> &codes, const Queries &queries, const u8 *record, const Place &at,
                        int block, float (&sums)[2][4], float (&lower)[4], float (&upper)[4]) {
  KMetadata scale, minimum;
  scale.read(record + K_SCALE, block, at.pair);
  minimum.read(record + K_MINIMUM, block, at.pair);
  const half2 *q = queries.pairs + 4 * block;
  const half2 scales[4] = {scale.template scale<0>(), scale.template scale<1>(), scale.template scale<2>(),
                           scale.template scale<3>()};
  half2 scaled[4];
#pragma unroll
  for (int k = 0; k < 4; k++) scaled[k] = multiply(q[k], scales[k]);
  k_step<0>(codes, scaled, block, sums);
  k_step<1>(codes, scaled, block, sums);
  if constexpr (SMALL_METADATA) {
    const half2 a = plain_minimum<0>(minimum), b = plain_minimum<1>(minimum);
    const half2 c = plain_minimum<2>(minimum), d = plain_minimum<3>(minimum);
    multiply_tiles(lower, a, c, b, d, scaled[0], scaled[1]);
    multiply_tiles(upper, a, c, b, d, scaled[2], scaled[3]);
  } else {
    const half2 a = minimum.template minimum<0>(), b = minimum.template minimum<1>();
    const half2 c = minimum.template minimum<2>(), d = minimum.template minimum<3>();
    multiply_tiles(lower, a, b, c, d, plain<0>(q[0]), plain<2>(q[2]));
    multiply_tiles(upper, a, b, c, d, plain<1>(q[1]), plain<3>(q[3]));
    if constexpr (K_BITS > 2) {
      add_lost<0>(q, scales, scaled, lower);
      add_lost<1>(q, scales, scaled, lower);
    }
  }
}

template <int STEP>
OKV_DEVICE void v_step(const Codes<V_BITS> &codes, const half2 (&p)[4], int block, float (&sums)[TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
    const Quad x = codes.template quad<STEP>(block, tile);
    multiply_tiles(sums[2 * block + STEP], x.low[0], x.high[0], x.low[1], x.high[1], p[2 * tile], p[2 * tile + 1]);
  }
}

template <int K>
OKV_DEVICE half2 v_minimum(const VMetadata &scale, const VMetadata &minimum) {
  if constexpr (SMALL_METADATA) return multiply(centred<-4>(minimum.template minimum<K>()), scale.template scale<K>());
  else return minimum.template minimum<K>();
}

// `unit`: what p was multiplied by, but for 2 ** P_EXPONENT, as the reciprocal.
OKV_DEVICE void take_values(const u8 *record, int subgroup, const Place &at, const half2 (&p)[4], half2 unit,
                            Running &running) {
  const u8 *scales = record + V_SCALE + subgroup * V_SUBGROUP_META;
  const u8 *minimums = record + V_MINIMUM + subgroup * V_SUBGROUP_META;
  half2 group[4] = {0, 0, 0, 0};
  if (at.row < V_GROUPS) {
    VMetadata scale{}, minimum;
    minimum.read(minimums, at.row, at.pair);
    if constexpr (SMALL_METADATA) scale.read(scales, at.row, at.pair);
    group[0] = v_minimum<0>(scale, minimum), group[1] = v_minimum<1>(scale, minimum);
    group[2] = v_minimum<2>(scale, minimum), group[3] = v_minimum<3>(scale, minimum);
  }
  const half2 ones = at.row == 0 ? unit : 0;  // row 8 adds up the weights, as rounded as they are in the other sums
  multiply_tiles(running.others, group[0], ones, group[1], ones, p[0], p[1]);
  multiply_tiles(running.others, group[2], ones, group[3], ones, p[2], p[3]);
  Codes<V_BITS> codes;
  codes.read(record + V_CODES + subgroup * (WIDTH * V_BITS * 4), at.lane);
  half2 scaled[4];
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    if (32 * block % V_GROUP == 0) {
      VMetadata scale;
      scale.read(scales, 32 * block / V_GROUP, at.pair);
      scaled[0] = multiply(p[0], scale.template scale<0>()), scaled[1] = multiply(p[1], scale.template scale<1>());
      scaled[2] = multiply(p[2], scale.template scale<2>()), scaled[3] = multiply(p[3], scale.template scale<3>());
    }
    v_step<0>(codes, scaled, block, running.sums);
    v_step<1>(codes, scaled, block, running.sums);
  }
}

OKV_DEVICE void k_products(const u8 *record, int subgroup, const Place &at, const Queries &q, float (&logits)[2][4]) {
  float lower[4] = {0.0f, 0.0f, 0.0f, 0.0f}, upper[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  Codes<K_BITS> codes;
  codes.read(record + K_CODES + subgroup * (WIDTH * K_BITS * 4), at.lane);
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) k_block(codes, q, record, at, block, logits, lower, upper);
  const float minimums[2] = {lower[0] + upper[2], lower[1] + upper[3]};
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) logits[t][i] = logits[t][i] * CODE_UNIT + minimums[i & 1];
}

OKV_DEVICE float norm_of(const Stage &stage, int token) {
  if constexpr (NORM_BYTES == 4) return ((const float *)stage.norms)[token];
  else if constexpr (NORM_BYTES == 2) return half_to_float(((const u16 *)stage.norms)[token]);
  else return 1.0f;
}

// 32 tokens of one warp; `token` is the first one's number in the sequence.
OKV_DEVICE void take_tokens(const Arguments &a, const Shared &shared, const Stage &stage, const Place &at,
                            const Queries &q, const Seen &seen, int token, Running &running) {
  const int number = at.warp / SUBGROUPS, subgroup = at.warp % SUBGROUPS;
  const u8 *record = stage.page + number * RECORD_BYTES;
  float k_super = 1.0f, v_super = 1.0f;
  half2 v_unit = both(HALF_ONE);
  if constexpr (SMALL_METADATA) {
    const u32 supers = stage.supers[number];
    k_super = half_to_float((u16)(supers & 0xffffu)), v_super = half_to_float((u16)(supers >> 16));
    v_unit = both(2 * HALF_ONE - (supers >> 16));  // 1 / v_super: both are powers of two
  }
  float logits[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
  k_products(record, subgroup, at, q, logits);
  const float unit[2] = {q.unit[0] * k_super, q.unit[1] * k_super};
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float norm = norm_of(stage, 32 * at.warp + 16 * t + 8 * half + at.row);
      logits[t][2 * half] *= norm * unit[0];
      logits[t][2 * half + 1] *= norm * unit[1];
    }
#if OKV_SOFTCAP
  if (a.softcap > 0.0f)
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) logits[t][i] = soft_cap(logits[t][i], a.softcap) * LOG2_E;
#endif
  if (token < seen.inner_first || token + 32 > seen.inner_end)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int column = 2 * at.pair + c, own = token + at.row;
      const int first = shared.first[column] - own, end = shared.end[column] - own;
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const bool visible = (first <= 16 * t + 8 * half) & (16 * t + 8 * half < end);
          logits[t][2 * half + c] = visible ? logits[t][2 * half + c] : HIDDEN;
        }
    }
  half2 p[4];
  running.take(logits, p, v_super * power(P_EXPONENT));
  take_values(record, subgroup, at, p, v_unit, running);
}

// The share of the pages that belongs to one split.
OKV_DEVICE void take_packed(const Arguments &a, const Place &at, Shared &shared, Running &running) {
  const Seen seen(shared);
  const int first_page = seen.first < seen.end ? seen.first / PAGE_TOKENS : 0;
  const int pages = (seen.end + PAGE_TOKENS - 1) / PAGE_TOKENS - first_page;
  const int share = (pages + a.packed_splits - 1) / a.packed_splits;
  const int first = first_page + at.split(a) * share;
  const int end = first + share < first_page + pages ? first + share : first_page + pages;
  Ring ring(a, at, shared, first, end);  // the first pages come while the queries are rotated
  load_queries(a, at, shared);
  Queries q(shared, at);
  const float scale = power(SCALE_EXPONENT) * a.scale * (OKV_SOFTCAP && a.softcap > 0.0f ? 1.0f : LOG2_E);
  q.unit[0] *= scale, q.unit[1] *= scale;
  ring.settle();
  for (int i = 0; i < end - first; i++) {
    const Stage &stage = ring.page(i);
    const int token = (first + i) * PAGE_TOKENS + 32 * at.warp;
    if (token < seen.end && token + 32 > seen.first) take_tokens(a, shared, stage, at, q, seen, token, running);
    ring.settle();
  }
}

}  // namespace occam
