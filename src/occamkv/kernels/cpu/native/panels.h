// From the bit planes of a record (docs/format.md) to panels of bytes, one code each, for `dot`.
// In K's panels lanes are tokens and depth is channels, in V's lanes are channels and depth is tokens. Inside a run of
// 16 channels (K) or 32 channels (V) the order is what falls out of the planes without shuffling, and whoever fills the
// rows or reads the sums follows it:
// - K: depth 4s + i of a run is channel 4i + s, field s of the plane's byte i (`transposed` in simd_*.h);
// - V: see v_order.
// Included inside an anonymous namespace of every isa_*.cpp.

// Lane 8s + b of a run of 32 is channel 4b + s: field s of the plane's byte b.
OKV_INLINE constexpr int v_order(int lane) { return 4 * (lane % 8) + lane / 8; }

// Memory of the next page, fetched into the cache line by line while other work is done. Fetching a line too many
// does no harm.
struct Ahead {
  const char *at;
  template <int LINES>
  OKV_INLINE void fetch() {
#pragma GCC unroll 4
    for (int i = 0; i < LINES; i++) __builtin_prefetch(at + 64 * i);
    at += 64 * LINES;
  }
};

#if defined(__AVX512F__)

template <typename At>
OKV_INLINE __m512i four_rows(At row) {  // 16 bytes of four rows, side by side
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)row(0)));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)row(1)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)row(2)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)row(3)), 3);
}

#endif

// lines[j][t] = 32-bit word j of row t, for 16 rows.
OKV_INLINE void transpose(const uint8_t *rows, int stride, int words, uint32_t (*lines)[16]) {
#if defined(__AVX2__)
  if (words >= 4) {
    for (int j = 0; j < words; j += 4) {
      const int at = j + 4 <= words ? j : words - 4;  // a last, shorter run is read together with words before it
      const uint8_t *from = rows + 4 * at;
#if defined(__AVX512F__)
      __m512i r[4];
      for (int e = 0; e < 4; e++) r[e] = four_rows([&](int b) { return from + (4 * b + e) * stride; });
      const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
      const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
      _mm512_storeu_si512(lines[at], _mm512_unpacklo_epi64(a, c));
      _mm512_storeu_si512(lines[at + 1], _mm512_unpackhi_epi64(a, c));
      _mm512_storeu_si512(lines[at + 2], _mm512_unpacklo_epi64(b, d));
      _mm512_storeu_si512(lines[at + 3], _mm512_unpackhi_epi64(b, d));
#else
      for (int half = 0; half < 16; half += 8) {
        __m256i r[4];
        for (int e = 0; e < 4; e++)
          r[e] = _mm256_inserti128_si256(
              _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(from + (half + e) * stride))),
              _mm_loadu_si128((const __m128i *)(from + (half + 4 + e) * stride)), 1);
        const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
        const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
        _mm256_storeu_si256((__m256i *)(lines[at] + half), _mm256_unpacklo_epi64(a, c));
        _mm256_storeu_si256((__m256i *)(lines[at + 1] + half), _mm256_unpackhi_epi64(a, c));
        _mm256_storeu_si256((__m256i *)(lines[at + 2] + half), _mm256_unpacklo_epi64(b, d));
        _mm256_storeu_si256((__m256i *)(lines[at + 3] + half), _mm256_unpackhi_epi64(b, d));
      }
#endif
    }
    return;
  }
#elif OKV_REGISTER == 16
  if (words >= 4) {
    for (int j = 0; j < words; j += 4) {
      const int at = j + 4 <= words ? j : words - 4;
      for (int t = 0; t < 16; t += 4) {
        u32 r[4];
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) r[e] = load<u32>(rows + (t + e) * stride + 4 * at);
        transpose(r);
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) store(lines[at + e] + t, r[e]);
      }
    }
    return;
  }
#endif
  for (int t = 0; t < 16; t++)
    for (int j = 0; j < words; j++) __builtin_memcpy(&lines[j][t], rows + t * stride + 4 * j, 4);
}

// Field s of each byte of a plane of 2-bit fields, or of nibbles of single bits, moved to weight 4 if it is the second.
OKV_INLINE u32x16 fields(u32x16 plane, int s) { return (plane >> (2 * s)) & 0x03030303u; }
OKV_INLINE u32x16 high_fields(u32x16 plane, int s) { return ((plane >> (2 * s)) & 0x03030303u) << 2; }
OKV_INLINE u32x16 high_bits(u32x16 nibbles, int s) { return ((nibbles >> s) & 0x01010101u) << 2; }

// The codes of 32 tokens, from token `first` of a record on: [width / 4][32][4].
template <int BITS>
OKV_INLINE void expand_k(const uint8_t *codes, int tokens, int first, int width, uint8_t *panel, Ahead &ahead) {
  alignas(64) uint32_t low[OKV_MAX_HEAD_DIM / 16][16], high[OKV_MAX_HEAD_DIM / 16][16];
  const uint8_t *second = codes + tokens * width / 4;
  for (int half = 0; half < 2; half++) {
    const int t = first + 16 * half;
    transpose(codes + t * width / 4, width / 4, width / 16, low);
    if (BITS == 4) transpose(second + t * width / 4, width / 4, width / 16, high);
    if (BITS == 3) transpose(second + t * width / 8, width / 8, width / 32, high);
    uint8_t *to = panel + 64 * half;
    for (int j = 0; j < width / 16; j++, to += 4 * PANEL_LINE) {
      const u32x16 plane = load<u32x16>(low[j]);
      ahead.fetch<BITS == 2 ? 2 : 4>();
      if constexpr (BITS == 2) {
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) store(to + s * PANEL_LINE, fields(plane, s));
      } else if constexpr (BITS == 4) {
        const u32x16 other = load<u32x16>(high[j]);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) store(to + s * PANEL_LINE, fields(plane, s) | high_fields(other, s));
      } else {
        const u32x16 word = load<u32x16>(high[j / 2]) >> (16 * (j % 2));
        const u32x16 nibbles =
            (word & 0xfu) | ((word & 0xf0u) << 4) | ((word & 0xf00u) << 8) | ((word & 0xf000u) << 12);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) store(to + s * PANEL_LINE, fields(plane, s) | high_bits(nibbles, s));
      }
    }
  }
}

constexpr int NEXT_RUN = OKV_PAGE_TOKENS / 4 * PANEL_LINE;  // in V's panels, from one run of 32 channels to the next

#if defined(__AVX512F__)

// words[b] = byte b of four rows.
OKV_INLINE void interleave(const uint8_t *rows, int stride, int bytes, uint32_t *words) {
  int b = 0;
  for (; b + 16 <= bytes; b += 16) {
    __m128i r[4];
    for (int e = 0; e < 4; e++) r[e] = _mm_loadu_si128((const __m128i *)(rows + e * stride + b));
    const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), c = _mm_unpacklo_epi8(r[2], r[3]);
    const __m128i d = _mm_unpackhi_epi8(r[0], r[1]), e = _mm_unpackhi_epi8(r[2], r[3]);
    _mm_storeu_si128((__m128i *)(words + b), _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128((__m128i *)(words + b + 4), _mm_unpackhi_epi16(a, c));
    _mm_storeu_si128((__m128i *)(words + b + 8), _mm_unpacklo_epi16(d, e));
    _mm_storeu_si128((__m128i *)(words + b + 12), _mm_unpackhi_epi16(d, e));
  }
  for (; b + 8 <= bytes; b += 8) {
    __m128i r[4];
    for (int e = 0; e < 4; e++) r[e] = _mm_loadl_epi64((const __m128i *)(rows + e * stride + b));
    const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), c = _mm_unpacklo_epi8(r[2], r[3]);
    _mm_storeu_si128((__m128i *)(words + b), _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128((__m128i *)(words + b + 4), _mm_unpackhi_epi16(a, c));
  }
  for (; b < bytes; b++) {
    uint32_t word = 0;
    for (int e = 0; e < 4; e++) word |= (uint32_t)rows[e * stride + b] << (8 * e);
    words[b] = word;
  }
}

// Sixteen tokens of one run: a and b hold the run's bytes 0-3 and 4-7 of each, block q of them those of quad q.
template <int BITS>
OKV_INLINE void expand_run(__m512i a, __m512i b, __m512i high_a, __m512i high_b, const uint32_t (*bits)[OKV_MAX_HEAD_DIM / 8],
                           uint8_t *to) {
  const __m512i three = _mm512_set1_epi8(3), one = _mm512_set1_epi8(1);
  const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(4));
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3);
  const __m512i bit = _mm512_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4, 1, 5, 1, 5, 1, 5, 1, 5);
#pragma GCC unroll 4
  for (int q = 0; q < 4; q++, to += PANEL_LINE) {
    const __m512i both = _mm512_add_epi64(_mm512_setr_epi64(0, 1, 8, 9, 0, 1, 8, 9), _mm512_set1_epi64(2 * q));
    const __m512i w = _mm512_permutex2var_epi64(a, both, b);
    __m512i x = _mm512_and_si512(_mm512_srlv_epi32(w, first), three);
    __m512i y = _mm512_and_si512(_mm512_srlv_epi32(w, last), three);
    if constexpr (BITS == 4) {
      const __m512i h = _mm512_permutex2var_epi64(high_a, both, high_b);
      x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_and_si512(_mm512_srlv_epi32(h, first), three), 2));
      y = _mm512_or_si512(y, _mm512_slli_epi32(_mm512_and_si512(_mm512_srlv_epi32(h, last), three), 2));
    } else if constexpr (BITS == 3) {
      const __m512i h =
          _mm512_permutexvar_epi32(twice, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)bits[q])));
      const __m512i later = _mm512_srli_epi32(h, 2);
      x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_and_si512(_mm512_srlv_epi32(h, bit), one), 2));
      y = _mm512_or_si512(y, _mm512_slli_epi32(_mm512_and_si512(_mm512_srlv_epi32(later, bit), one), 2));
    }
    _mm512_storeu_si512(to, x);
    _mm512_storeu_si512(to + 64, y);
  }
}

// Byte b of four rows side by side, bytes 4k .. 4k+3 in out[k]; each block of 128 bits is four rows of its own.
OKV_INLINE void interleave_blocks(const uint8_t *rows, int stride, __m512i out[4]) {
  __m512i r[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) r[e] = four_rows([&](int b) { return rows + (4 * b + e) * stride; });
  const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpacklo_epi8(r[2], r[3]);
  const __m512i c = _mm512_unpackhi_epi8(r[0], r[1]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi16(a, b);
  out[1] = _mm512_unpackhi_epi16(a, b);
  out[2] = _mm512_unpacklo_epi16(c, d);
  out[3] = _mm512_unpackhi_epi16(c, d);
}

#endif

#if OKV_REGISTER == 16

typedef Pair<u32> u32x8;

// Word b is byte b of four rows, for eight bytes.
OKV_INLINE u32x8 interleaved(const uint8_t *rows, int stride) {
  u8x16 r[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) r[e] = (u8x16)u64x2{load<uint64_t>(rows + e * stride), 0};
  const i16x8 a = (i16x8)zip_low(r[0], r[1]), b = (i16x8)zip_low(r[2], r[3]);
  return {(u32)zip_low(a, b), (u32)zip_high(a, b)};
}

// Words 2b and 2b + 1 are byte b of four rows and the same four bits to the right, for four bytes.
OKV_INLINE u32x8 interleaved_nibbles(const uint8_t *rows, int stride) {
  u8x16 r[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) r[e] = (u8x16)u32{load<uint32_t>(rows + e * stride), 0, 0, 0};
  const u32 h = (u32)zip_low((i16x8)zip_low(r[0], r[1]), (i16x8)zip_low(r[2], r[3]));
  return {zip_low(h, h >> 4), zip_high(h, h >> 4)};
}

#else

typedef uint32_t u32x8 __attribute__((vector_size(32)));

// Word b is byte b of four rows, for eight bytes.
OKV_INLINE u32x8 interleaved(const uint8_t *rows, int stride) {
  __m128i r[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) r[e] = _mm_loadl_epi64((const __m128i *)(rows + e * stride));
  const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpacklo_epi8(r[2], r[3]);
  return (u32x8)_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

// Words 2b and 2b + 1 are byte b of four rows and the same four bits to the right, for four bytes.
OKV_INLINE u32x8 interleaved_nibbles(const uint8_t *rows, int stride) {
  __m128i r[4];
#pragma GCC unroll 4
  for (int e = 0; e < 4; e++) r[e] = _mm_cvtsi32_si128(load<int32_t>(rows + e * stride));
  const __m128i h = _mm_unpacklo_epi16(_mm_unpacklo_epi8(r[0], r[1]), _mm_unpacklo_epi8(r[2], r[3]));
  const __m128i later = _mm_srli_epi32(h, 4);
  return (u32x8)_mm256_set_m128i(_mm_unpackhi_epi32(h, later), _mm_unpacklo_epi32(h, later));
}

#endif

// The codes of a record for the panels of a page, which start at `panel`: [width / 32][32 quads of tokens][32][4].
template <int BITS>
OKV_INLINE void expand_v(const uint8_t *codes, int tokens, int width, uint8_t *panel, Ahead &ahead) {
  const uint8_t *second = codes + tokens * width / 4;
#if defined(__AVX512F__)
  if (width >= 64) {
    alignas(64) uint32_t bits[4][OKV_MAX_HEAD_DIM / 8];
    for (int t = 0; t < tokens; t += 16) {
      ahead.fetch<4>();
      if (BITS == 3)
        for (int q = 0; q < 4; q++) interleave(second + (t + 4 * q) * width / 8, width / 8, width / 8, bits[q]);
      for (int run = 0; run < width / 32; run += 2) {
        const int at = run + 2 <= width / 32 ? run : run - 1;  // a last single run is read together with the one before
        __m512i x[4], y[4] = {};
        interleave_blocks(codes + t * width / 4 + 8 * at, width / 4, x);
        if (BITS == 4) interleave_blocks(second + t * width / 4 + 8 * at, width / 4, y);
        uint8_t *to = panel + at * NEXT_RUN + t / 4 * PANEL_LINE;
        expand_run<BITS>(x[0], x[1], y[0], y[1], (const uint32_t(*)[OKV_MAX_HEAD_DIM / 8]) & bits[0][4 * at], to);
        expand_run<BITS>(x[2], x[3], y[2], y[3], (const uint32_t(*)[OKV_MAX_HEAD_DIM / 8]) & bits[0][4 * at + 4],
                         to + NEXT_RUN);
      }
    }
    return;
  }
#endif
  for (int t = 0; t < tokens; t += 4) {
    ahead.fetch<2>();
    for (int run = 0; run < width / 32; run++) {
      uint8_t *to = panel + run * NEXT_RUN + t / 4 * PANEL_LINE;
      const u32x8 plane = interleaved(codes + t * width / 4 + 8 * run, width / 4);
      u32x8 other = {};
      if (BITS == 4) other = interleaved(second + t * width / 4 + 8 * run, width / 4);
      if (BITS == 3) other = interleaved_nibbles(second + t * width / 8 + 4 * run, width / 8);
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) {
        u32x8 code = (plane >> (2 * s)) & 0x03030303u;
        if (BITS == 4) code = code | ((other >> (2 * s)) & 0x03030303u) << 2;
        if (BITS == 3) code = code | ((other >> s) & 0x01010101u) << 2;
        store(to + 32 * s, code);
      }
    }
  }
}
