// Attention over packed codes for decode steps and short chunks. Grid: splits x tiles, KV heads, sequences.
#include "combine.cuh"

extern "C" __global__ void __launch_bounds__(occam::THREADS, OKV_MIN_BLOCKS)
    occamkv_attend(const __grid_constant__ occam::Arguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
  occam::attend(arguments, *(occam::Shared *)memory);
}
