// What simd.h leaves to the width of a register: 256 bits, AVX2, FMA and F16C.

OKV_INLINE __m128 halves_added(f32 x) {
  return _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
}

OKV_INLINE float sum(f32x16 x) {
  __m128 s = halves_added(x.low + x.high);
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

OKV_INLINE float largest_lane(f32x16 x) {
  const __m256 both = (__m256)largest(x.low, x.high);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// The sums of up to four vectors.
template <int COUNT>
OKV_INLINE void sums(const f32x16 *x, float *to) {
  __m128 s[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i++) s[i] = halves_added(x[i].low + x[i].high);
  _MM_TRANSPOSE4_PS(s[0], s[1], s[2], s[3]);
  alignas(16) float four[4];
  _mm_store_ps(four, _mm_add_ps(_mm_add_ps(s[0], s[2]), _mm_add_ps(s[1], s[3])));
  for (int i = 0; i < COUNT; i++) to[i] = four[i];
}

// Narrow numbers in memory as 32-bit lanes.
OKV_INLINE i32x16 load_u8(const void *from) {
  return {(i32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)),
          (i32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)from + 8)))};
}

OKV_INLINE i32x16 load_i8(const void *from) {
  return {(i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)),
          (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const char *)from + 8)))};
}

OKV_INLINE i32x16 load_u16(const void *from) {
  return {(i32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)),
          (i32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from + 1))};
}

// Bits of float16 numbers in 32-bit lanes to floats.
OKV_INLINE f32x16 half_bits_to_float(i32x16 bits) {
  // the four quarters of the lanes lie as 0, 2, 1, 3
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)bits.low, (__m256i)bits.high), 0xd8);
  return {(f32)_mm256_cvtph_ps(_mm256_castsi256_si128(packed)),
          (f32)_mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1))};
}

OKV_INLINE f32x16 load_half(const uint16_t *from) {
  return {(f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
          (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + 1))};
}

OKV_INLINE void store_half(uint16_t *to, f32x16 x) {
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)to + 1, _mm256_cvtps_ph((__m256)x.high, _MM_FROUND_TO_NEAREST_INT));
}

// Whole numbers that fit 16 bits.
OKV_INLINE void store_i16(void *to, i32x16 x) {
  const __m256i packed = _mm256_packs_epi32((__m256i)x.low, (__m256i)x.high);
  _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0xd8));
}

OKV_INLINE void store_i16(void *to, i32x16 a, i32x16 b) {
  store_i16(to, a);
  store_i16((char *)to + 32, b);
}

// Lane 4i + j is lane 4j + i of x.
OKV_INLINE f32x16 transposed(f32x16 x) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256 low = (__m256)x.low, high = (__m256)x.high;
  return {(f32)_mm256_permutevar8x32_ps(_mm256_unpacklo_ps(low, high), order),
          (f32)_mm256_permutevar8x32_ps(_mm256_unpackhi_ps(low, high), order)};
}

// Every second of 32 words, from word `first`, 0 or 1, on.
OKV_INLINE i32x16 every_second(const void *from, int first) {
  const __m256 *words = (const __m256 *)from;
  __m256 half[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256 a = _mm256_loadu_ps((const float *)(words + 2 * i));
    const __m256 b = _mm256_loadu_ps((const float *)(words + 2 * i + 1));
    const __m256 mixed = first ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    half[i] = (__m256)_mm256_permute4x64_epi64((__m256i)mixed, 0xd8);
  }
  return {(i32)half[0], (i32)half[1]};
}

// The bytes of a * b / 32768, rounded, and the sum of these numbers; n is a multiple of 32.
OKV_INLINE int32_t fold(const int16_t *a, const int16_t *b, int n, int8_t *high, int8_t *low) {
  const __m256i half = _mm256_set1_epi16(128), bytes = _mm256_set1_epi16(255), one = _mm256_set1_epi16(1);
  __m256i added = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 32) {
    __m256i x[2], up[2], down[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      x[j] = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *)(a + i) + j),
                                 _mm256_loadu_si256((const __m256i *)(b + i) + j));
      up[j] = _mm256_srai_epi16(_mm256_add_epi16(x[j], half), 8);
      down[j] = _mm256_and_si256(x[j], bytes);
      added = _mm256_add_epi32(added, _mm256_madd_epi16(x[j], one));
    }
    _mm256_storeu_si256((__m256i *)(high + i), _mm256_permute4x64_epi64(_mm256_packs_epi16(up[0], up[1]), 0xd8));
    _mm256_storeu_si256((__m256i *)(low + i), _mm256_permute4x64_epi64(_mm256_packus_epi16(down[0], down[1]), 0xd8));
  }
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(added), _mm256_extracti128_si256(added, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(s) + _mm_extract_epi32(s, 1);
}
