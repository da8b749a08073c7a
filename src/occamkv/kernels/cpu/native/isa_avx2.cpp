// x86-64 with AVX2, FMA and F16C.
#define OKV_NAMESPACE avx2
#include "isa.inc"

namespace occam {
const Kernels avx2_kernels = avx2::table("avx2");
}
