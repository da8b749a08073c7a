// What a call of a kernel is given. Python builds the same structs, field by field (call.py, encoding.py, stepping.py).
#pragma once

namespace occam {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

constexpr int MAX_PARTS = 4;

// Pages with the numbers from `start` on, in native order.
struct Slab {
  i64 start;
  const u8 *records;   // [page][KV head][records of a page][record bytes]
  const u8 *norms;     // [page][128], null without token scale
  const u8 *supers;    // float16 [page][KV head][records of a page][K, V], null with 16-bit metadata
};

// Tokens in full precision, channels side by side, rows aligned to 16 bytes; strides in elements.
struct Part {
  const void *k, *v;
  i64 k_batch, k_head, k_token;
  i64 v_batch, v_head, v_token;
  const i64 *positions;  // [B][tokens], -1 for an empty slot
  const float *logit_bias;  // [Hq], or null
  int tokens;
  int dtype;
};

struct Arguments {
  const void *q;  // [B][Hq][Tq][D], strides in elements
  i64 q_batch, q_head, q_token;
  void *out;
  i64 out_batch, out_head, out_token;
  const i64 *q_positions;  // [B][Tq]

  const Slab *slabs;
  const i64 *table;  // [B][table_width]
  const i64 *lengths, *first_position;  // [B]
  const i64 *skips;  // [B][skip_count], or null

  const float *sinks;    // [Hq], or null
  const float *balance;  // [H][D], or null

  float *partial_sums;    // [B][H][tiles][splits][8][D], when there are several splits
  float *partial_softmax; // [B][H][tiles][splits][8][largest, weight]
  u32 *counters;          // [B][H][tiles], zeros

  i64 window;  // positions
  int slab_count, table_width, skip_count;
  int query_heads, kv_heads, queries;
  int q_dtype;
  int packed_splits, splits;  // the splits behind the packed ones read tokens in full precision
  int tiles;                  // of 8 query rows of a KV head
  int part_count;
  int hadamard_block, output_block;  // 0: no rotation
  float scale, softcap;
  Part parts[MAX_PARTS];
};

// K or V in full precision, [B][H][T][D], channels side by side; strides in elements.
struct View {
  void *x;
  i64 batch, head, token;
  int dtype;
  int aligned;  // rows begin at multiples of 16 bytes
};

enum Grid : int { MINMAX = 0, PAPER = 1, UNBIASED = 2 };

// How tokens cross into cache space and become records.
struct Rules {
  const float *balance;  // [H][D], or null
  int k_block, v_block;  // of the rotation, 0: none
  float k_factor, v_factor;  // block ** -0.5, 1 without rotation
  int grid;
  float k_clip, v_clip;
};

// Why records must not be used, as bits of a word.
enum Flag : u32 { DOES_NOT_FIT = 1, BEYOND_RANGE = 2, NO_ROOM = 4 };

struct EncodeArguments {
  View k, v;      // [N][H][GROUP][D]
  u8 *records;    // [N][H][RECORD_BYTES]
  void *norms;    // [N][GROUP], null without token scale
  u16 *supers;    // [N][H][K, V], null with 16-bit metadata
  u32 *flags;
  int kv_heads, heads;  // `heads` of a block
  Rules rules;
};

struct AppendArguments {
  View k, v;            // the new tokens, [B][H][1][D]
  View ring_k, ring_v;  // [B][H][slots][D]; token n lies in slot n % slots
  i64 *packed, *residual, *position;  // [B]; `position`: of the newest token
  i64 *positions;       // [B][slots], -1 for an empty slot
  float *squares;       // [B][square_slots][H]: sums of squares of the ring's K; token n in slot n % square_slots
  const Slab *slabs;
  const i64 *table;     // [B][table_width], -1 behind the last page
  u32 *counters;        // [B], zeros
  u32 *flags;
  int slab_count, table_width, kv_heads, slots, square_slots;
  int tokens;           // of each sequence: 0 or 1
  int flush_tokens;     // packed at a time
  Rules rules;
};

}  // namespace occam
