// What every instruction set offers. One source per set (isa_*.cpp) fills one table; api.cpp chooses among them at load.
#pragma once
#include <stddef.h>

#include "api.h"

namespace occam {

struct Attention;  // attend.h: a call of attend, prepared

struct Kernels {
  const char *name;
  // One item is one sequence, one KV head and one share of the pages.
  void (*attend_item)(const Attention &call, int64_t item);
  // One row of the output: joins the shares of its pages.
  void (*attend_row)(const Attention &call, int64_t row);
  // Rotate the new token of one sequence and KV head and put it into the ring, without the key bias, whose cosines and
  // sines at its position are `turn`, [2][pairs].
  void (*append_head)(const okv_step &call, int64_t batch, int64_t head, const float *turn);
  // One group: all KV heads of record_tokens tokens. Returns 0, 1 if a value does not fit its stored
  // number, or 2 without memory.
  int (*encode_group)(const okv_encode &call, int64_t group);
  void (*decode_head)(const okv_decode &call, int64_t group, int64_t head);
};

}  // namespace occam
