// A call of attend: checks, pages, how the work is shared, and the two rounds of it.
#include "attend.h"

#include <stdlib.h>

#include <new>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace occam {
namespace {

struct Memory {
  void *data = nullptr;
  size_t bytes = 0;
  ~Memory() { free(data); }
};

thread_local Memory memory;

// What a calling thread keeps from call to call, so that a step allocates nothing.
struct Buffers {
  std::vector<Page> pages;
  std::vector<float> partials;
};

thread_local Buffers buffers;

constexpr int64_t PAGES_AT_LEAST = 4;  // in a share, or joining them costs more than it saves

// The slab of a page, tried first where the last one was found; null if it lies in none.
const okv_slab *slab_of(const okv_packed &packed, int64_t number, int64_t &last) {
  for (int64_t tried = 0; tried < packed.slab_count; tried++) {
    const okv_slab &slab = packed.slabs[last];
    if (number >= slab.start && number < slab.start + slab.count) return &slab;
    last = last + 1 < packed.slab_count ? last + 1 : 0;
  }
  return nullptr;
}

bool find_page_from(const okv_packed &packed, int64_t batch, int64_t index, int64_t &last, Page &page) {
  const okv_layout &layout = packed.layout;
  const int64_t number = packed.table[batch * packed.table_stride + index];
  const okv_slab *slab = slab_of(packed, number, last);
  if (!slab) {
    set_error("the block table names page %lld of sequence %lld, which is in no slab", (long long)number,
              (long long)batch);
    return false;
  }
  const int64_t heads = (int64_t)layout.kv_heads * (OKV_PAGE_TOKENS / layout.record_tokens), at = number - slab->start;
  page.records = slab->records + at * heads * layout.record_bytes;
  page.norms = (char *)slab->norms + at * OKV_PAGE_TOKENS * layout.norm_bits / 8;
  page.super_scales = slab->super_scales + at * heads * 2;
  return true;
}

// Find every page of every sequence; false, with the error set, if one lies in no slab.
bool find_pages(const okv_packed &packed, int64_t batch, std::vector<Page> &pages) {
  pages.resize((size_t)(batch * packed.table_width));
  int64_t last = 0;
  for (int64_t b = 0; b < batch; b++) {
    const int64_t length = packed.lengths[b];
    if (length < 0 || length % packed.layout.record_tokens || length > packed.table_width * OKV_PAGE_TOKENS) {
      set_error("sequence %lld has %lld packed tokens; allowed: whole records of %d within %lld pages", (long long)b,
                (long long)length, (int)packed.layout.record_tokens, (long long)packed.table_width);
      return false;
    }
    for (int64_t i = 0; i * OKV_PAGE_TOKENS < length; i++)
      if (!find_page_from(packed, b, i, last, pages[(size_t)(b * packed.table_width + i)])) return false;
  }
  return true;
}

// All positions are in the tables of a key bias; false, with the error set, if one is not.
bool check_reach(const okv_attend &a, int64_t reach) {
  int64_t furthest = -1;
  for (int64_t b = 0; b < a.batch; b++) {
    if (a.packed && a.packed->lengths[b]) {
      const int64_t first = position_of(*a.packed, b, 0), last = position_of(*a.packed, b, a.packed->lengths[b] - 1);
      furthest = first < 0 ? reach : last > furthest ? last : furthest;
    }
    for (int64_t i = 0; i < a.full_count && furthest < reach; i++)
      for (int64_t t = 0; t < a.full[i].tokens; t++) {
        const int64_t position = a.full[i].positions[b * a.full[i].tokens + t];
        furthest = position > furthest ? position : furthest;
      }
    if (furthest >= reach) {
      set_error("a token of sequence %lld lies outside the %lld positions that the key bias was computed for",
                (long long)b, (long long)reach);
      return false;
    }
  }
  return true;
}

void run_item(void *call, int64_t item) { kernels().attend_item(*(const Attention *)call, item); }
void run_row(void *call, int64_t row) { kernels().attend_row(*(const Attention *)call, row); }

// Shares of the pages: one, unless there are fewer sequences and heads than threads can take.
int64_t shares(const okv_attend &a, int64_t chunks) {
  const int64_t items = a.batch * a.kv_heads * chunks;
  if (a.threads <= 1 || !a.packed || items == 0) return 1;
  int64_t longest = 0;
  for (int64_t b = 0; b < a.batch; b++)
    if (a.packed->lengths[b] > longest) longest = a.packed->lengths[b];
  const int64_t most = longest / OKV_PAGE_TOKENS / PAGES_AT_LEAST, wanted = (4 * a.threads + items - 1) / items;
  return most < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace

bool attend(const okv_attend &a) {
  int failed = 0;
  Attention call = {&a, nullptr, 0, 0, 0, 0, &failed, nullptr};
  if (a.packed) {
    if (!find_pages(*a.packed, a.batch, buffers.pages)) return false;
    call.pages = buffers.pages.data();
    call.page_stride = a.packed->table_width;
  }
  if (a.key_bias && !check_reach(a, a.key_bias->reach)) return false;
  call.rows = a.query_heads / a.kv_heads * a.queries;
  call.chunks = (call.rows + MAX_ROWS - 1) / MAX_ROWS;
  call.splits = shares(a, call.chunks);
  const int64_t rows = a.batch * a.query_heads * a.queries;
  buffers.partials.resize((size_t)(rows * call.splits * (PARTIAL_HEADER + a.head_dim)));
  call.partials = buffers.partials.data();
  parallel(a.batch * a.kv_heads * call.chunks * call.splits, a.threads, run_item, &call);
  if (failed) {
    set_error("out of memory");
    return false;
  }
  parallel(rows, rows * a.head_dim > 65536 ? a.threads : 1, run_row, &call);
  return true;
}

bool find_page(const okv_packed &packed, int64_t batch, int64_t number, Page &page) {
  int64_t last = 0;
  return find_page_from(packed, batch, number / OKV_PAGE_TOKENS, last, page);
}

void *scratch(size_t bytes) {
  if (memory.bytes < bytes) {
    free(memory.data);
    memory.data = aligned_alloc(64, (bytes + 63) / 64 * 64);
    memory.bytes = memory.data ? bytes : 0;
  }
  return memory.data;
}

}  // namespace occam

int32_t okv_attend_run(const okv_attend *args) {
  try {
    return occam::attend(*args) ? 0 : 1;
  } catch (const std::bad_alloc &) {
    occam::set_error("out of memory");
    return 1;
  }
}
