// The same as few_bits_256.h in registers of 512 bits, with products of bytes: AVX512 with VNNI.
//
// x is 256 high + low, both bytes, high with a sign and low without: x = 256 high + low exactly. Codes need not be widened, and the
// sum of the first products is moved up by eight bits before the second ones are added. The second ones want codes with a sign, as
// those of four bits are; of eight bits they are taken less 128, which is made good with the sum of all low.
//
// x lies a step at a time: 64 of high, 64 of low; of four bits that twice, for even columns and for odd ones.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

using Floats = __m512;
constexpr long LANES = 16;  // of float32 in a register

template <long BITS>
constexpr long STEP = 512 / BITS;  // columns that are multiplied at a time: a register of codes

template <long BITS>
constexpr long TOGETHER = BITS == 4 ? 4 : 1;  // rows of W that one row of x is multiplied with at a time

inline Floats same(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void save(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_of(__m256 x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Floats cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Floats all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline Floats widened(const uint8_t* at, long count) {  // so many numbers of bfloat16, or LANES; zeros behind them
  const __m256i halves = _mm256_maskz_loadu_epi16(count < LANES ? (1 << count) - 1 : -1, at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// 32 numbers of x in order, as two registers of 16, into their place in a row. Returns the sum of what products leave out: 128 low.
template <long BITS>
inline long place(__m256i first, __m256i second, uint8_t* row, long column) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  __m256i high = _mm512_cvtepi16_epi8(_mm512_srai_epi16(both, 8)), low = _mm512_cvtepi16_epi8(both);
  if (BITS == 8) {
    uint8_t* to = row + column / 64 * 128 + column % 64;
    _mm256_storeu_si256((__m256i*)to, high);
    _mm256_storeu_si256((__m256i*)(to + 64), low);
    const __m256i sums = _mm256_sad_epu8(low, _mm256_setzero_si256());
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return 128 * (_mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1));
  }
  const __m256i apart = _mm256_broadcastsi128_si256(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
  high = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(high, apart), 0xd8);  // even columns below odd ones
  low = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(low, apart), 0xd8);
  uint8_t* to = row + column / 128 * 256 + column % 128 / 2;
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(high));
  _mm_storeu_si128((__m128i*)(to + 64), _mm256_castsi256_si128(low));
  _mm_storeu_si128((__m128i*)(to + 128), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128((__m128i*)(to + 192), _mm256_extracti128_si256(low, 1));
  return 0;
}

// The scales of the groups of a step, each in the lanes of its codes.
template <long GROUPS>
inline Floats spread(const float* scales) {
  if (GROUPS == 1) return _mm512_set1_ps(*scales);
  const __m512 some = _mm512_broadcast_f32x4(_mm_loadu_ps(scales));
  const __m512i two = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(GROUPS == 2 ? two : four, some);
}

// total[r][m] += for each group its scale times the sum of its codes times x: of one group, or as many as a step has. Rows of W lie
// `apart` bytes apart, scales `wide` numbers.
template <long BITS, long GROUP, long R, long M>
inline __attribute__((always_inline)) void add_step(const uint8_t* codes, long apart, const uint8_t* const (&x)[M],
                                                    const float* scales, long wide, Floats (&total)[R][M]) {
  constexpr long GROUPS = std::max(STEP<BITS> / GROUP, 1l), PARTS = BITS == 4 ? 2 : std::max(GROUP / STEP<BITS>, 1l);
  const __m512i fifteen = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
#pragma GCC unroll 4
  for (long r = 0; r < R; r++) {
    __m512i code[PARTS];  // of even and odd columns, or of one step and the next
    code[0] = _mm512_loadu_si512(codes + r * apart);
    if (BITS == 4)
      code[1] = _mm512_and_si512(_mm512_srli_epi16(code[0], 4), fifteen), code[0] = _mm512_and_si512(code[0], fifteen);
    else if (PARTS == 2)
      code[1] = _mm512_loadu_si512(codes + r * apart + 64);
#pragma GCC unroll 4
    for (long m = 0; m < M; m++) {
      __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (long p = 0; p < PARTS; p++) sum = _mm512_dpbusd_epi32(sum, code[p], _mm512_loadu_si512(x[m] + 128 * p));
      sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 2
      for (long p = 0; p < PARTS; p++) {
        const __m512i low = _mm512_loadu_si512(x[m] + 128 * p + 64);
        sum = _mm512_dpbusd_epi32(sum, low, BITS == 4 ? code[p] : _mm512_xor_si512(code[p], sign));
      }
      const Floats scale = spread<GROUPS>(scales + (r * M + m) * wide);
      total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[r][m]);
    }
  }
}

}  // namespace
