// Rows of channels in shared memory: read, brought into cache space, measured.
//
// The arithmetic here and in groups.cuh is that of ops/, operation by operation, and sums of products are not
// contracted (`building.py`): records are byte for byte those of formats/records.py.
#pragma once
#include "shared.cuh"

namespace occam {

constexpr int EIGHTS = WIDTH / 8;

// Floats that lie together.
template <int N>
OKV_DEVICE void load_floats(float (&to)[N], const float *from) {
  constexpr int AT_ONCE = N < 4 ? N : 4;
  u32 words[N];
#pragma unroll
  for (int i = 0; i < N; i += AT_ONCE) load<AT_ONCE>(words + i, from + i);
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = bits_to_float(words[i]);
}

OKV_DEVICE void store_floats(float *to, const float (&from)[8]) {
  u32 words[8];
#pragma unroll
  for (int i = 0; i < 8; i++) words[i] = float_to_bits(from[i]);
  store<4>(to, words);
  store<4>(to + 4, words + 4);
}

OKV_DEVICE void load_eight(const View &from, i64 index, float (&to)[8]) {
  if (!from.aligned) {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = load_float(from.x, index + i, from.dtype);
    return;
  }
  if (from.dtype == FLOAT32) return load_floats(to, (const float *)from.x + index);
  u32 words[4];
  load<4>(words, (const u16 *)from.x + index);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool half = from.dtype == FLOAT16;
    to[2 * i] = half ? half_to_float((u16)words[i]) : bits_to_float(words[i] << 16);
    to[2 * i + 1] = half ? half_to_float((u16)(words[i] >> 16)) : bits_to_float(words[i] & 0xffff0000u);
  }
}

// What a value becomes when it is stored in a tensor.
OKV_DEVICE float stored(float x, int dtype) {
  if (dtype == FLOAT32) return x;
  return dtype == FLOAT16 ? half_to_float(float_to_half(x)) : bits_to_float((u32)float_to_bfloat(x) << 16);
}

template <int RADIX>
OKV_DEVICE void butterflies(float (&x)[RADIX], int stages) {
#pragma unroll
  for (int half = 1; half < RADIX; half *= 2)
    if (half < stages)
#pragma unroll
      for (int i = 0; i < RADIX; i++)
        if (!(i & half)) {
          const float first = x[i], second = x[i + half];
          x[i] = first + second, x[i + half] = first - second;
        }
}

// log2(RADIX) stages of the rotation, the first of which adds channels `half` apart.
template <int RADIX, int ROW>
OKV_DEVICE void wide_butterflies(float *x, int rows, int half) {
  constexpr int UNITS = HEAD_DIM / RADIX;
  for (int unit = thread(); unit < rows * UNITS; unit += THREADS) {
    const int j = unit % UNITS;
    float *at = x + unit / UNITS * ROW + j / half * RADIX * half + j % half;
    float y[RADIX];
#pragma unroll
    for (int i = 0; i < RADIX; i++) y[i] = at[i * half];
    butterflies<RADIX>(y, RADIX);
#pragma unroll
    for (int i = 0; i < RADIX; i++) at[i * half] = y[i];
  }
  barrier();
}

// What is done to the rows of one head on their way to shared memory.
struct Way {
  const float *balance;   // [D], or null
  int block;
  float factor;
  const float *divisors;  // of each row, in shared memory, or null
};

// Scale 8 rotated channels, divide them by the token norm; `check` becomes NaN if one is not finite before that.
OKV_DEVICE void arrive(float (&y)[8], const Way &way, int row, float &check) {
  if (way.factor != 1.0f)
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] *= way.factor;
#pragma unroll
  for (int i = 0; i < 8; i++) check = fused(y[i], 0.0f, check);
  if (way.divisors)
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] /= way.divisors[row];
}

// Read rows into cache space, `from` on; zeros behind HEAD_DIM. Returns whether this thread saw finite values only.
template <int ROW>
OKV_DEVICE bool load_rows(float *x, int rows, const View &view, i64 from, const Way &way) {
  float check = 0.0f;
  for (int unit = thread(); unit < rows * EIGHTS; unit += THREADS) {
    const int row = unit / EIGHTS, c = unit % EIGHTS * 8;
    float y[8] = {};
    if (c < HEAD_DIM) {
      load_eight(view, from + row * view.token + c, y);
      if (way.balance)
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] *= way.balance[c + i];
      butterflies<8>(y, way.block);
      if (way.block <= 8) arrive(y, way, row, check);
    }
    store_floats(x + row * ROW + c, y);
  }
  barrier();
  if (way.block <= 8) return check == 0.0f;
  for (int half = 8; half < way.block;) {
    if (half * 8 <= way.block) wide_butterflies<8, ROW>(x, rows, half), half *= 8;
    else if (half * 4 <= way.block) wide_butterflies<4, ROW>(x, rows, half), half *= 4;
    else wide_butterflies<2, ROW>(x, rows, half), half *= 2;
  }
  for (int unit = thread(); unit < rows * (HEAD_DIM / 8); unit += THREADS) {
    const int row = unit / (HEAD_DIM / 8);
    float *at = x + row * ROW + unit % (HEAD_DIM / 8) * 8;
    float y[8];
    load_floats(y, at);
    arrive(y, way, row, check);
    store_floats(at, y);
  }
  barrier();
  return check == 0.0f;
}

// Add up 8 numbers as ops/sums.py does: the second half to the first, and again. Works for whatever has a +.
template <class Leaf>
OKV_DEVICE auto folded_eight(int step, Leaf leaf) {
  const auto even = (leaf(0) + leaf(4 * step)) + (leaf(2 * step) + leaf(6 * step));
  return even + ((leaf(step) + leaf(5 * step)) + (leaf(3 * step) + leaf(7 * step)));
}

// The sums of squares of rows over HEAD_DIM channels, each handed to `take(row, sum)`. The rows are lost.
template <int ROW, class Take>
OKV_DEVICE void sum_squares(float *x, int rows, Take take) {
  constexpr int WAYS = HEAD_DIM / 8;
  for (int unit = thread(); unit < rows * WAYS; unit += THREADS) {
    float *at = x + unit / WAYS * ROW + unit % WAYS;
    *at = folded_eight(WAYS, [&](int i) { return at[i] * at[i]; });
  }
  barrier();
  for (int row = thread(); row < rows; row += THREADS) {
    float *at = x + row * ROW;
    for (int width = WAYS; width > 1; width = width / 2 + width % 2) {
      const int half = width / 2;
      for (int i = 0; i < half; i++) at[i] += at[i + half];
      if (width % 2) at[half] = at[width - 1];
    }
    take(row, at[0]);
  }
  barrier();
}

// Round a token norm to what is stored of it, at `index`; returns that.
OKV_DEVICE float store_norm(void *norms, i64 index, float norm, bool writes) {
  if (NORM_BYTES == 2) {
    const u16 half = float_to_half(norm);
    if (writes) ((u16 *)norms)[index] = half;
    return half_to_float(half);
  }
  if (writes) ((float *)norms)[index] = norm;
  return norm;
}

}  // namespace occam
