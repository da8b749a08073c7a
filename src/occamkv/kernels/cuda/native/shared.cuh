// Shared memory of a thread block, and what all its threads know.
#pragma once
#include "layout.cuh"

namespace occam {

#ifndef OKV_STAGES
#define OKV_STAGES 3
#endif
constexpr int STAGES = OKV_STAGES;  // steps in shared memory
constexpr int ROW = WIDTH + 4;  // floats of a row in shared memory

constexpr int SOURCES = 32;  // places of pages, found out 16 at a time
constexpr int SUPER_BYTES = SMALL_METADATA ? 4 * RECORDS : 0;
constexpr bool WORD_COPIES = !OKV_BULK || SUPER_BYTES % 16;

// Where a page lies.
struct Source {
  const u8 *records, *norms, *supers;
};

// 8-bit metadata of 32 tokens, made as wide as 16-bit metadata is.
struct Wide {
  half2 k_scale[WIDTH / 2], k_minimum[WIDTH / 2], v_scale[16 * V_GROUPS], v_minimum[16 * V_GROUPS];
};

struct Page {
  alignas(16) u8 records[PAGE_BYTES];
  alignas(16) u8 norms[NORM_BYTES ? PAGE_TOKENS * NORM_BYTES : 16];
  alignas(16) u32 supers[4];
};

struct Stage {
  Page pages[STEP_PAGES];
};

// The four warps' results, added up in a fixed order.
struct Merge {
  float sums[WARPS][COLUMNS][ROW];
  float largest[WARPS][COLUMNS], weight[WARPS][COLUMNS];
  float minimums[WARPS][8][COLUMNS];  // of V groups
};

// What share the splits of a row have in its sum, some of them at a time.
constexpr int SHARES = 64;
struct Shares {
  float of[SHARES][COLUMNS], of_warp[WARPS][COLUMNS];
};

struct Shared {
  union {
    alignas(128) Stage stages[STAGES];
    Merge merge;
    Shares shares;
  };
  alignas(16) u8 wide[SMALL_METADATA ? WARPS * PARTS * sizeof(Wide) : 16];
  alignas(16) float q[COLUMNS][ROW];  // rotated; later the result
  i64 position[COLUMNS];              // of the query, -1 for a pad, -2 for a column that is none
  int first[COLUMNS], end[COLUMNS];   // packed tokens that it sees
  int query_head[COLUMNS], query[COLUMNS];  // -1 for a column that is none
  float largest[COLUMNS], weight[COLUMNS];
  Source sources[SOURCES];
  u64 arrivals[STAGES];
  int is_last;
};

// Where this thread stands: a block reads some tokens of KV head `head` for 8 of its query rows.
struct Place {
  int lane, warp, row, pair;  // lane = 4 row + pair
  int batch, head;

  OKV_DEVICE Place()
      : lane(thread() & 31), warp(thread() >> 5), row(lane >> 2), pair(lane & 3), batch(block_z()), head(block_y()) {}

  OKV_DEVICE int tile(const Arguments &a) const { return block_x() % a.tiles; }
  OKV_DEVICE int split(const Arguments &a) const { return block_x() / a.tiles; }

  OKV_DEVICE int group_rows(const Arguments &a) const { return a.query_heads / a.kv_heads * a.queries; }
};

OKV_DEVICE float load_float(const void *x, i64 index, int dtype) {
  if (dtype == FLOAT32) return ((const float *)x)[index];
  const u16 half = ((const u16 *)x)[index];
  return dtype == FLOAT16 ? half_to_float(half) : bits_to_float((u32)half << 16);
}

// Rounded to nearest even; a NaN stays one.
OKV_DEVICE u16 float_to_bfloat(float x) {
  const u32 bits = float_to_bits(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? (u16)0x7fc0u : (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

OKV_DEVICE void store_float(void *x, i64 index, int dtype, float value) {
  if (dtype == FLOAT32) ((float *)x)[index] = value;
  else ((u16 *)x)[index] = dtype == FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
}

// The orthonormal Hadamard rotation of 8 rows in shared memory, block by block of channels: two steps at a time, with one
// barrier, then the last one if their number is odd.
OKV_DEVICE void hadamard(float (&rows)[COLUMNS][ROW], int block) {
  float factor = 1.0f;
  int bit = 0;
#pragma unroll 1
  for (; 2 << bit < block; bit += 2) {
    const int half = 1 << bit;
#pragma unroll 1
    for (int i = thread(); i < COLUMNS * (HEAD_DIM / 4); i += THREADS) {
      const int j = i % (HEAD_DIM / 4);
      float *x = &rows[i / (HEAD_DIM / 4)][(j >> bit << (bit + 2)) + (j & (half - 1))];
      const float a = x[0], b = x[half], c = x[2 * half], d = x[3 * half];
      x[0] = (a + b) + (c + d), x[half] = (a - b) + (c - d);
      x[2 * half] = (a + b) - (c + d), x[3 * half] = (a - b) - (c - d);
    }
    barrier();
    factor *= 0.5f;
  }
  const bool odd = 1 << bit < block;
  if (odd) factor *= 0.70710678118654752f;
#pragma unroll 1
  for (int i = thread(); i < COLUMNS * (HEAD_DIM / 2); i += THREADS) {
    const int j = i % (HEAD_DIM / 2), half = odd ? 1 << bit : HEAD_DIM / 2;
    float *x = &rows[i / (HEAD_DIM / 2)][odd ? (j >> bit << (bit + 1)) + (j & (half - 1)) : j];
    const float first = x[0], second = x[half];
    x[0] = (odd ? first + second : first) * factor, x[half] = (odd ? first - second : second) * factor;
  }
  barrier();
}

// How many packed tokens of a sequence stand at positions up to `at`. Skip number j stands at position skips[j] + j.
OKV_DEVICE int tokens_up_to(const Arguments &a, int batch, i64 at) {
  int low = 0, high = a.skips ? a.skip_count : 0;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (a.skips[(i64)batch * a.skip_count + middle] <= at - middle) low = middle + 1;
    else high = middle;
  }
  const i64 count = at + 1 - low - a.first_position[batch], length = a.lengths[batch];
  return (int)(count < 0 ? 0 : count > length ? length : count);
}

// Bring 8 query rows into cache space.
OKV_DEVICE void load_queries(const Arguments &a, const Place &at, Shared &shared) {
#pragma unroll 1
  for (int i = thread(); i < COLUMNS * WIDTH; i += THREADS) {
    const int column = i / WIDTH, d = i % WIDTH, query_head = shared.query_head[column];
    float x = 0.0f;
    if (query_head >= 0 && d < HEAD_DIM) {
      const i64 row = at.batch * a.q_batch + query_head * a.q_head + shared.query[column] * a.q_token;
      x = load_float(a.q, row + d, a.q_dtype);
      if (a.balance) x /= a.balance[at.head * HEAD_DIM + d];
    }
    shared.q[column][d] = x;
  }
  barrier();
  if (a.hadamard_block) hadamard(shared.q, a.hadamard_block);
}

// Find out which 8 query rows there are and what they see; before all else.
OKV_DEVICE void load_positions(const Arguments &a, const Place &at, Shared &shared) {
  if (thread() < COLUMNS) {
    const int column = thread(), row = COLUMNS * at.tile(a) + column;
    const int query = row % a.queries;
    i64 position = -2;
    int first = 0, end = 0, query_head = -1;
    if (row < at.group_rows(a)) {
      query_head = at.head * (a.query_heads / a.kv_heads) + row / a.queries;
      position = a.q_positions[(i64)at.batch * a.queries + query];
      if (position >= 0 && a.lengths) {
        end = tokens_up_to(a, at.batch, position);
        first = position >= a.window ? tokens_up_to(a, at.batch, position - a.window) : 0;
      }
    }
    shared.position[column] = position;
    shared.first[column] = first, shared.end[column] = end;
    shared.query_head[column] = query_head, shared.query[column] = query;
  }
  barrier();
}

// The exponent that brings a row whose largest value is `largest` below 2 ** Q_EXPONENT.
OKV_DEVICE float row_scale(float largest, int exponent) {
  const int own = (int)(float_to_bits(largest) >> 23 & 255u) - 126;  // largest < 2 ** own
  const int up = exponent - own < -126 ? -126 : exponent - own > 126 ? 126 : exponent - own;
  return largest > 0.0f ? power(up) : 1.0f;
}

}  // namespace occam
