// A ring of pages in shared memory: pages are copied while others are read.
#pragma once
#include "shared.cuh"

namespace occam {

struct Ring {
  const Arguments &a;
  Shared &shared;
  const i64 first;  // of this block, in the table
  const int count;
  int stage = 0, parity = 0;  // of the page that is read

  OKV_DEVICE Ring(const Arguments &arguments, const Place &at, Shared &memory, int start, int end)
      : a(arguments), shared(memory), first((i64)at.batch * a.table_width + start), count(end - start) {
#if OKV_BULK
    if (thread() == 0) {
#pragma unroll
      for (int i = 0; i < STAGES; i++) arrivals_init(&shared.arrivals[i]);
      arrivals_ready();
    }
#endif
    find(at, 0);
    barrier();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy(i, i);
    settle();
  }

  // Find out where page i and those behind it lie. It must be long until page i is copied: a barrier comes before.
  OKV_DEVICE void find(const Place &at, int i) {
    i += thread();
    if (thread() >= SOURCES / 2 || i >= count) return;
    const i64 number = a.table[first + i];
    int slab = a.slab_count - 1;
#pragma unroll 1
    while (a.slabs[slab].start > number) slab--;
    const Slab from = a.slabs[slab];
    const i64 local = number - from.start, of_head = local * a.kv_heads + at.head;
    shared.sources[(u32)i % SOURCES] = {from.records + of_head * PAGE_BYTES, from.norms + local * (PAGE_TOKENS * NORM_BYTES),
                                   from.supers + of_head * SUPER_BYTES};
  }

  // Begin to copy page i into a stage that nobody reads any more. All threads call this.
  OKV_DEVICE void copy(int i, int stage) {
    const Source from = shared.sources[(u32)i % SOURCES];
    Stage &to = shared.stages[stage];
#if OKV_BULK
    if (i < count && thread() < 32 && elected()) {
      u64 *arrivals = &shared.arrivals[stage];
      arrivals_expect(arrivals, PAGE_BYTES + PAGE_TOKENS * NORM_BYTES + (SUPER_BYTES == 16 ? 16 : 0));
      copy_bulk(to.page, from.page, PAGE_BYTES, arrivals);
      if (NORM_BYTES) copy_bulk(to.norms, from.norms, PAGE_TOKENS * NORM_BYTES, arrivals);
      if (SUPER_BYTES == 16) copy_bulk(to.supers, from.supers, 16, arrivals);
    }
#else
    if (i < count) {
      for (int at = 16 * thread(); at < PAGE_BYTES; at += 16 * THREADS) copy_16(to.page + at, from.page + at);
      if (16 * thread() < PAGE_TOKENS * NORM_BYTES) copy_16(to.norms + 16 * thread(), from.norms + 16 * thread());
      if (SUPER_BYTES == 16 && thread() == 0) copy_16(to.supers, from.supers);
    }
#endif
    if (SUPER_BYTES % 16 && i < count && 4 * thread() < SUPER_BYTES)
      copy_4(to.supers + thread(), from.supers + 4 * thread());
    if (WORD_COPIES) copies_commit();
  }

  // The stage with page i, which has arrived.
  OKV_DEVICE const Stage &page(int i) {
    copy(i + STAGES - 1, stage ? stage - 1 : STAGES - 1);
#if OKV_BULK
    arrivals_wait(&shared.arrivals[stage], parity);
#endif
    return shared.stages[stage];
  }

  // Every thread is done with a page, and what each copied by itself for the next one is there for all.
  OKV_DEVICE void settle() {
    if (WORD_COPIES) copies_wait<STAGES - 2>();
    barrier();
  }

  OKV_DEVICE void advance() {
    settle();
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

}  // namespace occam
