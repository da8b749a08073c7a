// Sixteen lanes at a time, written once. Where a register holds fewer they are pairs of registers, or pairs of pairs,
// because GCC takes vectors of its extension that are wider than a register apart, lane by lane.
// What the compilers do badly by themselves is written per width of a register, in simd_*.h. Included inside an
// anonymous namespace of every isa_*.cpp, so that nothing compiled for one CPU is linked into another's code.
#define OKV_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define OKV_REGISTER 64
#elif defined(__AVX2__)
#define OKV_REGISTER 32
#else
#define OKV_REGISTER 16
#endif

typedef float f32 __attribute__((vector_size(OKV_REGISTER)));  // one register
typedef int32_t i32 __attribute__((vector_size(OKV_REGISTER)));
typedef uint32_t u32 __attribute__((vector_size(OKV_REGISTER)));

constexpr int LANES = 16;

template <typename V>
OKV_INLINE void load_to(V &v, const void *from) {
  __builtin_memcpy(&v, from, sizeof v);
}

template <typename V>
OKV_INLINE V load(const void *from) {
  V v;
  load_to(v, from);
  return v;
}

template <typename V>
OKV_INLINE void store(void *to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

OKV_INLINE f32 as_float(i32 x) { return (f32)x; }
OKV_INLINE i32 as_int(f32 x) { return (i32)x; }
OKV_INLINE i32 as_int(u32 x) { return (i32)x; }
OKV_INLINE u32 as_unsigned(f32 x) { return (u32)x; }
OKV_INLINE f32 to_float(i32 x) { return __builtin_convertvector(x, f32); }

// a where the mask, a comparison, is true, else b.
OKV_INLINE f32 select(i32 mask, f32 a, f32 b) { return mask ? a : b; }
OKV_INLINE i32 select(i32 mask, i32 a, i32 b) { return mask ? a : b; }
OKV_INLINE u32 select(i32 mask, u32 a, u32 b) { return mask ? a : b; }

// a * b + c where the order of roundings does not matter (never in the encoder).
OKV_INLINE f32 multiply_add(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__)
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Nearest integer, halves to even, of numbers that fit one.
OKV_INLINE i32 nearest(f32 x) {
#if defined(__AVX512F__)
  return (i32)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (i32)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (i32)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
  return (i32)vcvtnq_s32_f32((float32x4_t)x);
#else
  i32 r;
  for (int i = 0; i < OKV_REGISTER / 4; i++) r[i] = (int32_t)__builtin_rintf(x[i]);
  return r;
#endif
}

#if OKV_REGISTER == 64

typedef f32 f32x16;
typedef i32 i32x16;
typedef u32 u32x16;

#else

template <typename V>
struct Pair {
  V low, high;
  OKV_INLINE auto operator[](int lane) const {
    constexpr int HALF = sizeof(V) / 4;
    return lane < HALF ? low[lane] : high[lane - HALF];
  }
};

template <typename V>
OKV_INLINE Pair<V> pair(V low, V high) {
  return {low, high};
}

#define OKV_OPERATOR(op)                              \
  template <typename V>                               \
  OKV_INLINE auto operator op(Pair<V> a, Pair<V> b) { \
    return pair(a.low op b.low, a.high op b.high);    \
  }                                                   \
  template <typename V, typename Scalar>              \
  OKV_INLINE auto operator op(Pair<V> a, Scalar b) {  \
    return pair(a.low op b, a.high op b);             \
  }
OKV_OPERATOR(+)
OKV_OPERATOR(-)
OKV_OPERATOR(*)
OKV_OPERATOR(/)
OKV_OPERATOR(&)
OKV_OPERATOR(|)
OKV_OPERATOR(<<)
OKV_OPERATOR(>>)
OKV_OPERATOR(<)
OKV_OPERATOR(>)
OKV_OPERATOR(==)
#undef OKV_OPERATOR

template <typename V>
OKV_INLINE Pair<V> operator-(Pair<V> a) {
  return {-a.low, -a.high};
}

#define OKV_FUNCTION(name)                                       \
  template <typename V, typename... More>                        \
  OKV_INLINE auto name(Pair<V> a, Pair<More>... b) {             \
    return pair(name(a.low, b.low...), name(a.high, b.high...)); \
  }
OKV_FUNCTION(as_float)
OKV_FUNCTION(as_int)
OKV_FUNCTION(as_unsigned)
OKV_FUNCTION(to_float)
OKV_FUNCTION(select)
OKV_FUNCTION(multiply_add)
OKV_FUNCTION(nearest)
#undef OKV_FUNCTION

template <typename V>
OKV_INLINE void load_to(Pair<V> &v, const void *from) {
  load_to(v.low, from);
  load_to(v.high, (const char *)from + sizeof(V));
}

template <typename V>
OKV_INLINE void store(void *to, Pair<V> v) {
  store(to, v.low);
  store((char *)to + sizeof(V), v.high);
}

#if OKV_REGISTER == 32
typedef Pair<f32> f32x16;
typedef Pair<i32> i32x16;
typedef Pair<u32> u32x16;
#else
typedef Pair<Pair<f32>> f32x16;
typedef Pair<Pair<i32>> i32x16;
typedef Pair<Pair<u32>> u32x16;
#endif

#endif

OKV_INLINE f32x16 splat(float x) {
  alignas(64) const float lanes[LANES] = {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
  return load<f32x16>(lanes);
}

OKV_INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }

template <typename V>
OKV_INLINE V largest(V a, V b) {
  return select(a > b, a, b);
}

template <typename V>
OKV_INLINE V smallest(V a, V b) {
  return select(a < b, a, b);
}

OKV_INLINE f32x16 absolute(f32x16 a) { return as_float(as_int(a) & 0x7fffffff); }

// Nearest float16, halves to even; too large becomes infinity.
OKV_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above
  if (magnitude >= 0x38800000u)
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  const uint32_t shift = 126u - (magnitude >> 23);  // a subnormal: units of 2^-24
  if (shift > 24u) return (uint16_t)sign;
  const uint32_t whole = (magnitude & 0x7fffffu) | 0x800000u, kept = whole >> shift;
  const uint32_t rest = whole & ((1u << shift) - 1u), half = 1u << (shift - 1u);
  return (uint16_t)(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
}

#if OKV_REGISTER == 64
#include "simd_512.h"
#elif OKV_REGISTER == 32
#include "simd_256.h"
#else
#include "simd_128.h"
#endif

OKV_INLINE f32x16 load_bfloat(const uint16_t *from) {
  return as_float(load_u16(from) << 16);
}

// Sixteen numbers of a tensor as floats.
OKV_INLINE f32x16 load_as_float(const void *from, int64_t index, int32_t dtype) {
  if (dtype == OKV_F32) return load<f32x16>((const float *)from + index);
  const uint16_t *half = (const uint16_t *)from + index;
  return dtype == OKV_BF16 ? load_bfloat(half) : load_half(half);
}

// float8 e4m3 in 32-bit lanes (never negative, never NaN) to floats: seven bits to the left it is a float16 of a 256th,
// or with integers: 120 is the difference of the exponents' biases.
OKV_INLINE f32x16 e4m3_to_float(i32x16 bits) {
#if OKV_REGISTER == 64
  return half_bits_to_float(bits << 7) * splat(256.0f);
#else
  const i32x16 shifted = bits << 20;
  const f32x16 small = as_float(shifted | (121 << 23)) - as_float(splat(121 << 23));
  return select(bits < 8, small, as_float(shifted + (120 << 23)));
#endif
}

