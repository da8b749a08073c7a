// Records of groups of tokens, in native order. Grid: groups, parts of the KV heads.
#pragma once
#include "pack.cuh"

namespace occam {

typedef EncodeArguments Given;
typedef Packing Memory;

// The token norms of a group, over all heads, in `shared.norms`. Returns flags.
OKV_DEVICE u32 find_norms(const EncodeArguments &a, i64 group, Packing &shared) {
  bool finite = true;
#pragma unroll 1
  for (int head = 0; head < a.kv_heads; head++) {
    const Rules &r = a.rules;
    const float *balance = r.balance ? r.balance + head * HEAD_DIM : nullptr;
    const i64 from = group * a.k.batch + head * a.k.head;
    finite &= load_rows<K_ROW>(shared.x, GROUP, a.k, from, {balance, r.k_block, r.k_factor, nullptr});
    sum_squares<K_ROW>(shared.x, GROUP, [&](int token, float sum) {
      shared.norms[token] = head ? shared.norms[token] + sum : sum;
    });
  }
  for (int token = thread(); token < GROUP; token += THREADS) {
    const float norm = store_norm(a.norms, group * GROUP + token, sqrtf(shared.norms[token]), block_y() == 0);
    finite &= norm <= 3.4028235e38f;
    shared.norms[token] = or_one(norm);
  }
  barrier();
  return finite ? 0u : (u32)DOES_NOT_FIT;
}

OKV_DEVICE void run(const EncodeArguments &a, Packing &shared) {
  const i64 group = block_x();
  const int first = block_y() * a.heads, end = first + a.heads < a.kv_heads ? first + a.heads : a.kv_heads;
  u32 flags = NORM_BYTES ? find_norms(a, group, shared) : 0;
#pragma unroll 1
  for (int head = first; head < end; head++) {
    const i64 number = group * a.kv_heads + head;
    flags |= pack_head(shared, a.rules, a.k, group * a.k.batch + head * a.k.head, a.v,
                       group * a.v.batch + head * a.v.head,
                       a.rules.balance ? a.rules.balance + head * HEAD_DIM : nullptr, a.records + number * RECORD_BYTES,
                       a.supers + number * 2);
  }
  if (flags) raise_flags(a.flags, flags);
}

}  // namespace occam
