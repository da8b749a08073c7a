// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
#define OKV_NAMESPACE avx512
#include "isa.inc"

namespace occam {
const Kernels avx512_kernels = avx512::table("avx512");
}
