// The few things the kernel asks of the machine, as inline PTX; the tests' emulator has the same functions on a CPU.
#pragma once
#ifdef OKV_EMULATOR
#include "emulator.h"
#else
#include "arguments.h"

#define OKV_DEVICE __device__ __forceinline__
#define OKV_BULK (__CUDA_ARCH__ >= 900)

namespace occam {

typedef u32 half2;  // two float16, the first in the low bits

OKV_DEVICE int thread() { return (int)threadIdx.x; }

// Asked again, not kept in a register, wherever it is wanted.
OKV_DEVICE int block_x() {
  int x;
  asm volatile("mov.u32 %0,%%ctaid.x;" : "=r"(x));
  return x;
}

OKV_DEVICE int block_y() { return (int)blockIdx.y; }
OKV_DEVICE int block_z() { return (int)blockIdx.z; }
OKV_DEVICE void barrier() { __syncthreads(); }

OKV_DEVICE half2 multiply(half2 a, half2 b) {
  half2 r;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The same, never taken out of a loop: what is cheap to compute again would cost a register there.
OKV_DEVICE half2 multiply_again(half2 a, half2 b) {
  half2 r;
  asm volatile("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

OKV_DEVICE half2 negative(half2 x) {
  half2 r;
  asm("neg.f16x2 %0,%1;" : "=r"(r) : "r"(x));
  return r;
}

OKV_DEVICE half2 multiply_add(half2 a, half2 b, half2 c) {
  half2 r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

OKV_DEVICE half2 to_half2(float low, float high) {
  half2 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

OKV_DEVICE float half_to_float(u16 x) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(x));
  return r;
}

OKV_DEVICE u16 float_to_half(float x) {
  u16 r;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(r) : "f"(x));
  return r;
}

OKV_DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
OKV_DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }

// 2 ** x, 1 / x
OKV_DEVICE float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

OKV_DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

// c += a b for a 16 x 16 (rows x k), b 16 x 8, c 16 x 8. Lane 4 r + p holds a0 (row r, k 2p), a1 (r + 8, 2p),
// a2 (r, 2p + 8), a3 (r + 8, 2p + 8), b0 (k 2p, column r), b1 (k 2p + 8), c (r, 2p), (r, 2p + 1), (r + 8, ..).
OKV_DEVICE void multiply_tiles(float (&c)[4], half2 a0, half2 a1, half2 a2, half2 a3, half2 b0, half2 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Lane 4 r + p gives (row r, columns 2p, 2p + 1) of an 8 x 8 tile and gets (rows 2p, 2p + 1, column r).
OKV_DEVICE half2 transpose(half2 x) {
  half2 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(x));
  return r;
}

OKV_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a b + c, rounded once

OKV_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
OKV_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
OKV_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }

// N words that lie together, aligned to 16, 8 or 4 bytes as N allows.
template <int N>
OKV_DEVICE void load(u32 *to, const void *from) {
  if constexpr (N == 4) {
    const uint4 x = *(const uint4 *)from;
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (N == 2) {
    const uint2 x = *(const uint2 *)from;
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *(const u32 *)from;
  }
}

template <int N>
OKV_DEVICE void store(void *to, const u32 *from) {
  if constexpr (N == 4) *(uint4 *)to = make_uint4(from[0], from[1], from[2], from[3]);
  else if constexpr (N == 2) *(uint2 *)to = make_uint2(from[0], from[1]);
  else *(u32 *)to = from[0];
}

OKV_DEVICE void raise_flags(u32 *flags, u32 bits) { atomicOr(flags, bits); }
OKV_DEVICE void warp_barrier() { __syncwarp(); }

// For the last block of a row, which reads what the others wrote.
OKV_DEVICE void fence() { __threadfence(); }
OKV_DEVICE u32 count_up(u32 *counter) { return atomicAdd(counter, 1u); }
OKV_DEVICE float load_fresh(const float *x) { return __ldcg(x); }

OKV_DEVICE void load_fresh_4(float (&to)[4], const float *from) {
  const float4 x = __ldcg((const float4 *)from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

OKV_DEVICE u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }

// Copies from global to shared memory that go on in the background, in groups.
OKV_DEVICE void copy_16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

OKV_DEVICE void copy_4(void *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

OKV_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
OKV_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if OKV_BULK
// Whether this lane is the one of its warp that does what one does.
OKV_DEVICE bool elected() {
  u32 one;
  asm volatile("{.reg .pred p; elect.sync _|p,0xffffffff; selp.u32 %0,1,0,p;}" : "=r"(one));
  return one;
}

// One copy of many bytes that a barrier in shared memory counts.
OKV_DEVICE void arrivals_init(u64 *at) { asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(shared_address(at))); }

OKV_DEVICE void arrivals_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

OKV_DEVICE void arrivals_expect(u64 *at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(shared_address(at)), "r"(bytes) : "memory");
}

OKV_DEVICE void copy_bulk(void *to, const void *from, int bytes, u64 *at) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(at))
               : "memory");
}

OKV_DEVICE void arrivals_wait(u64 *at, int parity) {
  u32 done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
        : "=r"(done)
        : "r"(shared_address(at)), "r"(parity)
        : "memory");
  } while (!done);
}
#endif

}  // namespace occam
#endif
