// Tokens in full precision: residual, pins and those of this step, 16 at a time in each warp, as float16.
#pragma once
#include "softmax.cuh"

namespace occam {

constexpr int FULL_Q_EXPONENT = 0;  // K may be as large as a float16

// 8 channels of a token as four registers; zeros for a token that is none and for channels beyond HEAD_DIM.
OKV_DEVICE void load_channels(const void *x, i64 index, int dtype, bool exists, half2 (&to)[4]) {
  to[0] = to[1] = to[2] = to[3] = 0;
  if (!exists) return;
  u32 words[8];
  if (dtype == FLOAT32) {
    load<4>(words, (const float *)x + index);
    load<4>(words + 4, (const float *)x + index + 4);
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = to_half2(bits_to_float(words[2 * i]), bits_to_float(words[2 * i + 1]));
    return;
  }
  load<4>(words, (const u16 *)x + index);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float low = bits_to_float(words[i] << 16), high = bits_to_float(words[i] & 0xffff0000u);
    to[i] = dtype == FLOAT16 ? words[i] : to_half2(low, high);
  }
}

// Lane p of four holds channels 32 block + 8 p .. + 7, in the order in which K is loaded.
struct FullQueries {
  half2 pairs[BLOCKS][4];
  float unit[2];

  OKV_DEVICE FullQueries(const Shared &shared, const Place &at) {
    const float *q = shared.q[at.row] + 8 * at.pair;
    float largest = 0.0f;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(q[32 * block + i]));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const float scale = row_scale(largest, FULL_Q_EXPONENT);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        pairs[block][i] = to_half2(q[32 * block + 2 * i] * scale, q[32 * block + 2 * i + 1] * scale);
    unit[0] = 1.0f / shuffle(scale, 8 * at.pair);
    unit[1] = 1.0f / shuffle(scale, 8 * at.pair + 4);
  }
};

struct FullTile {
  const Part &part;
  i64 position[2];  // of tokens `row` and `row` + 8, -1 for none
  i64 k[2], v[2];   // where their channels begin

  OKV_DEVICE FullTile(const Part &tokens, const Place &at, int first) : part(tokens) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = first + 8 * half + at.row;
      position[half] = token < part.tokens ? part.positions[(i64)at.batch * part.tokens + token] : -1;
      k[half] = at.batch * part.k_batch + at.head * part.k_head + token * part.k_token;
      v[half] = at.batch * part.v_batch + at.head * part.v_head + token * part.v_token;
    }
  }

  OKV_DEVICE bool holds(int half, int channel) const { return position[half] >= 0 && channel < HEAD_DIM; }

  OKV_DEVICE void products(const Place &at, const FullQueries &q, float (&logits)[4]) const {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      const int channel = 32 * block + 8 * at.pair;
      half2 x[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++)
        load_channels(part.k, k[half] + channel, part.dtype, holds(half, channel), x[half]);
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        multiply_tiles(logits, x[0][i], x[1][i], x[0][i + 1], x[1][i + 1], q.pairs[block][i], q.pairs[block][i + 1]);
    }
  }

  OKV_DEVICE void values(const Place &at, const half2 (&p)[2], float (&sums)[TILES][4]) const {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      const int channel = 32 * block + 8 * at.pair;
      half2 x[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        load_channels(part.v, v[half] + channel, part.dtype, holds(half, channel), x[half]);
#pragma unroll
        for (int i = 0; i < 4; i++) x[half][i] = transpose(x[half][i]);
      }
      multiply_tiles(sums[2 * block], x[0][0], x[0][1], x[1][0], x[1][1], p[0], p[1]);
      multiply_tiles(sums[2 * block + 1], x[0][2], x[0][3], x[1][2], x[1][3], p[0], p[1]);
    }
  }
};

// The channel of row `row` (upper: + 8) of result tile `tile`, as `FullTile::values` leaves it.
OKV_DEVICE int full_channel(int tile, int row, int upper) {
  return 32 * (tile >> 1) + 8 * (row >> 1) + 4 * (tile & 1) + 2 * upper + (row & 1);
}

OKV_DEVICE void take_full(const Arguments &a, const Place &at, Shared &shared, Running &running) {
  load_queries(a, at, shared);
  const FullQueries q(shared, at);
  const int splits = a.splits - a.packed_splits;
  int skipped = 0;  // tiles of earlier parts
  for (int number = 0; number < a.part_count; number++) {
    const Part &part = a.parts[number];
    const int tiles = (part.tokens + 15) / 16;
    const int own = (at.split(a) - a.packed_splits) * WARPS + at.warp, step = splits * WARPS;
    for (int i = ((own - skipped) % step + step) % step; i < tiles; i += step) {
      const FullTile tile(part, at, 16 * i);
      float logits[1][4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
      tile.products(at, q, logits[0]);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int column = 2 * at.pair + c;
        const i64 own_position = shared.position[column];
        const int query_head = shared.query_head[column];
        const float added = part.logit_bias && query_head >= 0 ? part.logit_bias[query_head] : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float &logit = logits[0][2 * half + c];
          logit *= q.unit[c] * a.scale;
          if (a.softcap > 0.0f) logit = soft_cap(logit, a.softcap);
          logit = (logit + added) * LOG2_E;
          const i64 there = tile.position[half];
          if (there < 0 || there > own_position || there <= own_position - a.window) logit = bits_to_float(HIDDEN);
        }
      }
      half2 p[2];
      running.take(logits, {1.0f, 1.0f}, p, 0);
      const half2 ones = at.row == 0 ? both(HALF_ONE) : 0;
      multiply_tiles(running.others, 0, ones, 0, ones, p[0], p[1]);
      tile.values(at, p, running.sums);
    }
    skipped += tiles;
  }
}

}  // namespace occam
