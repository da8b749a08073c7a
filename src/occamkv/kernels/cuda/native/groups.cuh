// Groups of values that share a scale and a minimum: their range, what is stored of it. See ops/affine.py.
#pragma once
#include "rows.cuh"

namespace occam {

constexpr float LARGEST_HALF = 65504.0f;
constexpr float LARGEST_E4M3 = 448.0f;
constexpr float MIN_STEPS = 16.0f;  // with 8-bit metadata the minimum counts in scale / 16

struct Range {
  float low, high;
};

struct Pair {
  float a, b;
  OKV_DEVICE Pair operator+(Pair other) const { return {a + other.a, b + other.b}; }
};

OKV_DEVICE float or_one(float scale) { return scale > 0.0f ? scale : 1.0f; }
OKV_DEVICE float clamped(float x, float most) { return fminf(fmaxf(x, 0.0f), most); }

OKV_DEVICE bool storable(Range r, float steps) {
  return fabsf(r.low) <= LARGEST_HALF && r.high - r.low <= LARGEST_HALF * steps;
}

// Two sums over `count` numbers, a multiple of 8, in the order of ops/sums.py; `column` is this thread's own memory.
template <class Leaf>
OKV_DEVICE Pair folded(int count, float *column, Leaf leaf) {
  int width = count / 8;
#pragma unroll 1
  for (int i = 0; i < width; i++) {
    const Pair sum = folded_eight(width, [&](int k) { return leaf(i + k); });
    column[2 * i * THREADS] = sum.a, column[(2 * i + 1) * THREADS] = sum.b;
  }
#pragma unroll 1
  for (; width > 1; width = width / 2 + width % 2) {
    const int half = width / 2;
    for (int i = 0; i < 2 * half; i++) column[i * THREADS] += column[(i + 2 * half) * THREADS];
    if (width % 2)
      for (int i = 0; i < 2; i++) column[(2 * half + i) * THREADS] = column[(2 * width - 2 + i) * THREADS];
  }
  return {column[0], column[THREADS]};
}

// affine.refit
template <class Value>
OKV_DEVICE Range refit(int count, Range r, float steps, float *column, Value value) {
  const float old_scale = (r.high - r.low) / steps, divisor = or_one(old_scale);
  const auto code = [&](float x) { return clamped(rintf((x - r.low) / divisor), steps); };
  const Pair sums = folded(count, column, [&](int i) { return Pair{value(i), code(value(i))}; });
  const float mean = sums.a / (float)count, code_mean = sums.b / (float)count;
  const Pair products = folded(count, column, [&](int i) {
    const float x = value(i) - mean, y = code(value(i)) - code_mean;
    return Pair{x * x, x * y};
  });
  const float slope = products.b > 0.0f ? products.a / fmaxf(products.b, 1e-30f) : old_scale;
  const float scale = 2.0f * old_scale < slope ? 2.0f * old_scale : slope;
  const float low = mean - scale * code_mean;
  return {low, low + steps * scale};
}

// affine.apply_grid and, where it can be stored, affine.refit, for a range as affine.group_range gives it.
template <class Value>
OKV_DEVICE Range on_grid(Range r, int count, int grid, float clip, float steps, float *column, Value value) {
  r = {r.low + 0.0f, r.high + 0.0f};  // one sign of zero
  if (clip != 1.0f) {
    const float middle = (r.high + r.low) / 2.0f, half = (r.high - r.low) / 2.0f * clip;
    r = {middle - half, middle + half};
  }
  if (grid == PAPER) {
    const float scale = (r.high - r.low) / steps, zero = rintf(-r.low / or_one(scale));
    const float moved = scale > 0.0f ? -zero * scale : r.low;
    r = {moved, moved + steps * scale};
  }
  if (grid == UNBIASED) {
    const Range wide = refit(count, r, steps, column, value);
    if (storable(wide, steps)) r = wide;
  }
  return r;
}

// What is stored of a range, and what that means.
struct Metadata {
  u32 stored_scale, stored_minimum;
  float scale, minimum;
};

OKV_DEVICE Metadata round_to_16_bits(Range r, float steps) {
  const u16 minimum = float_to_half(r.low);
  const float low = half_to_float(minimum);
  const u16 scale = float_to_half(fmaxf((r.high - low) / steps, 0.0f) + 0.0f);
  return {scale, minimum, half_to_float(scale), low};
}

// float8 e4m3 of a number from 0 to 448, rounded to nearest even; and back.
OKV_DEVICE u32 to_e4m3(float x) {
  const u32 size = float_to_bits(x);
  if (size < 121u << 23) return float_to_bits(x + 16384.0f) - 0x46800000u;  // 2^14 has steps of 2^-9, as e4m3 near 0
  return (size - (120u << 23) + 0x7ffffu + (size >> 20 & 1u)) >> 20;
}

OKV_DEVICE float from_e4m3(u32 byte) {
  return byte < 8u ? (float)byte * 0.001953125f : bits_to_float((byte << 20) + (120u << 23));
}

// The scale that 8 bits would need: large enough to reach the minimum.
OKV_DEVICE float wanted_scale(Range r, float steps) {
  return fmaxf((r.high - r.low) / steps, fabsf(r.low) * (float)(16.0 / 127));
}

// The power of two above largest / 448, between 2^-14 and 2^15; 1 for 0.
OKV_DEVICE float super_scale_of(float largest) {
  const float quotient = largest / LARGEST_E4M3;
  const int exponent = quotient > 0.0f ? (int)(float_to_bits(quotient) >> 23) - 126 : 0;
  return power(exponent < -14 ? -14 : exponent > 15 ? 15 : exponent);
}

OKV_DEVICE Metadata round_to_8_bits(float low, float wanted, float unit) {
  const u32 byte = to_e4m3(fminf(wanted / unit, LARGEST_E4M3));
  const float scale = from_e4m3(byte) * unit;
  const float minimum = fminf(fmaxf(rintf(low * MIN_STEPS / or_one(scale)), -128.0f), 127.0f);
  return {byte, (u32)(int)minimum & 255u, scale, minimum * (scale / MIN_STEPS)};
}

}  // namespace occam
