// A call of attend as the instruction sets see it: checked, with every page found.
#pragma once
#include <stddef.h>

#include "api.h"

namespace occam {

// Position of the packed token, or token of the residual, with this number. Pins in between push it back.
static inline int64_t position_of(const okv_packed &packed, int64_t batch, int64_t number) {
  const int64_t n = packed.first_position[batch] + number;
  int64_t low = 0, high = packed.skips ? packed.skip_count : 0;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (packed.skips[batch * packed.skip_count + middle] <= n) low = middle + 1;
    else high = middle;
  }
  return n + low;
}

constexpr int64_t MAX_ROWS = 32;  // query rows that share one pass over the pages of a KV head

struct Page {
  uint8_t *records;  // [kv_heads][records of a page][record_bytes]
  void *norms;
  uint16_t *super_scales;
};

// An online softmax over some tokens, for one query row: largest logit, sum of weights, then head_dim sums of V.
constexpr int PARTIAL_HEADER = 2;

struct Attention {
  const okv_attend *args;
  const Page *pages;  // [batch][page_stride]
  int64_t page_stride;
  int64_t rows;    // of a KV head: query heads of its group x queries
  int64_t chunks;  // of at most MAX_ROWS rows
  int64_t splits;  // shares of the pages
  int *failed;      // set to 1 by an item that got no memory
  float *partials;  // [batch][kv_heads][rows][splits][PARTIAL_HEADER + head_dim]

  float *partial(int64_t batch, int64_t head, int64_t row, int64_t split) const {
    const int64_t size = PARTIAL_HEADER + args->head_dim;
    return partials + (((batch * args->kv_heads + head) * rows + row) * splits + split) * size;
  }
};

// Memory of this thread, 64-byte aligned, kept from call to call; null if there is none left.
void *scratch(size_t bytes);

// Checks and runs a call of attend; on failure the error is set.
bool attend(const okv_attend &args);

// The page that holds packed token `number` of a sequence; false, with the error set, if the table names none.
bool find_page(const okv_packed &packed, int64_t batch, int64_t number, Page &page);

}  // namespace occam
