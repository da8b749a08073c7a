// The device functions of the CUDA kernel on a CPU, so that its source, built by a C++ compiler, runs without a GPU.
//
// A thread block is 128 fibers that take turns. What a warp does together (tile products, shuffles, votes) waits until
// all 32 lanes have come; copies in the background happen only when they are waited for; shared memory begins as 0xff.
#pragma once
#include <math.h>
#include <string.h>

#include "arguments.h"

#define OKV_DEVICE inline

#ifndef OKV_BULK
#define OKV_BULK 0
#endif

namespace emulator {

using occam::i64;
using occam::u16;
using occam::u32;
using occam::u64;
using occam::u8;

struct Words {
  u32 x[6];
};

struct Copy {
  void *to;
  const void *from;
  int bytes;
};

int thread();
int block(int axis);
void barrier();
const Words *meet(const Words &own);                     // of all lanes of the warp, in order
void tile_products(const Words *lanes, float *products);  // 16 x 8, once for a warp
float *tile_memory();
bool is_first();  // of the lanes that go on after `meet`
void enqueue(const Copy &copy);
void commit();
void wait(int pending);
void barrier_init(u64 *at);
void barrier_expect(u64 *at, int bytes);
void barrier_copy(u64 *at, const Copy &copy);
void barrier_wait(u64 *at, int parity);
void fail(const char *why);

inline float half_to_float(u16 x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
}

inline u16 float_to_half(float x) {
  const _Float16 h = (_Float16)x;
  u16 bits;
  memcpy(&bits, &h, 2);
  return bits;
}

}  // namespace emulator

namespace occam {

typedef u32 half2;

OKV_DEVICE int thread() { return emulator::thread(); }
OKV_DEVICE int block_x() { return emulator::block(0); }
OKV_DEVICE int block_y() { return emulator::block(1); }
OKV_DEVICE int block_z() { return emulator::block(2); }
OKV_DEVICE void barrier() { emulator::barrier(); }

OKV_DEVICE float half_to_float(u16 x) { return emulator::half_to_float(x); }
OKV_DEVICE u16 float_to_half(float x) { return emulator::float_to_half(x); }
OKV_DEVICE half2 to_half2(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
OKV_DEVICE float low_of(half2 x) { return half_to_float((u16)(x & 0xffffu)); }
OKV_DEVICE float high_of(half2 x) { return half_to_float((u16)(x >> 16)); }

OKV_DEVICE half2 multiply(half2 a, half2 b) { return to_half2(low_of(a) * low_of(b), high_of(a) * high_of(b)); }
OKV_DEVICE half2 multiply_again(half2 a, half2 b) { return multiply(a, b); }
OKV_DEVICE half2 negative(half2 x) { return x ^ 0x80008000u; }
OKV_DEVICE half2 multiply_add(half2 a, half2 b, half2 c) {
  return to_half2(low_of(a) * low_of(b) + low_of(c), high_of(a) * high_of(b) + high_of(c));
}

OKV_DEVICE float bits_to_float(u32 x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}

OKV_DEVICE u32 float_to_bits(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}

OKV_DEVICE float power_of_two(float x) { return exp2f(x); }
OKV_DEVICE float reciprocal(float x) { return 1.0f / x; }

OKV_DEVICE void multiply_tiles(float (&c)[4], half2 a0, half2 a1, half2 a2, half2 a3, half2 b0, half2 b1) {
  const emulator::Words *lanes = emulator::meet({{a0, a1, a2, a3, b0, b1}});
  float *products = emulator::tile_memory();
  if (emulator::is_first()) emulator::tile_products(lanes, products);
  const int lane = thread() & 31, row = lane >> 2, column = 2 * (lane & 3);
  for (int i = 0; i < 4; i++) c[i] += products[(row + 8 * (i >> 1)) * 8 + column + (i & 1)];
}

OKV_DEVICE half2 transpose(half2 x) {
  const emulator::Words *lanes = emulator::meet({{x}});
  const int lane = thread() & 31, row = lane >> 2, pair = lane & 3;
  const u32 first = lanes[4 * (2 * pair) + row / 2].x[0], second = lanes[4 * (2 * pair + 1) + row / 2].x[0];
  return row & 1 ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}

OKV_DEVICE float shuffle(float x, int lane) {
  return bits_to_float(emulator::meet({{float_to_bits(x)}})[lane & 31].x[0]);
}

OKV_DEVICE float shuffle_xor(float x, int mask) { return shuffle(x, (thread() & 31) ^ mask); }

OKV_DEVICE bool any(bool x) {
  const emulator::Words *lanes = emulator::meet({{x}});
  u32 found = 0;
  for (int i = 0; i < 32; i++) found |= lanes[i].x[0];
  return found;
}

template <int N>
OKV_DEVICE void load(u32 *to, const void *from) {
  if ((u64)from % (4 * N)) emulator::fail("a load is not aligned");
  memcpy(to, from, 4 * N);
}

template <int N>
OKV_DEVICE void store(void *to, const u32 *from) {
  if ((u64)to % (4 * N)) emulator::fail("a store is not aligned");
  memcpy(to, from, 4 * N);
}

OKV_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
OKV_DEVICE void raise_flags(u32 *flags, u32 bits) { *flags |= bits; }
OKV_DEVICE void warp_barrier() { emulator::meet({}); }
OKV_DEVICE bool elected() { return emulator::meet({}) && (thread() & 31) == 0; }

OKV_DEVICE void fence() {}
OKV_DEVICE u32 count_up(u32 *counter) { return (*counter)++; }
OKV_DEVICE float load_fresh(const float *x) { return *x; }

OKV_DEVICE void load_fresh_4(float (&to)[4], const float *from) {
  if ((u64)from % 16) emulator::fail("a load is not aligned");
  memcpy(to, from, 16);
}

OKV_DEVICE void copy_16(void *to, const void *from) {
  if ((u64)to % 16 || (u64)from % 16) emulator::fail("a copy is not aligned");
  emulator::enqueue({to, from, 16});
}

OKV_DEVICE void copy_4(void *to, const void *from) { emulator::enqueue({to, from, 4}); }
OKV_DEVICE void copies_commit() { emulator::commit(); }

template <int PENDING>
OKV_DEVICE void copies_wait() {
  emulator::wait(PENDING);
}

OKV_DEVICE void arrivals_init(u64 *at) { emulator::barrier_init(at); }
OKV_DEVICE void arrivals_ready() {}
OKV_DEVICE void arrivals_expect(u64 *at, int bytes) { emulator::barrier_expect(at, bytes); }
OKV_DEVICE void arrivals_wait(u64 *at, int parity) { emulator::barrier_wait(at, parity); }

OKV_DEVICE void copy_bulk(void *to, const void *from, int bytes, u64 *at) {
  if ((u64)to % 16 || (u64)from % 16 || bytes % 16) emulator::fail("a bulk copy is not aligned");
  emulator::barrier_copy(at, {to, from, bytes});
}

}  // namespace occam
