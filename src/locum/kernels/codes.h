// Matrices in few bits, and the numbers that their bytes stand for: what native.cpp and few_bits.cpp share.
//
//   number = (code - 2^(bits - 1)) scale          symmetric
//   number = code scale + minimum                 with zero points
//
// Codes have 4 or 8 bits; scales and minimums are bfloat16, one for each group of a row. A code times a scale is exact in float32, so
// a number is rounded as formats/int_groups.py rounds it, however its sum is made.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

// N items of O outputs and I inputs; where in the bytes of an item what lies. `minimums` of -1: there are none.
struct Matrices {
  const uint8_t* bytes;
  long item_bytes, N, O, I, bits, group, row, first, scales, minimums, scale_row;
};

namespace {

constexpr long LARGEST = 128;  // columns of a group, at most
constexpr long BEFORE = 1 << 15;  // bytes by which codes are fetched before they are read

inline float widened(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline void rounded(float x, float* to) { *to = x; }
inline void rounded(float x, uint16_t* to) {  // to bfloat16, halves to the even one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *to = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// A group of one row, whole: a multiple of 32.
struct Group {
  const uint8_t* codes;
  float scale, minimum;
  bool is_symmetric;
  long count;
};

template <long BITS, class Number>
inline void make(const Group& g, Number* to) {
  const float half = 1l << (BITS - 1);
  float code[LARGEST];
  if (BITS == 8)
    for (long i = 0; i < g.count; i++) code[i] = g.codes[i];
  else
    for (long i = 0; i < g.count / 2; i++) code[2 * i] = g.codes[i] & 15, code[2 * i + 1] = g.codes[i] >> 4;
  if (g.is_symmetric)
    for (long i = 0; i < g.count; i++) rounded((code[i] - half) * g.scale, to + i);
  else
    for (long i = 0; i < g.count; i++) rounded(code[i] * g.scale + g.minimum, to + i);
}

#ifdef __AVX512BF16__
// The same in bfloat16, 32 at a time; numbers below 2^-126, which products in bfloat16 take for zero, are zero. In four bits a group
// has 16 numbers at most: they are made first, and codes choose among them.
template <long BITS>
inline __attribute__((always_inline)) void make(const Group& g, uint16_t* to) {
  const __m512 scale = _mm512_set1_ps(g.scale), least = _mm512_set1_ps(g.is_symmetric ? 0.f : g.minimum);
  const auto number = [&](__m512i code) __attribute__((always_inline)) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, least);
  };
  if (BITS == 4) {
    const __m512i all = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i half = _mm512_set1_epi32(g.is_symmetric ? 8 : 0);
    const __m256i once = (__m256i)_mm512_cvtneps_pbh(number(_mm512_sub_epi32(all, half)));
    const __m512i numbers = _mm512_broadcast_i64x4(once);  // a place has five bits, of which the first may be any
    for (long i = 0; i < g.count; i += 32) {
      const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(g.codes + i / 2)));
      const __m512i places = _mm512_or_si512(both, _mm512_slli_epi32(both, 12));
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(places, numbers));
    }
  } else {
    const __m128i sign = _mm_set1_epi8(-128);
    const auto some = [&](long i) __attribute__((always_inline)) {
      const __m128i code = _mm_loadu_si128((const __m128i*)(g.codes + i));
      return number(g.is_symmetric ? _mm512_cvtepi8_epi32(_mm_xor_si128(code, sign)) : _mm512_cvtepu8_epi32(code));
    };
    for (long i = 0; i < g.count; i += 32)
      _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(some(i + 16), some(i)));
  }
}
#endif

template <long BITS, class Number>
inline void make_row(const Matrices& w, const uint8_t* item, long row, Number* to) {
  const uint8_t* codes = item + row * w.row;
  const uint16_t* scales = (const uint16_t*)(item + w.scales) + row * w.scale_row;
  const uint16_t* minimums = w.minimums < 0 ? nullptr : (const uint16_t*)(item + w.minimums) + row * w.scale_row;
  const long whole = w.I / w.group;
  const auto group = [&](long g, const uint8_t* from) __attribute__((always_inline)) {
    return Group{from, widened(scales[g]), minimums ? widened(minimums[g]) : 0.f, !minimums, w.group};
  };
  for (long b = 0; b < w.row; b += 64) _mm_prefetch((const char*)codes + b + BEFORE, _MM_HINT_T1);
  for (long g = 0; g < whole; g++) make<BITS>(group(g, codes + g * w.group * BITS / 8), to + g * w.group);
  if (whole * w.group < w.I) {  // the row ends within a group
    uint8_t last[LARGEST] = {};
    Number made[LARGEST];
    std::memcpy(last, codes + whole * w.group * BITS / 8, w.row - whole * w.group * BITS / 8);
    make<BITS>(group(whole, last), made);
    std::memcpy(to + whole * w.group, made, (w.I - whole * w.group) * sizeof(Number));
  }
}

// Rows of an item's matrix, one after the other. They stay in the cache until they are multiplied, if they are not many.
template <class Number>
inline void make_rows(const Matrices& w, long item, long begin, long rows, Number* to) {
  const uint8_t* from = w.bytes + item * w.item_bytes;
  for (long r = 0; r < rows; r++)
    (w.bits == 4 ? make_row<4, Number> : make_row<8, Number>)(w, from, w.first + begin + r, to + r * w.I);
}

// A stack of matrices with I inputs, as products read it: numbers, items `stride` apart, or `coded`.
template <class Number>
struct Weights {
  const Number* numbers;
  long stride;
  const Matrices* coded;

  // Rows of an item: where they lie, or made in `room`.
  const Number* rows(long item, long begin, long count, long I, Number* room) const {
    if (!coded) return numbers + item * stride + begin * I;
    make_rows(*coded, item, begin, count, room);
    return room;
  }
};

}  // namespace
