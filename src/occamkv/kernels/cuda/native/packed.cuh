// Packed tokens: each warp reads 32 tokens of a page, straight from the codes.
//
// logit = norm * (sum of code * (q * scale) + minimum * q), result = sum of code * (p * scale) + minimum * p
#pragma once
#include "codes.cuh"
#include "ring.cuh"
#include "softmax.cuh"

namespace occam {

constexpr int UNIT_EXPONENT = SMALL_METADATA ? 4 : 0;  // minimums of K count 2 ** -UNIT_EXPONENT

// q of one column as the second factor of tile products, divided by 2 ** code_shift of each channel.
struct Queries {
  half2 pairs[2 * TILES];  // number k: channels 8 k + 2 pair, + 1
  float unit[2];           // what a logit of columns 2 pair, 2 pair + 1 must be multiplied by; above 0

  // A softmax scale that is not above 0 belongs to q.
  OKV_DEVICE Queries(const Shared &shared, const Place &at, float softmax_scale) {
    const float sign = softmax_scale > 0.0f ? 1.0f : softmax_scale < 0.0f ? -1.0f : 0.0f;
    const float size = softmax_scale == 0.0f ? 1.0f : fabsf(softmax_scale);
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
      const float factor = sign * scale * power(-code_shift(K_BITS, k >> 1 & 1, k & 1));
      pairs[k] = to_half2(q[8 * k + 2 * at.pair] * factor, q[8 * k + 2 * at.pair + 1] * factor);
    }
    const float own = size * power(SMALL_METADATA ? SCALE_EXPONENT : 0) / scale;
    unit[0] = shuffle(own, 8 * at.pair);
    unit[1] = shuffle(own, 8 * at.pair + 4);
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

// What rounding q times scale has lost. It counts with the middle code, which is large for 3 and 4 bits.
template <int STEP>
OKV_DEVICE void add_lost(const half2 *q, const half2 (&scales)[4], const half2 (&scaled)[4], float (&sums)[4]) {
  constexpr int K = 2 * STEP;
  constexpr half2 LOW = middle_code(code_shift(K_BITS, STEP, 0)), HIGH = middle_code(code_shift(K_BITS, STEP, 1));
  const half2 lost_low = multiply_add(q[K], scales[K], negative(scaled[K]));
  const half2 lost_high = multiply_add(q[K + 1], scales[K + 1], negative(scaled[K + 1]));
  multiply_tiles(sums, LOW, LOW, HIGH, HIGH, lost_low, lost_high);
}

// Where 32 tokens lie: number `number` of the four times 32 of a page.
struct Subgroup {
  const u8 *k_codes, *v_codes;
  const void *k_scale, *k_minimum, *v_scale, *v_minimum;

  OKV_DEVICE Subgroup(const Page &page, int number, const Wide &wide) {
    const u8 *record = page.records + number / SUBGROUPS * RECORD_BYTES;
    const int within = number % SUBGROUPS;
    k_codes = record + K_CODES + within * (WIDTH * K_BITS * 4);
    v_codes = record + V_CODES + within * (WIDTH * V_BITS * 4);
    if constexpr (SMALL_METADATA) {
      k_scale = wide.k_scale, k_minimum = wide.k_minimum, v_scale = wide.v_scale, v_minimum = wide.v_minimum;
    } else {
      k_scale = record + K_SCALE, k_minimum = record + K_MINIMUM;
      v_scale = record + V_SCALE + within * V_SUBGROUP_META;
      v_minimum = record + V_MINIMUM + within * V_SUBGROUP_META;
    }
  }
};

// 32 channels. Products of minimum and q are the same for all tokens, so two tile products take the same registers:
// what counts are the first rows of `lower` and the last of `upper`.
OKV_DEVICE void k_block(const Codes<K_BITS> &codes, const Queries &queries, const Subgroup &of, const Place &at,
                        int block, float (&sums)[2][4], float (&lower)[4], float (&upper)[4]) {
  const Metadata scale(of.k_scale, block, at.pair), minimum(of.k_minimum, block, at.pair);
  const half2 *q = queries.pairs + 4 * block, *m = minimum.of;
  half2 scaled[4];
#pragma unroll
  for (int k = 0; k < 4; k++) scaled[k] = multiply(q[k], scale.of[k]);
  k_step<0>(codes, scaled, block, sums);
  k_step<1>(codes, scaled, block, sums);
  if constexpr (SMALL_METADATA) {
    multiply_tiles(lower, m[0], m[1], m[2], m[3], scaled[0], scaled[1]);
    multiply_tiles(upper, m[0], m[1], m[2], m[3], scaled[2], scaled[3]);
  } else {
    multiply_tiles(lower, m[0], m[1], m[2], m[3], plain<0>(q[0]), plain<2>(q[2]));
    multiply_tiles(upper, m[0], m[1], m[2], m[3], plain<1>(q[1]), plain<3>(q[3]));
    if constexpr (K_BITS > 2) {
      add_lost<0>(q, scale.of, scaled, lower);
      add_lost<1>(q, scale.of, scaled, lower);
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

OKV_DEVICE void take_values(const Subgroup &of, const Place &at, const half2 *p, Running &running) {
  // Rows without a group take the last one's minimums and are not read. Row 8 adds up the weights, as rounded as they
  // are in the other sums.
  const Metadata minimum(of.v_minimum, at.row < V_GROUPS ? at.row : V_GROUPS - 1, at.pair);
  constexpr half2 ONES = both(HALF_ONE);
  multiply_tiles(running.others, minimum.of[0], ONES, minimum.of[1], ONES, p[0], p[1]);
  multiply_tiles(running.others, minimum.of[2], ONES, minimum.of[3], ONES, p[2], p[3]);
  Codes<V_BITS> codes;
  codes.read(of.v_codes, at.lane);
  half2 scaled[4];
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    if (32 * block % V_GROUP == 0) {
      const Metadata scale(of.v_scale, 32 * block / V_GROUP, at.pair);
#pragma unroll
      for (int k = 0; k < 4; k++) scaled[k] = multiply(p[k], scale.of[k]);
    }
    v_step<0>(codes, scaled, block, running.sums);
    v_step<1>(codes, scaled, block, running.sums);
  }
}

// Logits, but for the norm of the token and the unit of the column.
OKV_DEVICE void k_products(const Subgroup &of, const Place &at, const Queries &q, float (&logits)[2][4]) {
  float lower[4] = {0.0f, 0.0f, 0.0f, 0.0f}, upper[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  Codes<K_BITS> codes;
  codes.read(of.k_codes, at.lane);
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) k_block(codes, q, of, at, block, logits, lower, upper);
  const float of_upper = power(SMALL_METADATA ? code_shift(K_BITS, 1, 0) : 0);
  const float minimums[2] = {upper[2] * of_upper + lower[0], upper[3] * of_upper + lower[1]};
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) logits[t][i] = logits[t][i] * power(24 + UNIT_EXPONENT) + minimums[i & 1];
}

OKV_DEVICE float norm_of(const Page &page, int token) {
  if constexpr (NORM_BYTES == 4) return ((const float *)page.norms)[token];
  else if constexpr (NORM_BYTES == 2) return half_to_float(((const u16 *)page.norms)[token]);
  else return 1.0f;
}

// The tokens of one warp in a step; `token` is the first one's number in the sequence.
OKV_DEVICE void take_tokens(const Arguments &a, Shared &shared, const Page *pages, const Place &at, const Queries &q,
                            const Seen &seen, int token, Running &running) {
  const Page &page = pages[PARTS == 1 ? 0 : at.warp * PARTS / WARPS];
  const int number = PARTS == 1 ? at.warp : at.warp * PARTS % WARPS;
  Wide *wide = (Wide *)shared.wide + PARTS * at.warp;
  if constexpr (SMALL_METADATA) widen(page, number, at.lane, wide);
  float logits[2 * PARTS][4];
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    float own[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    k_products(Subgroup(page, number + part, wide[part]), at, q, own);
    float factor = 1.0f;
    if constexpr (SMALL_METADATA) factor = half_to_float((u16)(page.supers[(number + part) / SUBGROUPS] & 0xffffu));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float norm = norm_of(page, 32 * (number + part) + 8 * i + at.row) * factor;
      logits[2 * part + i / 2][i % 2 * 2] = own[i / 2][i % 2 * 2] * norm;
      logits[2 * part + i / 2][i % 2 * 2 + 1] = own[i / 2][i % 2 * 2 + 1] * norm;
    }
  }
  float unit[2] = {q.unit[0], q.unit[1]};
#if OKV_SOFTCAP
  if (a.softcap > 0.0f) {
#pragma unroll
    for (int t = 0; t < 2 * PARTS; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) logits[t][i] = soft_cap(logits[t][i] * unit[i & 1], a.softcap) * LOG2_E;
    unit[0] = unit[1] = 1.0f;
  }
#endif
  if (token < seen.inner_first || token + 32 * PARTS > seen.inner_end)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int column = 2 * at.pair + c, own = token + at.row;
      const u32 before = own - shared.first[column], count = shared.end[column] - shared.first[column];
#pragma unroll
      for (int t = 0; t < 2 * PARTS; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float &logit = logits[t][2 * half + c];
          logit = before + (16 * t + 8 * half) < count ? logit : bits_to_float(HIDDEN);
        }
    }
  half2 p[4 * PARTS];
  running.take(logits, unit, p, P_EXPONENT);
#pragma unroll
  for (int part = 0; part < PARTS; part++)
    if (part == 0 || token + 32 * part < seen.end)  // behind the end there may be no record, and 0 times anything
      take_values(Subgroup(page, number + part, wide[part]), at, p + 4 * part, running);
}

// The share of the pages that belongs to one split.
OKV_DEVICE void take_packed(const Arguments &a, const Place &at, Shared &shared, Running &running) {
  Seen seen(shared);
  const int first_page = seen.first < seen.end ? seen.first / PAGE_TOKENS : 0;
  const int pages = (seen.end + PAGE_TOKENS - 1) / PAGE_TOKENS - first_page;
  const int share = (pages + a.packed_splits - 1) / a.packed_splits;
  const int first = first_page + at.split(a) * share;
  const int end = first + share < first_page + pages ? first + share : first_page + pages;
  const int steps = end > first ? (end - first + STEP_PAGES - 1) / STEP_PAGES : 0;
  seen.end = seen.end < end * PAGE_TOKENS ? seen.end : end * PAGE_TOKENS;
  Ring ring(a, at, shared, first, end);
  load_queries(a, at, shared);  // while the first pages come
  Queries q(shared, at, a.scale);
  const float unit = power(-UNIT_EXPONENT) * (OKV_SOFTCAP && a.softcap > 0.0f ? 1.0f : LOG2_E);
  q.unit[0] *= unit, q.unit[1] *= unit;
  int token = first * PAGE_TOKENS + at.warp * (32 * PARTS);
  for (int i = 0; i < steps;) {
    const int chunk = i + SOURCES / 2 / STEP_PAGES < steps ? i + SOURCES / 2 / STEP_PAGES : steps;
    ring.find(at, i * STEP_PAGES + SOURCES / 2);
#pragma unroll 1
    for (; i < chunk; i++, token += STEP_PAGES * PAGE_TOKENS) {
      const Page *read = ring.pages(i);
      if (token < seen.end && token + 32 * PARTS > seen.first) take_tokens(a, shared, read, at, q, seen, token, running);
      ring.advance();
    }
  }
}

}  // namespace occam
