// The product that all the time goes into: signed 8-bit rows times unsigned 8-bit codes, summed in 32 bits.
// A panel holds codes as [depth / 4][32 lanes][4]: one 32-bit lane is four steps of depth.
//   sums[row][lane] = sum over depth of rows[row][depth] * panel[depth / 4][lane][depth % 4]
// Included inside an anonymous namespace of every isa_*.cpp.

constexpr int PANEL_LANES = 32;
constexpr int PANEL_LINE = 4 * PANEL_LANES;  // bytes of four steps of depth

OKV_INLINE int32_t four_bytes(const int8_t *from) {
  int32_t v;
  __builtin_memcpy(&v, from, 4);
  return v;
}

#if defined(__AVX512VNNI__)

constexpr int ROWS_AT_ONCE = 8;

// UNROLL: chains of sums per row; a single row pair needs several to hide the latency of vpdpbusd.
template <int ROWS, int UNROLL>
OKV_INLINE void dot_some(const uint8_t *panel, int quads, const int8_t *rows, int stride, int32_t *sums) {
  __m512i low[UNROLL][ROWS], high[UNROLL][ROWS];
#pragma GCC unroll 16
  for (int u = 0; u < UNROLL; u++)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) low[u][r] = high[u][r] = _mm512_setzero_si512();
  for (int q = 0; q < quads; q += UNROLL)
#pragma GCC unroll 16
    for (int u = 0; u < UNROLL; u++) {
      const __m512i a = _mm512_loadu_si512(panel + (q + u) * PANEL_LINE);
      const __m512i b = _mm512_loadu_si512(panel + (q + u) * PANEL_LINE + 64);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) {
        const __m512i x = _mm512_set1_epi32(four_bytes(rows + r * stride + 4 * (q + u)));
        low[u][r] = _mm512_dpbusd_epi32(low[u][r], a, x);
        high[u][r] = _mm512_dpbusd_epi32(high[u][r], b, x);
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++) {
    __m512i a = low[0][r], b = high[0][r];
#pragma GCC unroll 16
    for (int u = 1; u < UNROLL; u++) {
      a = _mm512_add_epi32(a, low[u][r]);
      b = _mm512_add_epi32(b, high[u][r]);
    }
    _mm512_storeu_si512(sums + r * PANEL_LANES, a);
    _mm512_storeu_si512(sums + r * PANEL_LANES + 16, b);
  }
}

template <int ROWS>
OKV_INLINE void dot_rows(const uint8_t *panel, int quads, const int8_t *rows, int stride, int, int32_t *sums) {
  dot_some<ROWS, ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1>(panel, quads, rows, stride, sums);
}

#elif defined(__AVX2__)

constexpr int ROWS_AT_ONCE = 2;

// vpmaddubsw adds pairs into 16 bits: 2 * (2^bits - 1) * 128 at a time, so after 8 (4 bits), 16 (3) or 32 (2) they are
// widened. The wide sums stay in memory, for want of registers.
template <int ROWS>
OKV_INLINE void dot_rows(const uint8_t *panel, int quads, const int8_t *rows, int stride, int bits, int32_t *sums) {
  const int most = 128 >> bits;
  for (int first = 0; first < quads; first += most) {
    const int last = first + most < quads ? first + most : quads;
    __m256i part[ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) part[r][i] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int q = first; q < last; q++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m256i codes = _mm256_loadu_si256((const __m256i *)(panel + q * PANEL_LINE) + i);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const __m256i x = _mm256_set1_epi32(four_bytes(rows + r * stride + 4 * q));
          part[r][i] = _mm256_add_epi16(part[r][i], _mm256_maddubs_epi16(codes, x));
        }
      }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m256i *to = (__m256i *)(sums + r * PANEL_LANES) + i;
        const __m256i wide = _mm256_madd_epi16(part[r][i], _mm256_set1_epi16(1));
        _mm256_storeu_si256(to, first ? _mm256_add_epi32(_mm256_loadu_si256(to), wide) : wide);
      }
  }
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int ROWS_AT_ONCE = 2;

// Codes are below 16, so they are signed bytes as well.
template <int ROWS>
OKV_INLINE void dot_rows(const uint8_t *panel, int quads, const int8_t *rows, int stride, int, int32_t *sums) {
  int32x4_t total[ROWS][8];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) total[r][i] = vdupq_n_s32(0);
  for (int q = 0; q < quads; q += 4) {
    int8x16_t x[ROWS];
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; r++) x[r] = vld1q_s8(rows + r * stride + 4 * q);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const int8_t *codes = (const int8_t *)panel + q * PANEL_LINE + 16 * i;
      const int8x16_t a = vld1q_s8(codes), b = vld1q_s8(codes + PANEL_LINE);
      const int8x16_t c = vld1q_s8(codes + 2 * PANEL_LINE), d = vld1q_s8(codes + 3 * PANEL_LINE);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; r++) {
        total[r][i] = vdotq_laneq_s32(total[r][i], a, x[r], 0);
        total[r][i] = vdotq_laneq_s32(total[r][i], b, x[r], 1);
        total[r][i] = vdotq_laneq_s32(total[r][i], c, x[r], 2);
        total[r][i] = vdotq_laneq_s32(total[r][i], d, x[r], 3);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) vst1q_s32(sums + r * PANEL_LANES + 4 * i, total[r][i]);
}

#elif defined(__SSE2__)

constexpr int ROWS_AT_ONCE = 4;

// Without products of bytes, the rows of high and of low bytes are put together to 16 bits, apart for even and odd
// depths; their sums go to those of the low row.
template <int ROWS>
OKV_INLINE void dot_rows(const uint8_t *panel, int quads, const int8_t *rows, int stride, int, int32_t *sums) {
  constexpr int PAIRS = ROWS / 2, WIDE = 8 / PAIRS;
  const __m128i low_byte = _mm_set1_epi16(0xff);
  alignas(16) int32_t even[PAIRS][OKV_MAX_HEAD_DIM / 4], odd[PAIRS][OKV_MAX_HEAD_DIM / 4];
  for (int r = 0; r < PAIRS; r++)
    for (int q = 0; q < quads; q += 4) {
      const __m128i high = _mm_loadu_si128((const __m128i *)(rows + 2 * r * stride + 4 * q));
      const __m128i low = _mm_loadu_si128((const __m128i *)(rows + (2 * r + 1) * stride + 4 * q));
      const __m128i of_even = _mm_srai_epi16(_mm_slli_epi16(low, 8), 8), of_odd = _mm_srai_epi16(low, 8);
      _mm_store_si128((__m128i *)(even[r] + q), _mm_add_epi16(_mm_slli_epi16(high, 8), of_even));
      _mm_store_si128((__m128i *)(odd[r] + q), _mm_add_epi16(_mm_andnot_si128(low_byte, high), of_odd));
    }
  for (int first = 0; first < 8; first += WIDE) {
    __m128i total[PAIRS][WIDE];
#pragma GCC unroll 2
    for (int r = 0; r < PAIRS; r++)
#pragma GCC unroll 8
      for (int i = 0; i < WIDE; i++) total[r][i] = _mm_setzero_si128();
    for (int q = 0; q < quads; q++)
#pragma GCC unroll 8
      for (int i = 0; i < WIDE; i++) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)(panel + q * PANEL_LINE) + first + i);
        const __m128i a = _mm_and_si128(codes, low_byte), b = _mm_srli_epi16(codes, 8);
#pragma GCC unroll 2
        for (int r = 0; r < PAIRS; r++) {
          total[r][i] = _mm_add_epi32(total[r][i], _mm_madd_epi16(a, _mm_set1_epi32(even[r][q])));
          total[r][i] = _mm_add_epi32(total[r][i], _mm_madd_epi16(b, _mm_set1_epi32(odd[r][q])));
        }
      }
#pragma GCC unroll 2
    for (int r = 0; r < PAIRS; r++)
#pragma GCC unroll 8
      for (int i = 0; i < WIDE; i++) {
        _mm_storeu_si128((__m128i *)(sums + 2 * r * PANEL_LANES) + first + i, _mm_setzero_si128());
        _mm_storeu_si128((__m128i *)(sums + (2 * r + 1) * PANEL_LANES) + first + i, total[r][i]);
      }
  }
}

#else

constexpr int ROWS_AT_ONCE = 1;

template <int ROWS>
OKV_INLINE void dot_rows(const uint8_t *panel, int quads, const int8_t *rows, int, int, int32_t *sums) {
  for (int lane = 0; lane < PANEL_LANES; lane++) sums[lane] = 0;
  for (int q = 0; q < quads; q++)
    for (int lane = 0; lane < PANEL_LANES; lane++)
      for (int i = 0; i < 4; i++) sums[lane] += rows[4 * q + i] * panel[q * PANEL_LINE + 4 * lane + i];
}

#endif

// quads: steps of four in depth, a multiple of 4. bits: of the codes in the panel.
OKV_INLINE void dot(const uint8_t *panel, int quads, const int8_t *rows, int count, int stride, int bits,
                    int32_t *sums) {
  while (count > 0) {
    const int some = count < ROWS_AT_ONCE ? count : ROWS_AT_ONCE;
    if constexpr (ROWS_AT_ONCE == 8) {
      if (some == 8) dot_rows<8>(panel, quads, rows, stride, bits, sums);
      else if (some == 6) dot_rows<6>(panel, quads, rows, stride, bits, sums);
      else if (some == 4) dot_rows<4>(panel, quads, rows, stride, bits, sums);
      else dot_rows<2>(panel, quads, rows, stride, bits, sums);  // counts are even
    } else if constexpr (ROWS_AT_ONCE == 4) {
      if (some == 4) dot_rows<4>(panel, quads, rows, stride, bits, sums);
      else dot_rows<2>(panel, quads, rows, stride, bits, sums);
    } else {
      dot_rows<ROWS_AT_ONCE>(panel, quads, rows, stride, bits, sums);
    }
    rows += some * stride;
    sums += some * PANEL_LANES;
    count -= some;
  }
}
