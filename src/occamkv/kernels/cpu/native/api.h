// The C interface of the CPU backend. Plain structs of pointers and integers: ctypes mirrors them in `library.py`.
// All tensors are described by strides in elements; the last dimension is contiguous.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define OKV_API extern "C" __declspec(dllexport)
#else
#define OKV_API extern "C" __attribute__((visibility("default")))
#endif

enum { OKV_ABI = 2 };         // raised with every change of a struct or a function
enum { OKV_PAGE_TOKENS = 128 };
enum { OKV_MAX_HEAD_DIM = 256 };

enum okv_dtype : int32_t { OKV_F32 = 0, OKV_BF16 = 1, OKV_F16 = 2, OKV_BOOL = 3 };
enum okv_grid : int32_t { OKV_MINMAX = 0, OKV_PAPER = 1, OKV_UNBIASED = 2 };

// A format at one head_dim: what docs/format.md says about a record, with the byte offsets of its sections.
struct okv_layout {
  int32_t kv_heads, head_dim, width;  // width: head_dim rounded up to a multiple of 32
  int32_t k_bits, v_bits;             // 2, 3, 4
  int32_t k_per_token;                // 0: K groups are channels over record_tokens; 1: runs of channels of a token
  int32_t k_group, v_group;           // channels of a group (k_group only with k_per_token), at most head_dim
  int32_t record_tokens;              // 32, 64, 128
  int32_t metadata_bits;              // 16 or 8
  int32_t norm_bits;                  // 0: no token scale; 16 or 32
  int32_t k_scale, k_minimum, v_codes, v_scale, v_minimum, record_bytes;  // offsets; k_codes lie at 0
};

// Some pages: records uint8 [count][kv_heads][128 / record_tokens][record_bytes], norms [count][128],
// super_scales float16 [count][kv_heads][128 / record_tokens][2] with 8-bit metadata. Numbered from `start`.
struct okv_slab {
  uint8_t *records;
  void *norms;
  uint16_t *super_scales;
  int64_t start, count;
};

// The packed tokens of `batch` sequences; see PackedTokens in kernels/contract.py.
struct okv_packed {
  okv_layout layout;
  int64_t slab_count;
  const okv_slab *slabs;
  const int64_t *table;  // [batch][table_width], page numbers
  int64_t table_width, table_stride;
  const int64_t *lengths;         // [batch], multiples of record_tokens
  const int64_t *first_position;  // [batch]
  const int64_t *skips;           // [batch][skip_count] ascending, or null
  int64_t skip_count;
};

// A tensor [batch, heads, tokens, head_dim].
struct okv_tensor {
  void *data;
  int64_t batch_stride, head_stride, token_stride;
  int32_t dtype, reserved;
};

// Tokens in full precision.
struct okv_full {
  okv_tensor k, v;
  int64_t tokens;
  const int64_t *positions;  // [batch][tokens], -1 for an empty slot
  const float *logit_bias;   // [query_heads], added to the logits of all these tokens, or null
};

// What K lies without and logits get back: see KeyBias in ops/rope.py. Pair p is a plane in which the bias turns by
// frequencies[p] per position; `lanes` are the pairs rounded up to a multiple of 16, with zeros in the vector.
struct okv_key_bias {
  int64_t pairs, lanes;
  int64_t reach;                 // the tables hold positions below this one
  const double *frequencies;     // [pairs]
  const int64_t *first, *second; // [pairs], channels
  const float *vector;           // [kv_heads][2][lanes], its values in the first and the second channels
  const float *coarse;           // [reach / 128][2][lanes]: cosines and sines of whole pages
  const float *fine;             // [128][2][lanes]: of the tokens of a page
  const float *fine_columns;     // [2][pairs][128]: the same, tokens side by side
};

// Any mask [batch or 1, heads or 1, queries, positions]; a stride of 0 repeats. OKV_BOOL, or additive.
struct okv_mask {
  const void *data;
  int64_t batch_stride, head_stride, query_stride, position_stride, positions;
  int32_t dtype, reserved;
};

struct okv_attend {
  okv_tensor q, out;  // [batch, query_heads, queries, head_dim]
  int64_t batch, query_heads, kv_heads, queries, head_dim;
  const int64_t *q_positions;  // [batch][queries], -1 for a pad
  const okv_packed *packed;    // or null
  const okv_full *full;
  int64_t full_count;
  const okv_mask *mask;  // or null: causal
  const float *sinks;    // [query_heads], or null
  const float *balance;  // d, [kv_heads][head_dim], or null: q is divided by it
  const okv_key_bias *key_bias;  // or null
  float scale, softcap;  // softcap 0: none
  int64_t window;        // a query sees positions above its own minus this
  int32_t hadamard_block;         // 0: q is not rotated
  int32_t output_hadamard_block;  // 0: the output is not rotated back
  int32_t threads, reserved;
};

// Groups of tokens to be encoded: K and V are [groups, kv_heads, record_tokens, head_dim], `batch` meaning groups.
struct okv_encode {
  okv_layout layout;
  okv_tensor k, v;
  int64_t groups;
  int32_t grid;
  float k_clip, v_clip;
  int32_t k_hadamard_block, v_hadamard_block;  // 0: none
  const float *balance;                        // d, [kv_heads][head_dim], or null: K is multiplied by it
  const float *feedback;                       // F, [kv_heads][head_dim][head_dim], or null
  const float *given_norms;  // [groups][record_tokens], already rounded to the stored dtype; null: L2
  uint8_t *records;          // out: [groups][kv_heads][record_bytes]
  void *norms;               // out: [groups][record_tokens] in the stored dtype, or null
  uint16_t *super_scales;    // out: float16 [groups][kv_heads][2], or null
  int32_t threads, reserved;
};

// Records to be read back: float32 K and V [groups, kv_heads, record_tokens, head_dim], norms multiplied in.
struct okv_decode {
  okv_layout layout;
  const uint8_t *records;  // [groups][kv_heads] with these strides in bytes / entries
  int64_t group_stride, head_stride;
  const void *norms;                                // [groups][record_tokens], or null
  const uint16_t *super_scales;                     // or null
  int64_t super_group_stride, super_head_stride;    // in float16 numbers
  int64_t groups;
  okv_tensor k, v;  // out, float32 or bfloat16
  int32_t threads, reserved;
};

// One token of every sequence: a key bias is taken out of it, it is rotated and put into the ring, read together with
// all others, and what is due is packed into pages that are there already. Counts are brought up to date when everything
// has worked.
struct okv_step {
  okv_attend attend;  // queries 1; q_positions, packed, full and full_count are filled in by the call
  okv_packed packed;  // lengths are taken from the counts
  okv_tensor k, v;    // the new token in model space, [batch, kv_heads, 1, head_dim]
  okv_tensor ring_k, ring_v, pin_k, pin_v;  // [batch, kv_heads, slots, head_dim] in cache space
  int64_t ring_slots, pin_slots;
  const int64_t *pin_positions;          // [batch][pin_slots], -1 for an empty slot
  const float *pin_logit_bias;           // [query_heads], or null
  int64_t *packed_tokens, *residual;     // [batch], changed by the call
  const int64_t *due;                    // [batch]: tokens to be packed afterwards, whole records
  okv_encode encode;  // how records are made: layout, grid, clips, feedback; the rest is filled in by the call
};

OKV_API int32_t okv_abi(void);
OKV_API const char *okv_isa(void);                // the instruction set in use
OKV_API const char *okv_isas(void);               // all that this library has and this machine runs, best first
OKV_API const char *okv_built(void);              // all that this library has
OKV_API int32_t okv_select(const char *isa);      // 0, or -1 if this machine or library cannot
OKV_API const char *okv_error(void);              // what the last failed call of this thread said
// These return 0, or a number other than 0 after which okv_error() has a sentence.
OKV_API int32_t okv_attend_run(const okv_attend *args);
OKV_API int32_t okv_encode_run(const okv_encode *args);
OKV_API int32_t okv_decode_run(const okv_decode *args);
OKV_API int32_t okv_step_run(okv_step *args);
