// From the warps' sums to the result: the warps of a block, then the splits of a row, in a fixed order.
#pragma once
#include "packed.cuh"
#include "full.cuh"

namespace occam {

// Undo what codes, scales and weights were multiplied by, add what the minimums of V give, and put a warp's sums where
// all can read them. The ring is not needed any more.
OKV_DEVICE void leave(const Place &at, bool packed, Running &running, Merge &merge) {
  barrier();
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int column = 2 * at.pair + c;
    if (at.row == 0) {
      merge.largest[at.warp][column] = running.largest[c];
      merge.weight[at.warp][column] = running.others[c + 2] * (packed ? power(-P_EXPONENT) : 1.0f);
    }
    merge.minimums[at.warp][at.row][column] = running.others[c];
  }
  barrier();
  const float unit = power(-P_EXPONENT);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = 2 * at.pair + (i & 1), upper = i >> 1;
      float x = running.sums[tile][i];
      int channel = full_channel(tile, at.row, upper);
      if (packed) {
        const float minimum = merge.minimums[at.warp][16 * tile / V_GROUP < V_GROUPS ? 16 * tile / V_GROUP : 0][column];
        x = (x * power(24 - code_shift(V_BITS, tile & 1, upper)) + minimum) * unit;
        channel = 16 * tile + 8 * upper + at.row;
      }
      merge.sums[at.warp][column][channel] = x;
    }
  barrier();
}

// Where the splits of this block's rows leave their sums, and largest logits and weights.
struct Partial {
  float *sums, *softmax;
  u32 *counter;

  OKV_DEVICE Partial(const Arguments &a, const Place &at) {
    const i64 row = ((i64)at.batch * a.kv_heads + at.head) * a.tiles + at.tile(a);
    sums = a.partial_sums + row * a.splits * (COLUMNS * HEAD_DIM);
    softmax = a.partial_softmax + row * a.splits * (COLUMNS * 2);
    counter = a.counters + row;
  }
};

// Add up the warps: into `shared.q` if there is one split, else into the memory of partial results.
OKV_DEVICE void add_warps(const Arguments &a, const Place &at, Shared &shared) {
  const Merge &merge = shared.merge;
  const Partial partial(a, at);
  const int split = at.split(a);
#pragma unroll 1
  for (int i = thread(); i < COLUMNS * HEAD_DIM; i += THREADS) {
    const int column = i / HEAD_DIM, d = i % HEAD_DIM;
    if (shared.query_head[column] < 0) break;
    float largest = LOWEST, sum = 0.0f, weight = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, merge.largest[w][column]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float share = power_of_two(merge.largest[w][column] - largest);
      sum += merge.sums[w][column][d] * share;
      weight += merge.weight[w][column] * share;
    }
    if (a.splits == 1) {
      shared.q[column][d] = sum;
      if (d == 0) shared.largest[column] = largest, shared.weight[column] = weight;
    } else {
      partial.sums[split * (COLUMNS * HEAD_DIM) + i] = sum;
      float *softmax = partial.softmax + 2 * (split * COLUMNS + column);
      if (d == 0) softmax[0] = largest, softmax[1] = weight;
    }
  }
  barrier();
}

// Whether this block is the last one of its row to finish; then it reads what all have left.
OKV_DEVICE bool is_last(const Arguments &a, const Place &at, Shared &shared) {
  fence();
  barrier();
  if (thread() == 0) {
    u32 *counter = Partial(a, at).counter;
    shared.is_last = count_up(counter) == (u32)a.splits - 1;
    if (shared.is_last) *counter = 0;  // for the next call
  }
  barrier();
  fence();
  return shared.is_last;
}

// Add up the splits into `shared.q`. Threads share a column's splits for what is one number per split, and take whole runs
// of channels for the sums, so that many loads are on their way at once: one block does this while all others are done.
OKV_DEVICE void add_splits(const Arguments &a, const Place &at, Shared &shared) {
  constexpr int STEP = THREADS / COLUMNS, RUNS = (COLUMNS * HEAD_DIM / 4 + THREADS - 1) / THREADS;
  const Partial partial(a, at);
  Shares &shares = shared.shares;
  const int own = thread() % COLUMNS;
  float largest = LOWEST, weight = 0.0f, sums[RUNS][4] = {};
  for (int split = thread() / COLUMNS; split < a.splits; split += STEP)
    largest = fmaxf(largest, load_fresh(partial.softmax + 2 * (split * COLUMNS + own)));
  largest = fmaxf(largest, shuffle_xor(largest, 8));
  largest = fmaxf(largest, shuffle_xor(largest, 16));
  if (at.lane < COLUMNS) shares.of_warp[at.warp][own] = largest;
  barrier();
#pragma unroll
  for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shares.of_warp[w][own]);
  const int left = at.group_rows(a) - COLUMNS * at.tile(a), runs = (left < COLUMNS ? left : COLUMNS) * HEAD_DIM / 4;
  for (int first = 0; first < a.splits; first += SHARES) {
    const int count = a.splits - first < SHARES ? a.splits - first : SHARES;
    for (int i = thread() / COLUMNS; i < count; i += STEP) {
      const float *softmax = partial.softmax + 2 * ((first + i) * COLUMNS + own);
      const float share = power_of_two(load_fresh(softmax) - largest);
      weight += load_fresh(softmax + 1) * share;
      shares.of[i][own] = share;
    }
    barrier();
#pragma unroll
    for (int k = 0; k < RUNS; k++) {
      const int run = thread() + THREADS * k;
      if (run >= runs) break;
      const float *from = partial.sums + first * (COLUMNS * HEAD_DIM) + 4 * run;
#pragma unroll 8
      for (int i = 0; i < count; i++) {
        float x[4];
        load_fresh_4(x, from + i * (COLUMNS * HEAD_DIM));
#pragma unroll
        for (int j = 0; j < 4; j++) sums[k][j] += x[j] * shares.of[i][4 * run / HEAD_DIM];
      }
    }
    barrier();
  }
  weight += shuffle_xor(weight, 8);
  weight += shuffle_xor(weight, 16);
  if (at.lane < COLUMNS) shares.of_warp[at.warp][own] = weight;
#pragma unroll
  for (int k = 0; k < RUNS; k++) {
    const int run = thread() + THREADS * k;
    if (run < runs)
#pragma unroll
      for (int j = 0; j < 4; j++) shared.q[4 * run / HEAD_DIM][4 * run % HEAD_DIM + j] = sums[k][j];
  }
  barrier();
  if (thread() < COLUMNS) {
    weight = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) weight += shares.of_warp[w][own];
    shared.largest[own] = largest, shared.weight[own] = weight;
  }
  barrier();
}

// Divide by the weights, rotate back, and write the rows that exist.
OKV_DEVICE void finish(const Arguments &a, const Place &at, Shared &shared) {
#pragma unroll 1
  for (int i = thread(); i < COLUMNS * HEAD_DIM; i += THREADS) {
    const int column = i / HEAD_DIM, query_head = shared.query_head[column];
    if (query_head < 0) break;
    float weight = shared.weight[column], share = 1.0f;
    if (a.sinks) {  // one more token, without a value
      const float sink = fminf(a.sinks[query_head] * LOG2_E, -LOWEST);
      const float largest = fmaxf(shared.largest[column], sink);
      share = power_of_two(shared.largest[column] - largest);
      weight = weight * share + power_of_two(sink - largest);
    }
    shared.q[column][i % HEAD_DIM] *= weight > 0.0f ? share / weight : 0.0f;
  }
  barrier();
  if (a.output_block) hadamard(shared.q, a.output_block);
#pragma unroll 1
  for (int i = thread(); i < COLUMNS * HEAD_DIM; i += THREADS) {
    const int column = i / HEAD_DIM, d = i % HEAD_DIM, query_head = shared.query_head[column];
    if (query_head < 0) break;
    const i64 row = at.batch * a.out_batch + query_head * a.out_head + shared.query[column] * a.out_token;
    store_float(a.out, row + d, a.q_dtype, shared.q[column][d]);
  }
}

}  // namespace occam
