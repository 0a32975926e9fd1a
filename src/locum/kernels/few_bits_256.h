// Sums of groups of codes times whole numbers of x, for few_bits.cpp, in registers of 256 bits: AVX2.
//
// x lies as numbers of 16 bits in the order in which codes come out of their bytes, a step at a time: of four bits those of even
// columns, then of odd ones.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using Floats = __m256;
constexpr long LANES = 8;  // of float32 in a register

template <long BITS>
constexpr long STEP = 32;  // columns that are multiplied at a time

template <long BITS>
constexpr long TOGETHER = 4;  // rows of W that one row of x is multiplied with at a time

inline Floats same(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void save(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum_of(Floats x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline __m128 sums_of(Floats a, Floats b, Floats c, Floats d) {
  const Floats all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline Floats widened(const uint8_t* at, long count) {  // so many numbers of bfloat16, or LANES; zeros behind them
  uint8_t some[2 * LANES] = {};
  if (count < LANES) at = (const uint8_t*)std::memcpy(some, at, 2 * count);
  const __m128i halves = _mm_loadu_si128((const __m128i*)at);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// 32 numbers of x in order, as two registers of 16, into their place in a row. Returns nothing that products leave out.
template <long BITS>
inline long place(__m256i low, __m256i high, uint8_t* row, long column) {
  __m256i* to = (__m256i*)(row + 2 * column);
  if (BITS == 4) {  // numbers of odd columns are the upper halves of lanes
    const __m256i first = low, second = high, lower = _mm256_set1_epi32(0xffff);
    const __m256i evens = _mm256_packus_epi32(_mm256_and_si256(first, lower), _mm256_and_si256(second, lower));
    const __m256i odds = _mm256_packs_epi32(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16));
    low = _mm256_permute4x64_epi64(evens, 0xd8), high = _mm256_permute4x64_epi64(odds, 0xd8);
  }
  _mm256_storeu_si256(to, low);
  _mm256_storeu_si256(to + 1, high);
  return 0;
}

template <long BITS>
inline void codes_at(const uint8_t* from, __m256i& low, __m256i& high) {
  low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
  if (BITS == 4)
    high = _mm256_srli_epi16(low, 4), low = _mm256_and_si256(low, _mm256_set1_epi16(15));
  else
    high = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from + 1));
}

// total[r][m] += scale of a group times the sum of its codes times x. Rows of W lie `apart` bytes apart, scales `wide` numbers.
template <long BITS, long GROUP, long R, long M>
inline __attribute__((always_inline)) void add_step(const uint8_t* codes, long apart, const uint8_t* const (&x)[M],
                                                    const float* scales, long wide, Floats (&total)[R][M]) {
  __m256i sum[R][M];
#pragma GCC unroll 4
  for (long s = 0; s < GROUP / STEP<BITS>; s++)
#pragma GCC unroll 4
    for (long r = 0; r < R; r++) {
      __m256i low, high;
      codes_at<BITS>(codes + r * apart + s * STEP<BITS> * BITS / 8, low, high);
#pragma GCC unroll 4
      for (long m = 0; m < M; m++) {
        const __m256i* of = (const __m256i*)(x[m] + 2 * s * STEP<BITS>);
        const __m256i one = _mm256_madd_epi16(low, _mm256_loadu_si256(of));
        const __m256i two = _mm256_madd_epi16(high, _mm256_loadu_si256(of + 1));
        const __m256i both = _mm256_add_epi32(one, two);
        sum[r][m] = s == 0 ? both : _mm256_add_epi32(sum[r][m], both);
      }
    }
#pragma GCC unroll 4
  for (long r = 0; r < R; r++)
#pragma GCC unroll 4
    for (long m = 0; m < M; m++) {
      const __m256 scale = _mm256_broadcast_ss(scales + (r * M + m) * wide);
      total[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][m]), scale, total[r][m]);
    }
}

}  // namespace
