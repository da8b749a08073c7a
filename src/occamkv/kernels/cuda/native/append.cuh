// Packs what is due of a sequence and takes its next token into the ring. Grid: KV heads, sequences.
//
// A block touches its own head of ring and records only, and counts change when the last block of a sequence is done:
// no block waits for another. What a token norm needs of the other heads was written by an earlier launch.
#pragma once
#include "pack.cuh"

namespace occam {

typedef AppendArguments Given;
typedef Packing Memory;

// Where the record of tokens `number` .. of a sequence lies.
struct RecordPlace {
  Slab slab;
  i64 page = -1, token;  // within the slab; the first one's place in its page

  OKV_DEVICE RecordPlace(const AppendArguments &a, int batch, i64 number) : token(number % PAGE_TOKENS) {
    const i64 index = number / PAGE_TOKENS;
    const i64 name = index < a.table_width ? a.table[(i64)batch * a.table_width + index] : -1;
    if (name < 0) return;
    int at = a.slab_count - 1;
    while (a.slabs[at].start > name) at--;
    slab = a.slabs[at], page = name - slab.start;
  }

  OKV_DEVICE i64 of_head(int kv_heads, int head) const { return (page * kv_heads + head) * RECORDS + token / GROUP; }
};

// Make a record of the oldest tokens in the ring. Returns flags.
OKV_DEVICE u32 pack_record(const AppendArguments &a, int batch, int head, i64 number, Packing &shared) {
  const RecordPlace place(a, batch, number);
  u32 flags = 0;
  if (NORM_BYTES) {
    for (int token = thread(); token < GROUP; token += THREADS) {
      const i64 slot = (i64)batch * a.square_slots + (number + token) % a.square_slots;
      const float *squares = a.squares + slot * a.kv_heads;
      float sum = squares[0];
      for (int other = 1; other < a.kv_heads; other++) sum += squares[other];
      const i64 index = place.page * PAGE_TOKENS + place.token + token;
      const float norm = store_norm((void *)place.slab.norms, index, sqrtf(sum), head == 0);
      if (!(norm <= 3.4028235e38f)) flags |= DOES_NOT_FIT;
      shared.norms[token] = or_one(norm);
    }
    barrier();
  }
  Rules rules = a.rules;  // the ring is in cache space
  rules.k_block = rules.v_block = 0;
  rules.k_factor = rules.v_factor = 1.0f;
  const i64 slot = number % a.slots, record = place.of_head(a.kv_heads, head);
  const i64 k_from = batch * a.ring_k.batch + head * a.ring_k.head + slot * a.ring_k.token;
  const i64 v_from = batch * a.ring_v.batch + head * a.ring_v.head + slot * a.ring_v.token;
  return flags | pack_head(shared, rules, a.ring_k, k_from, a.ring_v, v_from, nullptr,
                           (u8 *)place.slab.records + record * RECORD_BYTES, (u16 *)place.slab.supers + 2 * record);
}

// Bring one row into the ring, in the ring's dtype; it stays in `shared.x` as it was rounded.
OKV_DEVICE void enter(const View &from, const View &to, int batch, int head, i64 slot, const Way &way, Packing &shared) {
  load_rows<K_ROW>(shared.x, 1, from, batch * from.batch + head * from.head, way);
  const i64 row = batch * to.batch + head * to.head + slot * to.token;
  for (int c = thread(); c < HEAD_DIM; c += THREADS) {
    const float x = stored(shared.x[c], to.dtype);
    shared.x[c] = x;
    store_float(to.x, row + c, to.dtype, x);
  }
  barrier();
}

OKV_DEVICE void take_token(const AppendArguments &a, int batch, int head, i64 number, Packing &shared) {
  const Rules &r = a.rules;
  const i64 slot = number % a.slots;
  const float *balance = r.balance ? r.balance + head * HEAD_DIM : nullptr;
  enter(a.k, a.ring_k, batch, head, slot, {balance, r.k_block, r.k_factor, nullptr}, shared);
  if (NORM_BYTES)
    sum_squares<K_ROW>(shared.x, 1, [&](int, float sum) {
      a.squares[((i64)batch * a.square_slots + number % a.square_slots) * a.kv_heads + head] = sum;
    });
  enter(a.v, a.ring_v, batch, head, slot, {nullptr, r.v_block, r.v_factor, nullptr}, shared);
}

// Whether this block is the last one of its sequence to finish.
OKV_DEVICE bool is_last(const AppendArguments &a, int batch, Packing &shared) {
  fence();
  barrier();
  if (thread() == 0) {
    shared.is_last = count_up(&a.counters[batch]) == (u32)a.kv_heads - 1;
    if (shared.is_last) a.counters[batch] = 0;  // for the next launch
  }
  barrier();
  return shared.is_last;
}

OKV_DEVICE void run(const AppendArguments &a, Packing &shared) {
  const int head = block_x(), batch = block_y();
  const i64 first = a.packed[batch];
  i64 packed = first, residual = a.residual[batch];
  u32 flags = 0;
  if (a.flush_tokens && residual >= PAGE_TOKENS) {
    if (RecordPlace(a, batch, packed + a.flush_tokens - 1).page < 0) flags = NO_ROOM;
    else
      for (const i64 end = packed + a.flush_tokens; packed < end; packed += GROUP, residual -= GROUP)
        flags |= pack_record(a, batch, head, packed, shared);
  }
  const bool taken = a.tokens && residual < a.slots;
  if (taken) take_token(a, batch, head, packed + residual, shared);
  else if (a.tokens) flags |= NO_ROOM;
  if (flags) raise_flags(a.flags, flags);
  if (!is_last(a, batch, shared)) return;
  i64 *positions = a.positions + (i64)batch * a.slots;
  for (i64 number = first + thread(); number < packed; number += THREADS) positions[number % a.slots] = -1;
  if (thread() == 0) {  // the new token's slot is an empty one or the oldest token's, which this thread has emptied
    if (taken) positions[(packed + residual) % a.slots] = ++a.position[batch];
    a.packed[batch] = packed, a.residual[batch] = residual + taken;
  }
}

}  // namespace occam
