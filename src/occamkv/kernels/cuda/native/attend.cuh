// Attention over packed codes for decode steps and short chunks. Grid: splits x tiles, KV heads, sequences; the tiles of a
// split are neighbours, since they read the same pages.
#pragma once
#include "combine.cuh"

namespace occam {

typedef Arguments Given;
typedef Shared Memory;

OKV_DEVICE void run(const Given &a, Memory &shared) {
  const Place at;
  load_positions(a, at, shared);
  Running running;
  const bool packed = at.split(a) < a.packed_splits;
  if (packed) take_packed(a, at, shared, running);
  else take_full(a, at, shared, running);
  leave(at, packed, running, shared.merge);
  add_warps(a, at, shared);
  if (a.splits > 1) {
    if (!is_last(a, at, shared)) return;
    add_splits(a, at, shared);
  }
  finish(a, at, shared);
}

}  // namespace occam
