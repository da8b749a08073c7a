// A ring of pages in shared memory: pages are copied while others are read.
#pragma once
#include "shared.cuh"

namespace occam {

struct Ring {
  const Arguments &a;
  Shared &shared;
  i64 first;  // of this block, in the table
  int head, count;
  int next;  // number of the page that is copied next, known one turn ahead

  OKV_DEVICE Ring(const Arguments &arguments, const Place &at, Shared &memory, int start, int end)
      : a(arguments), shared(memory), first((i64)at.batch * a.table_width + start), head(at.head),
        count(end - start), next(count > 0 ? (int)a.table[first] : 0) {
#if OKV_BULK
    if (thread() == 0) {
#pragma unroll
      for (int i = 0; i < STAGES; i++) arrivals_init(&shared.arrivals[i]);
      arrivals_ready();
    }
    barrier();
#endif
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy(i);
  }

  // Begin to copy page i into its stage, which nobody reads any more. All threads call this.
  OKV_DEVICE void copy(int i) {
#if OKV_BULK
    if (i < count && thread() < 32) start(i, shared.stages[i % STAGES]);
#else
    if (i < count) start(i, shared.stages[i % STAGES]);
#endif
    copies_commit();
  }

  OKV_DEVICE void start(int i, Stage &to) {
    const int number = next;
    if (i + 1 < count) next = (int)a.table[first + i + 1];
    int slab = a.slab_count - 1;
#pragma unroll 1
    while (a.slabs[slab].start > number) slab--;
    const Slab from = a.slabs[slab];
    const i64 local = number - from.start, of_head = local * a.kv_heads + head;
    const u8 *page = from.records + of_head * PAGE_BYTES;
    const u8 *norms = from.norms + local * (PAGE_TOKENS * NORM_BYTES);
#if OKV_BULK
    if (thread() == 0) {
      u64 *arrivals = &shared.arrivals[i % STAGES];
      arrivals_expect(arrivals, PAGE_BYTES + PAGE_TOKENS * NORM_BYTES);
      copy_bulk(to.page, page, PAGE_BYTES, arrivals);
      if (NORM_BYTES) copy_bulk(to.norms, norms, PAGE_TOKENS * NORM_BYTES, arrivals);
    }
#else
    for (int at = 16 * thread(); at < PAGE_BYTES; at += 16 * THREADS) copy_16(to.page + at, page + at);
    if (16 * thread() < PAGE_TOKENS * NORM_BYTES) copy_16(to.norms + 16 * thread(), norms + 16 * thread());
#endif
    if (SMALL_METADATA && thread() < RECORDS)
      copy_4(to.supers + thread(), from.supers + (of_head * RECORDS + thread()) * 4);
  }

  // The stage with page i, which has arrived.
  OKV_DEVICE const Stage &page(int i) {
    copy(i + STAGES - 1);
#if OKV_BULK
    arrivals_wait(&shared.arrivals[i % STAGES], i / STAGES & 1);
#endif
    return shared.stages[i % STAGES];
  }

  // Every thread is done with a page, and what each copied by itself for the next one is there for all.
  OKV_DEVICE void settle() {
    copies_wait<STAGES - 2>();
    barrier();
  }
};

}  // namespace occam
