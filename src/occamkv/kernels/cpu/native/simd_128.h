// What simd.h leaves to the width of a register: 128 bits, SSE2, NEON or what the compiler makes of the rest.

typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// Lanes of a and b in turn: those of their lower or upper halves.
template <typename V>
OKV_INLINE V zip_low(V a, V b) {
  if constexpr (sizeof a[0] == 1)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  else if constexpr (sizeof a[0] == 2) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}

template <typename V>
OKV_INLINE V zip_high(V a, V b) {
  if constexpr (sizeof a[0] == 1)
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  else if constexpr (sizeof a[0] == 2) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// Lane i of vector j is lane j of vector i.
template <typename V>
OKV_INLINE void transpose(V (&x)[4]) {
  const V a = zip_low(x[0], x[2]), b = zip_high(x[0], x[2]), c = zip_low(x[1], x[3]), d = zip_high(x[1], x[3]);
  x[0] = zip_low(a, c), x[1] = zip_high(a, c), x[2] = zip_low(b, d), x[3] = zip_high(b, d);
}

// Whole numbers that fit half of their bits.
OKV_INLINE i16x8 narrowed(i32 a, i32 b) {
#if defined(__SSE2__)
  return (i16x8)_mm_packs_epi32((__m128i)a, (__m128i)b);
#else
  return __builtin_shufflevector((i16x8)a, (i16x8)b, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}

OKV_INLINE i8x16 narrowed(i16x8 a, i16x8 b) {
#if defined(__SSE2__)
  return (i8x16)_mm_packs_epi16((__m128i)a, (__m128i)b);
#else
  return __builtin_shufflevector((i8x16)a, (i8x16)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#endif
}

OKV_INLINE f32 quarters_added(f32x16 x) {
  const Pair<f32> s = x.low + x.high;
  return s.low + s.high;
}

OKV_INLINE float sum(f32x16 x) {
  const f32 s = quarters_added(x);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

OKV_INLINE float largest_lane(f32x16 x) {
  const Pair<f32> two = largest(x.low, x.high);
  f32 m = largest(two.low, two.high);
  m = largest(m, __builtin_shufflevector(m, m, 2, 3, 0, 1));
  return m[0] > m[1] ? m[0] : m[1];
}

// The sums of up to four vectors.
template <int COUNT>
OKV_INLINE void sums(const f32x16 *x, float *to) {
  f32 s[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) s[i] = quarters_added(x[i]);
  transpose(s);
  const f32 four = (s[0] + s[2]) + (s[1] + s[3]);
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) to[i] = four[i];
}

// Narrow numbers in memory as 32-bit lanes.
OKV_INLINE i32x16 load_u16(const void *from) {
  const i16x8 a = load<i16x8>(from), b = load<i16x8>((const char *)from + 16), none = {};
  return {{(i32)zip_low(a, none), (i32)zip_high(a, none)}, {(i32)zip_low(b, none), (i32)zip_high(b, none)}};
}

OKV_INLINE i32x16 load_u8(const void *from) {
  const u8x16 v = load<u8x16>(from), none = {};
  const i16x8 a = (i16x8)zip_low(v, none), b = (i16x8)zip_high(v, none);
  return {{(i32)zip_low(a, i16x8{}), (i32)zip_high(a, i16x8{})}, {(i32)zip_low(b, i16x8{}), (i32)zip_high(b, i16x8{})}};
}

OKV_INLINE i32x16 load_i8(const void *from) { return (load_u8(from) << 24) >> 24; }

// Bits of float16 numbers in 32-bit lanes to floats.
#if defined(__aarch64__)

OKV_INLINE f32 quarter_of_halves(uint16x4_t bits) { return (f32)vcvt_f32_f16(vreinterpret_f16_u16(bits)); }

OKV_INLINE f32 half_bits_to_float(i32 bits) { return quarter_of_halves(vmovn_u32((uint32x4_t)bits)); }

OKV_INLINE f32x16 half_bits_to_float(i32x16 bits) {
  return {{half_bits_to_float(bits.low.low), half_bits_to_float(bits.low.high)},
          {half_bits_to_float(bits.high.low), half_bits_to_float(bits.high.high)}};
}

OKV_INLINE f32x16 load_half(const uint16_t *from) {
  return {{quarter_of_halves(vld1_u16(from)), quarter_of_halves(vld1_u16(from + 4))},
          {quarter_of_halves(vld1_u16(from + 8)), quarter_of_halves(vld1_u16(from + 12))}};
}

#else

// In integers: a process that flushes subnormal floats to zero reads the same values.
OKV_INLINE f32x16 half_bits_to_float(i32x16 bits) {
  const i32x16 magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const i32x16 normal = (magnitude << 13) + (112 << 23), exponent = magnitude & 0x7c00;
  const i32x16 special = normal + (112 << 23);
  const f32x16 small = as_float((magnitude << 13) | (113 << 23)) - as_float(splat(113 << 23));
  const i32x16 finite = select(exponent == 0, as_int(small), normal);
  return as_float(select(exponent == 0x7c00, special, finite) | sign);
}

OKV_INLINE f32x16 load_half(const uint16_t *from) { return half_bits_to_float(load_u16(from)); }

#endif

OKV_INLINE void store_half(uint16_t *to, f32x16 x) {
  float lanes[LANES];
  store(lanes, x);
  for (int i = 0; i < LANES; i++) to[i] = float_to_half(lanes[i]);
}

// Whole numbers that fit 16 bits.
OKV_INLINE void store_i16(void *to, i32x16 x) {
  store(to, narrowed(x.low.low, x.low.high));
  store((char *)to + 16, narrowed(x.high.low, x.high.high));
}

OKV_INLINE void store_i16(void *to, i32x16 a, i32x16 b) {
  store_i16(to, a);
  store_i16((char *)to + 32, b);
}

// Lane 4i + j is lane 4j + i of x.
OKV_INLINE f32x16 transposed(f32x16 x) {
  f32 v[4] = {x.low.low, x.low.high, x.high.low, x.high.high};
  transpose(v);
  return {{v[0], v[1]}, {v[2], v[3]}};
}

// Every second of 32 words, from word `first`, 0 or 1, on.
OKV_INLINE i32x16 every_second(const void *from, int first) {
  i32 v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const f32 a = load<f32>((const char *)from + 32 * i), b = load<f32>((const char *)from + 32 * i + 16);
    v[i] = (i32)(first ? __builtin_shufflevector(a, b, 1, 3, 5, 7) : __builtin_shufflevector(a, b, 0, 2, 4, 6));
  }
  return {{v[0], v[1]}, {v[2], v[3]}};
}

// a * b / 32768, rounded; never both -32768.
OKV_INLINE i16x8 scaled(i16x8 a, i16x8 b) {
#if defined(__SSE2__)
  const __m128i high = _mm_mulhi_epi16((__m128i)a, (__m128i)b), low = _mm_mullo_epi16((__m128i)a, (__m128i)b);
  const __m128i carried = _mm_avg_epu16(_mm_srli_epi16(low, 14), _mm_setzero_si128());
  return (i16x8)_mm_add_epi16(_mm_add_epi16(high, high), carried);
#elif defined(__aarch64__)
  return (i16x8)vqrdmulhq_s16((int16x8_t)a, (int16x8_t)b);
#else
  i16x8 x;
  for (int i = 0; i < 8; i++) x[i] = (int16_t)((a[i] * b[i] + 16384) >> 15);
  return x;
#endif
}

// The sums of neighbours.
OKV_INLINE i32 neighbours_added(i16x8 x) { return ((i32)x << 16 >> 16) + ((i32)x >> 16); }

// The bytes of a * b / 32768, rounded, and the sum of these numbers; n is a multiple of 32.
OKV_INLINE int32_t fold(const int16_t *a, const int16_t *b, int n, int8_t *high, int8_t *low) {
  i32 added = {};
  for (int i = 0; i < n; i += 16) {
    const i16x8 x = scaled(load<i16x8>(a + i), load<i16x8>(b + i));
    const i16x8 y = scaled(load<i16x8>(a + i + 8), load<i16x8>(b + i + 8));
    store(high + i, narrowed((x + 128) >> 8, (y + 128) >> 8));
    store(low + i, narrowed((x << 8) >> 8, (y << 8) >> 8));
    added += neighbours_added(x) + neighbours_added(y);
  }
  return added[0] + added[1] + added[2] + added[3];
}
