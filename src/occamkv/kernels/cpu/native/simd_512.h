// What simd.h leaves to the width of a register: 512 bits, AVX-512 F, BW, VL, DQ and VNNI.

OKV_INLINE float sum(f32x16 x) { return _mm512_reduce_add_ps((__m512)x); }
OKV_INLINE float largest_lane(f32x16 x) { return _mm512_reduce_max_ps((__m512)x); }

// The sums of up to four vectors.
template <int COUNT>
OKV_INLINE void sums(const f32x16 *x, float *to) {
  const __m512 none = _mm512_setzero_ps();
  const __m512 x0 = (__m512)x[0], x1 = COUNT > 1 ? (__m512)x[COUNT > 1] : none;
  const __m512 x2 = COUNT > 2 ? (__m512)x[COUNT > 2 ? 2 : 0] : none;
  const __m512 x3 = COUNT > 3 ? (__m512)x[COUNT > 3 ? 3 : 0] : none;
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x0, x1), _mm512_unpackhi_ps(x0, x1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x2, x3), _mm512_unpackhi_ps(x2, x3));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  const __m128 e = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
  alignas(16) float four[4];
  _mm_store_ps(four, e);
  for (int i = 0; i < COUNT; i++) to[i] = four[i];
}

// Narrow numbers in memory as 32-bit lanes.
OKV_INLINE i32x16 load_u8(const void *from) {
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}

OKV_INLINE i32x16 load_i8(const void *from) {
  return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
}

OKV_INLINE i32x16 load_u16(const void *from) {
  return (i32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

// Bits of float16 numbers in 32-bit lanes to floats.
OKV_INLINE f32x16 half_bits_to_float(i32x16 bits) {
  return (f32x16)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
}

OKV_INLINE f32x16 load_half(const uint16_t *from) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

OKV_INLINE void store_half(uint16_t *to, f32x16 x) {
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

// Whole numbers that fit 16 bits.
OKV_INLINE void store_i16(void *to, i32x16 x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)x)); }

// Thirty-two of them in one store, because `fold` reads them in one load.
OKV_INLINE void store_i16(void *to, i32x16 a, i32x16 b) {
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)a));
  _mm512_storeu_si512(to, _mm512_inserti64x4(low, _mm512_cvtepi32_epi16((__m512i)b), 1));
}

// Lane 4i + j is lane 4j + i of x.
OKV_INLINE f32x16 transposed(f32x16 x) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (f32x16)_mm512_permutexvar_ps(order, (__m512)x);
}

// Every second of 32 words, from word `first`, 0 or 1, on.
OKV_INLINE i32x16 every_second(const void *from, int first) {
  static const int32_t even[LANES] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const __m512i order = _mm512_add_epi32(_mm512_loadu_si512(even), _mm512_set1_epi32(first));
  const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512((const char *)from + 64);
  return (i32x16)_mm512_permutex2var_epi32(a, order, b);
}

// The bytes of a * b / 32768, rounded, and the sum of these numbers; n is a multiple of 32.
OKV_INLINE int32_t fold(const int16_t *a, const int16_t *b, int n, int8_t *high, int8_t *low) {
  __m512i added = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 32) {
    const __m512i x = _mm512_mulhrs_epi16(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i));
    const __m512i up = _mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(128)), 8);
    _mm256_storeu_si256((__m256i *)(high + i), _mm512_cvtepi16_epi8(up));
    _mm256_storeu_si256((__m256i *)(low + i), _mm512_cvtepi16_epi8(x));
    added = _mm512_add_epi32(added, _mm512_madd_epi16(x, _mm512_set1_epi16(1)));
  }
  return _mm512_reduce_add_epi32(added);
}
