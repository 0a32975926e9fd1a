// Few rows of x times rows of a matrix, which is read once, straight from where it lies: what native.cpp and few_rows.cpp share.
//
// Formats: bfloat16 and float32, sums in float32. Needs avx512_bf16. Letters: M units (rows of x), R rows and I inputs of a matrix.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

using bf16 = uint16_t;

constexpr long ROWS = 4;     // of W in one tile: 4 x 6 sums, with their operands, fill the 32 registers
constexpr long UNITS = 6;    // of x in one tile
constexpr long BLOCK = 128;  // rows of W that one thread takes at a time, at most; they stay in its second cache

namespace {

// Loads and stores of a register, or with a mask of fewer numbers; `widen` and `narrow` are of 16 numbers.
struct BFloat16 {
  using Number = bf16;
  using Register = __m512bh;
  static constexpr long STEP = 32;  // numbers in one register
  static constexpr long LANE = 2;   // numbers in one of its 16 lanes
  static Register load(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static Register load(uint32_t mask, const bf16* x) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, x); }
  static __m512 plus(__m512 sum, Register a, Register b) { return _mm512_dpbf16_ps(sum, a, b); }
  static __m512 widen(__mmask16 mask, const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
  }
  static void narrow(__mmask16 mask, bf16* to, __m512 x) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
  }
};

struct Float32 {
  using Number = float;
  using Register = __m512;
  static constexpr long STEP = 16;
  static constexpr long LANE = 1;
  static Register load(const float* x) { return _mm512_loadu_ps(x); }
  static Register load(uint32_t mask, const float* x) { return _mm512_maskz_loadu_ps(mask, x); }
  static __m512 plus(__m512 sum, Register a, Register b) { return _mm512_fmadd_ps(a, b, sum); }
  static __m512 widen(__mmask16 mask, const float* x) { return load(mask, x); }
  static void narrow(__mmask16 mask, float* to, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
};

// The mask of what is left, if fewer than a register holds.
inline uint32_t rest(long count, long step = 16) { return count >= step ? ~0u : (1u << count) - 1; }

// Tile t of M units begins here; tiles of one item differ by at most one unit.
inline long tile_begin(long M, long t) { return M * t / ((M + UNITS - 1) / UNITS); }

// The sums of four registers, in order.
inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// out[m][r] = W row r times unit m, for R rows and M units whose registers lie side by side in x. `AHEAD`: fetch the rows
// that come next, since rows of 4 kB end where the processor's own prefetching does.
template <class Format, long R, long M, bool AHEAD>
inline void tile(const typename Format::Number* w, long I, const typename Format::Number* x, float* out) {
  constexpr long STEP = Format::STEP;
  __m512 acc[M][ROWS];
  for (long m = 0; m < M; m++)
    for (long r = 0; r < ROWS; r++) acc[m][r] = _mm512_setzero_ps();
  typename Format::Register a[R];
  const auto step = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (long m = 0; m < M; m++) {
      const typename Format::Register b = Format::load(x + STEP * m);
#pragma GCC unroll 4
      for (long r = 0; r < R; r++) acc[m][r] = Format::plus(acc[m][r], a[r], b);
    }
    x += STEP * M;
  };
  long i = 0;
  for (; i + STEP <= I; i += STEP) {
#pragma GCC unroll 4
    for (long r = 0; r < R; r++) {
      a[r] = Format::load(w + r * I + i);
      if (AHEAD) _mm_prefetch((const char*)(w + (R + r) * I + i), _MM_HINT_T1);
    }
    step();
  }
  if (i < I) {
#pragma GCC unroll 4
    for (long r = 0; r < R; r++) a[r] = Format::load(rest(I - i, STEP), w + r * I + i);
    step();
  }
#pragma GCC unroll 6
  for (long m = 0; m < M; m++) {
    const __m128 sum = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    if (R == ROWS)
      _mm_storeu_ps(out + m * BLOCK, sum);
    else
      _mm_store_ss(out + m * BLOCK, sum);
  }
}

// f with a number of units that the compiler knows.
template <class F>
inline void with_units(long M, const F& f) {
  switch (M) {
    case 1: return f(std::integral_constant<long, 1>());
    case 2: return f(std::integral_constant<long, 2>());
    case 3: return f(std::integral_constant<long, 3>());
    case 4: return f(std::integral_constant<long, 4>());
    case 5: return f(std::integral_constant<long, 5>());
    default: return f(std::integral_constant<long, UNITS>());
  }
}

// All units of one item times `rows` rows of its W, out[m][row]. After the first tile of units, W is in the second cache.
template <class Format, class Number>
void block(const Number* w, long rows, long I, long width, const Number* x, long M, float* out) {
  for (long t = 0, m = 0; m < M; t++) {
    const long end = tile_begin(M, t + 1);
    const Number* units = x + m * width;
    with_units(end - m, [&](auto known) {
      constexpr long K = decltype(known)::value;
      long r = 0;
      for (; r + ROWS <= rows; r += ROWS)
        if (m == 0 && r + 2 * ROWS <= rows)
          tile<Format, ROWS, K, true>(w + r * I, I, units, out + m * BLOCK + r);
        else
          tile<Format, ROWS, K, false>(w + r * I, I, units, out + m * BLOCK + r);
      for (; r < rows; r++) tile<Format, 1, K, false>(w + r * I, I, units, out + m * BLOCK + r);
    });
    m = end;
  }
}

// x of unit m of an item with M units, zeros at its end, into its place among the registers of its tile.
template <class Format, class Number>
void pack(const Number* row, long I, long width, long M, long m, Number* x) {
  constexpr long STEP = Format::STEP;
  const long count = (M + UNITS - 1) / UNITS;
  long t = m * count / M;
  while (tile_begin(M, t + 1) <= m) t++;
  const long begin = tile_begin(M, t), wide = tile_begin(M, t + 1) - begin;
  Number* to = x + begin * width + (m - begin) * STEP;
  for (long i = 0; i < I; i += STEP, to += wide * STEP) {
    const auto numbers = Format::load(rest(I - i, STEP), row + i);
    std::memcpy(to, &numbers, sizeof numbers);
  }
}

// e^x, with an error of two units in the last place; x is kept within what float32 holds.
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(88.f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 sum = _mm512_set1_ps(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(sum, n);
}

inline __m512 gated(__m512 gate, __m512 up, float scale) {
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
  return _mm512_mul_ps(_mm512_div_ps(gate, below), _mm512_mul_ps(up, _mm512_set1_ps(scale)));
}

}  // namespace
