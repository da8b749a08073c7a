// Any CPU: vector extensions of the compiler, no instruction set asked for.
#define OKV_NAMESPACE portable
#include "isa.inc"

namespace occam {
const Kernels portable_kernels = portable::table("portable");
}
