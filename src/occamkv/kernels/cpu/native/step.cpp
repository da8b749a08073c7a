// A whole decode step of a layer: rotate, append, attend, pack.
#include <math.h>
#include <string.h>

#include <new>
#include <vector>

#include "attend.h"
#include "dispatch.h"

namespace occam {
namespace {

// What a calling thread keeps from call to call.
struct Buffers {
  std::vector<int64_t> positions, ring_positions;
  std::vector<uint8_t> records;
  std::vector<uint16_t> super_scales;
  std::vector<float> turns;
};

thread_local Buffers buffers;

// Where the tokens of the ring stand, the new one included, and where the new one does.
void place(const okv_step &call) {
  buffers.positions.resize((size_t)call.attend.batch);
  buffers.ring_positions.assign((size_t)(call.attend.batch * call.ring_slots), -1);
  for (int64_t b = 0; b < call.attend.batch; b++) {
    const int64_t first = call.packed_tokens[b];
    for (int64_t i = 0; i <= call.residual[b]; i++)
      buffers.ring_positions[(size_t)(b * call.ring_slots + (first + i) % call.ring_slots)] =
          position_of(call.packed, b, first + i);
    buffers.positions[(size_t)b] = position_of(call.packed, b, first + call.residual[b]);
  }
}

// Cosines and sines of the key bias where the new tokens stand, [batch][2][pairs], in double precision as ops/rope.py
// has them: then a token has the same bytes whichever way it came.
void turn(const okv_step &call, const okv_key_bias &bias) {
  buffers.turns.resize((size_t)(call.attend.batch * 2 * bias.pairs));
  for (int64_t b = 0; b < call.attend.batch; b++) {
    float *to = buffers.turns.data() + b * 2 * bias.pairs;
    for (int64_t p = 0; p < bias.pairs; p++) {
      const double angle = (double)buffers.positions[(size_t)b] * bias.frequencies[p];
      to[p] = (float)cos(angle);
      to[bias.pairs + p] = (float)sin(angle);
    }
  }
}

// Make one record of the oldest tokens in the ring and put it behind the packed ones.
bool pack_record(const okv_step &call, int64_t batch, int64_t number) {
  const okv_layout &layout = call.packed.layout;
  const int64_t tokens = layout.record_tokens, slot = number % call.ring_slots;
  const int64_t per_page = OKV_PAGE_TOKENS / tokens, at = number % OKV_PAGE_TOKENS;
  Page page;
  if (!find_page(call.packed, batch, number, page)) return false;
  buffers.records.resize((size_t)layout.kv_heads * layout.record_bytes);
  buffers.super_scales.resize((size_t)layout.kv_heads * 2);
  okv_encode one = call.encode;
  one.groups = 1;
  const size_t size = call.ring_k.dtype == OKV_F32 ? 4 : 2;
  one.k = call.ring_k;
  one.v = call.ring_v;
  one.k.data = (char *)one.k.data + size * (batch * one.k.batch_stride + slot * one.k.token_stride);
  one.v.data = (char *)one.v.data + size * (batch * one.v.batch_stride + slot * one.v.token_stride);
  one.records = buffers.records.data();
  one.norms = layout.norm_bits ? (char *)page.norms + at * layout.norm_bits / 8 : nullptr;
  one.super_scales = layout.metadata_bits == 8 ? buffers.super_scales.data() : nullptr;
  one.threads = 1;
  if (okv_encode_run(&one) != 0) return false;
  for (int64_t head = 0; head < layout.kv_heads; head++) {
    const int64_t place = head * per_page + at / tokens;
    memcpy(page.records + place * layout.record_bytes, one.records + head * layout.record_bytes,
           (size_t)layout.record_bytes);
    if (one.super_scales) memcpy(page.super_scales + place * 2, one.super_scales + head * 2, 4);
  }
  return true;
}

bool check(const okv_step &call) {
  for (int64_t b = 0; b < call.attend.batch; b++) {
    const int64_t packed = call.packed_tokens[b], held = call.residual[b], due = call.due[b];
    if (packed < 0 || held < 0 || held >= call.ring_slots || due < 0 || due > held + 1 ||
        (due && (due % call.packed.layout.record_tokens || call.ring_slots % call.packed.layout.record_tokens)) ||
        (packed + due + OKV_PAGE_TOKENS - 1) / OKV_PAGE_TOKENS > call.packed.table_width) {
      set_error("sequence %lld has %lld packed tokens, %lld in a ring of %lld, and %lld are due: they do not fit together",
                (long long)b, (long long)packed, (long long)held, (long long)call.ring_slots, (long long)due);
      return false;
    }
  }
  return true;
}

bool step(okv_step &call) {
  if (!check(call)) return false;
  okv_attend &a = call.attend;
  bool any = false;
  place(call);
  if (a.key_bias) turn(call, *a.key_bias);
  for (int64_t b = 0; b < a.batch; b++) {
    any = any || call.packed_tokens[b];
    const float *turns = a.key_bias ? buffers.turns.data() + b * 2 * a.key_bias->pairs : nullptr;
    for (int64_t head = 0; head < a.kv_heads; head++) kernels().append_head(call, b, head, turns);
  }
  call.packed.lengths = call.packed_tokens;
  const okv_full parts[2] = {
      {call.pin_k, call.pin_v, call.pin_slots, call.pin_positions, call.pin_logit_bias},
      {call.ring_k, call.ring_v, call.ring_slots, buffers.ring_positions.data(), nullptr}};
  a.q_positions = buffers.positions.data();
  a.packed = any ? &call.packed : nullptr;
  a.full = call.pin_slots ? parts : parts + 1;
  a.full_count = call.pin_slots ? 2 : 1;
  if (!attend(a)) return false;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t done = 0; done < call.due[b]; done += call.packed.layout.record_tokens)
      if (!pack_record(call, b, call.packed_tokens[b] + done)) return false;
  for (int64_t b = 0; b < a.batch; b++) {
    call.packed_tokens[b] += call.due[b];
    call.residual[b] += 1 - call.due[b];
  }
  return true;
}

}  // namespace
}  // namespace occam

int32_t okv_step_run(okv_step *args) {
  try {
    return occam::step(*args) ? 0 : 1;
  } catch (const std::bad_alloc &) {
    occam::set_error("out of memory");
    return 1;
  }
}
