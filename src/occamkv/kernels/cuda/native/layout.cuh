// Where things lie in a page of native order, all known when the kernel is compiled. See docs/format.md.
#pragma once
#include "device.cuh"

namespace occam {

constexpr int K_BITS = OKV_K_BITS, V_BITS = OKV_V_BITS;
constexpr int GROUP = OKV_GROUP;      // tokens of a record
constexpr int V_GROUP = OKV_V_GROUP;  // channels of a V group, at most HEAD_DIM
constexpr int HEAD_DIM = OKV_HEAD_DIM;
constexpr bool SMALL_METADATA = OKV_METADATA == 8;
constexpr int NORM_BYTES = OKV_NORM_BYTES;  // 0 without token scale

constexpr int PAGE_TOKENS = 128, WARPS = 4, THREADS = 32 * WARPS;
constexpr int COLUMNS = 8;                     // query rows of a tile
constexpr int BLOCKS = (HEAD_DIM + 31) / 32;   // of 32 channels
constexpr int WIDTH = 32 * BLOCKS;
constexpr int TILES = WIDTH / 16;              // of 16 channels
constexpr int V_GROUPS = (HEAD_DIM + V_GROUP - 1) / V_GROUP;
constexpr int RECORDS = PAGE_TOKENS / GROUP;
constexpr int SUBGROUPS = GROUP / 32;          // of 32 tokens, the rows of two tile products
// Pages that a block reads at a time. What is done once for the tokens of a warp weighs more in short rows.
constexpr int STEP_PAGES = BLOCKS <= 2 && K_BITS + V_BITS == 4 ? 2 : 1;
constexpr int PARTS = STEP_PAGES;              // subgroups that a warp reads at a time
constexpr int META_BYTES = SMALL_METADATA ? 1 : 2;

constexpr int K_CODES = 0;
constexpr int K_SCALE = K_CODES + GROUP * WIDTH * K_BITS / 8;
constexpr int K_MINIMUM = K_SCALE + WIDTH * META_BYTES;
constexpr int V_CODES = K_MINIMUM + WIDTH * META_BYTES;
constexpr int V_SCALE = V_CODES + GROUP * WIDTH * V_BITS / 8;
constexpr int V_MINIMUM = V_SCALE + GROUP * V_GROUPS * META_BYTES;
constexpr int RECORD_BYTES = V_MINIMUM + GROUP * V_GROUPS * META_BYTES;
constexpr int PAGE_BYTES = RECORDS * RECORD_BYTES;
constexpr int V_SUBGROUP_META = 32 * V_GROUPS * META_BYTES;
static_assert(RECORD_BYTES % 16 == 0, "pages are copied 16 bytes at a time");

// Codes are read by the tensor core as float16 subnormals: bits 0 .. 9 of a half stand for 2 ** -24 each. A code that
// lies `shift` bits up counts 2 ** shift times; q, for K, and the result, for V, make up for it.
OKV_DEVICE constexpr int code_shift(int bits, int step, int high) {
  return bits == 4 ? 4 * high : 2 * (2 * step + high);
}

OKV_DEVICE constexpr half2 both(u32 half) { return half | half << 16; }
constexpr u32 HALF_ONE = 15u << 10;
OKV_DEVICE constexpr half2 two_to_the(int exponent) { return both((u32)(15 + exponent) << 10); }

// What keeps products of float16 in range. q: below 2 ** Q_EXPONENT in every query row, so that q times a scale of K
// (a float8 / 256, at most 127 with token scale, 4094 without) stays below 65504. p: times 2 ** P_EXPONENT, and the
// scale of V is at most 1023. `layout.py` refuses other records.
constexpr int Q_EXPONENT = SMALL_METADATA ? 14 : NORM_BYTES ? 9 : 4;
constexpr int P_EXPONENT = 6;
constexpr int SCALE_EXPONENT = 8;  // float8 e4m3 bits, moved into a float16, stand for 1 / 256

OKV_DEVICE float power(int exponent) { return bits_to_float((u32)(127 + exponent) << 23); }

constexpr float LOWEST = -1e30f;   // the largest logit before there is one
constexpr u32 HIDDEN = 0xff800000u;  // the logit of a token that is not seen: minus infinity, 0 beside LOWEST, too
constexpr float LOG2_E = 1.4426950408889634f;

}  // namespace occam
