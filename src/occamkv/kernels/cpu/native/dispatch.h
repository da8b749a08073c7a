// What the sources of the library share: the chosen instruction set, the error of a thread.
#pragma once
#include "kernels.h"

namespace occam {

// One table for each source isa_*.cpp; which of them are linked is up to CMakeLists.txt.
extern const Kernels avx512_kernels, avx2_kernels, neon_kernels, portable_kernels;

// The instruction set in use.
const Kernels &kernels();

// What okv_error() will say in this thread, as of printf.
void set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace occam
