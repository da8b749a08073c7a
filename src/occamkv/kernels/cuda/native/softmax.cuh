// The online softmax (Milakov and Gimelshein, arXiv:1805.02867) of a warp over 8 columns, private to the warp.
#pragma once
#include "shared.cuh"

namespace occam {

// A lane holds two columns, 2 pair and 2 pair + 1, and of each result row and row + 8 of every 16 channels.
struct Running {
  float largest[2] = {LOWEST, LOWEST};
  float sums[TILES][4];
  float others[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sums of p times the V minimum of group `row`; of p, where row is 0

  OKV_DEVICE Running() {
#pragma unroll
    for (int i = 0; i < TILES; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
  }

  // Take logits of 16 N tokens that, times the `unit` of their column (above 0), are in units of log 2. Return their
  // weights as factors of V, times 2 ** `exponent`.
  template <int N>
  OKV_DEVICE void take(const float (&logits)[N][4], const float (&unit)[2], half2 (&factors)[2 * N], int exponent) {
    float top[2] = {logits[0][0], logits[0][1]};
#pragma unroll
    for (int t = 0; t < N; t++) {
      top[0] = fmaxf(top[0], fmaxf(logits[t][0], logits[t][2]));
      top[1] = fmaxf(top[1], fmaxf(logits[t][1], logits[t][3]));
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      top[0] = fmaxf(top[0], shuffle_xor(top[0], mask));
      top[1] = fmaxf(top[1], shuffle_xor(top[1], mask));
    }
    top[0] *= unit[0], top[1] *= unit[1];
    if (any(top[0] > largest[0] || top[1] > largest[1])) grow(top);
    const float offset[2] = {(float)exponent - largest[0], (float)exponent - largest[1]};
#pragma unroll
    for (int t = 0; t < N; t++) {
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; i++) p[i] = power_of_two(logits[t][i] * unit[i & 1] + offset[i & 1]);
      factors[2 * t] = transpose(to_half2(p[0], p[1]));
      factors[2 * t + 1] = transpose(to_half2(p[2], p[3]));
    }
  }

  OKV_DEVICE void grow(const float (&top)[2]) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float next = fmaxf(largest[c], top[c]), shrink = power_of_two(largest[c] - next);
      largest[c] = next;
      others[c] *= shrink, others[c + 2] *= shrink;
#pragma unroll
      for (int i = 0; i < TILES; i++) sums[i][c] *= shrink, sums[i][c + 2] *= shrink;
    }
  }
};

OKV_DEVICE float soft_cap(float logit, float cap) {
  const float e = power_of_two(logit * (2.0f * LOG2_E / cap));  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
  return cap * (1.0f - 2.0f * reciprocal(e + 1.0f));
}

}  // namespace occam
