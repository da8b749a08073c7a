// A ring of pages in shared memory: pages are copied while others are read.
#pragma once
#include "shared.cuh"

namespace occam {

struct Ring {
  const Arguments &a;
  Shared &shared;
  const i64 first;  // of this block, in the table
  const int count;  // pages
  int stage = 0, parity = 0;  // of the step that is read

  OKV_DEVICE Ring(const Arguments &arguments, const Place &at, Shared &memory, int start, int end)
      : a(arguments), shared(memory), first((i64)at.batch * a.table_width + start), count(end - start) {
    static_assert(STEP_PAGES <= 2);
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
    int slab = 0;
#pragma unroll 1
    for (int end = a.slab_count; end - slab > 1;) {
      const int middle = (slab + end) / 2;
      if (a.slabs[middle].start <= number) slab = middle;
      else end = middle;
    }
    const Slab from = a.slabs[slab];
    const i64 local = number - from.start, of_head = local * a.kv_heads + at.head;
    shared.sources[(u32)i % SOURCES] = {from.records + of_head * PAGE_BYTES, from.norms + local * (PAGE_TOKENS * NORM_BYTES),
                                   from.supers + of_head * SUPER_BYTES};
  }

  // Begin to copy the pages of step i into a stage that nobody reads any more. All threads call this.
  OKV_DEVICE void copy(int i, int stage) {
#if OKV_BULK
    if (has(i, 0) && thread() < 32 && elected()) {
      u64 *arrivals = &shared.arrivals[stage];
      constexpr int BYTES = PAGE_BYTES + PAGE_TOKENS * NORM_BYTES + (SUPER_BYTES == 16 ? 16 : 0);
      const bool whole = has(i, STEP_PAGES - 1);
      arrivals_expect(arrivals, whole ? STEP_PAGES * BYTES : BYTES);
#pragma unroll
      for (int j = 0; j < STEP_PAGES; j++) {
        if (j > 0 && !whole) break;
        const Source &from = source(i * STEP_PAGES + j);
        Page &to = shared.stages[stage].pages[j];
        copy_bulk(to.records, from.records, PAGE_BYTES, arrivals);
        if (NORM_BYTES) copy_bulk(to.norms, from.norms, PAGE_TOKENS * NORM_BYTES, arrivals);
        if (SUPER_BYTES == 16) copy_bulk(to.supers, from.supers, 16, arrivals);
      }
    }
#endif
    if (!WORD_COPIES) return;
#pragma unroll
    for (int j = 0; j < STEP_PAGES; j++) {
      if (!has(i, j)) break;
      const Source &from = source(i * STEP_PAGES + j);
      Page &to = shared.stages[stage].pages[j];
#if !OKV_BULK
      for (int at = 16 * thread(); at < PAGE_BYTES; at += 16 * THREADS) copy_16(to.records + at, from.records + at);
      if (16 * thread() < PAGE_TOKENS * NORM_BYTES) copy_16(to.norms + 16 * thread(), from.norms + 16 * thread());
      if (SUPER_BYTES == 16 && thread() == 0) copy_16(to.supers, from.supers);
#endif
      if (SUPER_BYTES % 16 && 4 * thread() < SUPER_BYTES) copy_4(to.supers + thread(), from.supers + 4 * thread());
    }
    copies_commit();
  }

  OKV_DEVICE bool has(int i, int j) const { return i * STEP_PAGES + j < count; }
  OKV_DEVICE const Source &source(int page) const { return shared.sources[(u32)page % SOURCES]; }

  // The pages of step i, which have arrived.
  OKV_DEVICE const Page *pages(int i) {
    copy(i + STAGES - 1, stage ? stage - 1 : STAGES - 1);
#if OKV_BULK
    arrivals_wait(&shared.arrivals[stage], parity);
#endif
    return shared.stages[stage].pages;
  }

  // Every thread is done with a step, and what each copied by itself for the next one is there for all.
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
