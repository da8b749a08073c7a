#include "append.cuh"

extern "C" __global__ void __launch_bounds__(occam::THREADS, OKV_MIN_BLOCKS)
    occamkv_append(const __grid_constant__ occam::Given given) {
  extern __shared__ __align__(128) unsigned char memory[];
  occam::run(given, *(occam::Memory *)memory);
}
