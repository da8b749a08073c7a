// arm64 with the dot product instructions.
#define OKV_NAMESPACE neon
#include "isa.inc"

namespace occam {
const Kernels neon_kernels = neon::table("neon");
}
