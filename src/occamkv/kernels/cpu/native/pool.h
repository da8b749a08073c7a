// Threads of our own, so that no second OpenMP runtime meets the one that torch brings.
#pragma once
#include <stdint.h>

namespace occam {

// Calls work(context, item) for each item in 0..items-1 and returns when all are done. The caller works too, so that
// at most `threads` threads do. Within `work`, or while another thread is in here, the caller works alone.
// All of them compute in the default floating-point mode (nearest, no flush to zero), whatever mode the caller is in.
void parallel(int64_t items, int threads, void (*work)(void *context, int64_t item), void *context);

}  // namespace occam
