// Products of few rows with many matrices, each matrix read once and straight from where it lies.
//
//   locum_add      y[p]        += W[item[p]] x[token[p]]      all of one format
//   locum_scatter  y[token[p]] += W[item[p]] x[p]             y in float32, in a fixed order
//   locum_spread   y[token[p]] += x[p]                        likewise
//   locum_swiglu   y[p] = scale[p] silu(x[p, :F]) x[p, F:]
//
// Pairs p of one item and one token are one unit: its product is computed once; locum_scatter adds up the x of the unit
// first. Pairs with item -1 are left out. Formats: bfloat16 and float32, sums in float32. Needs avx512_bf16.
//
// Letters: P pairs, U units, N items, O outputs and I inputs of an item.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;

constexpr long ROWS = 4;     // of W in one tile: 4 x 6 sums, with their operands, fill the 32 registers
constexpr long UNITS = 6;    // of x in one tile
constexpr long THIN = 8;     // units of an item from which a matrix of few inputs is worth turning round
constexpr long BLOCK = 128;  // rows of W that one thread takes at a time, at most; they stay in its second cache
namespace {

struct Units {
  std::vector<int64_t> pair;   // pairs by item, then as they came
  std::vector<int64_t> first;  // of each unit, its first place in `pair`; one more at the end
  std::vector<int64_t> begin;  // of each item, its first unit; one more at the end
};

Units group(const int64_t* item, const int64_t* token, long P, long N) {
  Units g;
  std::vector<int64_t> at(N + 1, 0);
  for (long p = 0; p < P; p++)
    if (item[p] >= 0) at[item[p] + 1]++;
  for (long n = 0; n < N; n++) at[n + 1] += at[n];
  g.pair.resize(at[N]);
  std::vector<int64_t> next(at.begin(), at.end());
  for (long p = 0; p < P; p++)
    if (item[p] >= 0) g.pair[next[item[p]]++] = p;
  for (long n = 0; n < N; n++) {
    g.begin.push_back(g.first.size());
    for (long k = at[n]; k < at[n + 1]; k++)
      if (k == at[n] || token[g.pair[k]] != token[g.pair[k - 1]]) g.first.push_back(k);
  }
  g.begin.push_back(g.first.size());
  g.first.push_back(at[N]);
  return g;
}

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

template <class Format, long R, bool AHEAD, class Number>
inline void tile_of(long M, const Number* w, long I, const Number* x, float* out) {
  switch (M) {
    case 1: return tile<Format, R, 1, AHEAD>(w, I, x, out);
    case 2: return tile<Format, R, 2, AHEAD>(w, I, x, out);
    case 3: return tile<Format, R, 3, AHEAD>(w, I, x, out);
    case 4: return tile<Format, R, 4, AHEAD>(w, I, x, out);
    case 5: return tile<Format, R, 5, AHEAD>(w, I, x, out);
    default: return tile<Format, R, 6, AHEAD>(w, I, x, out);
  }
}

// All units of one item times `rows` rows of its W, out[m][row]. After the first tile of units, W is in the second cache.
template <class Format, class Number>
void block(const Number* w, long rows, long I, long width, const Number* x, long M, float* out) {
  for (long t = 0, m = 0; m < M; t++) {
    const long end = tile_begin(M, t + 1);
    const Number* units = x + m * width;
    long r = 0;
    for (; r + ROWS <= rows; r += ROWS)
      if (m == 0 && r + 2 * ROWS <= rows)
        tile_of<Format, ROWS, true>(end - m, w + r * I, I, units, out + m * BLOCK + r);
      else
        tile_of<Format, ROWS, false>(end - m, w + r * I, I, units, out + m * BLOCK + r);
    for (; r < rows; r++) tile_of<Format, 1, false>(end - m, w + r * I, I, units, out + m * BLOCK + r);
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

// Adds 16 outputs of a unit, or fewer with a mask, to the rows of y that they are for, from column o on.
template <class Format, bool SCATTER>
inline void store(const Units& g, long unit, const int64_t* token, void* y, long y_stride, long o, __mmask16 mask, __m512 x) {
  for (long k = g.first[unit]; k < g.first[unit + 1]; k++) {
    if (SCATTER) {
      float* to = (float*)y + token[g.pair[k]] * y_stride + o;
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), x));
      return;  // the unit's pairs were summed before
    }
    typename Format::Number* to = (typename Format::Number*)y + g.pair[k] * y_stride + o;
    Format::narrow(mask, to, _mm512_add_ps(Format::widen(mask, to), x));
  }
}

// 16 rows of W at a time, turned round so that a lane is a row: of inputs that fit one register, LANES of it, a product
// needs no sum over lanes. x holds a register for every unit, from `first` on.
template <class Format, bool SCATTER, long LANES, class Number>
void thin(const Number* w, long rows, long I, const Number* x, const Units& g, long first, long M, const int64_t* token,
          void* y, long y_stride, long o) {
  using Register = typename Format::Register;
  const __m512i row = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                         _mm512_set1_epi32(I / Format::LANE));
  for (long r = 0; r < rows; r += 16) {
    const __mmask16 mask = rest(rows - r);
    __m512i lane[LANES];
#pragma GCC unroll 16
    for (long k = 0; k < LANES; k++)
      lane[k] = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), k < I / Format::LANE ? mask : (__mmask16)0, row,
                                            (const int*)(w + r * I) + k, 4);
    for (long m = 0; m < M; m++) {
      const Number* unit = x + m * Format::STEP;
      __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 16
      for (long k = 0; k < LANES; k++) {
        int numbers;
        std::memcpy(&numbers, unit + k * Format::LANE, sizeof numbers);
        sum = Format::plus(sum, (Register)lane[k], (Register)_mm512_set1_epi32(numbers));
      }
      store<Format, SCATTER>(g, first + m, token, y, y_stride, o + r, mask, sum);
    }
  }
}

template <class Format, bool SCATTER, class Number = typename Format::Number>
void products(const Number* x, long x_stride, const Number* w, long w_stride, const int64_t* item, const int64_t* token,
              void* y, long y_stride, long P, long N, long O, long I, int threads) {
  constexpr long STEP = Format::STEP;
  const Units g = group(item, token, P, N);
  const long lanes = I / Format::LANE;
  const bool is_thin = I % Format::LANE == 0 && I <= STEP;
  const long U = g.first.size() - 1, width = (I + STEP - 1) / STEP * STEP;
  if (U == 0) return;
  long most = 0;
  for (long n = 0; n < N; n++) most = std::max<long>(most, g.begin[n + 1] - g.begin[n]);
  const long share = std::clamp(O / (4 * threads) / ROWS * ROWS, 4 * ROWS, BLOCK);  // enough for all threads
  std::vector<Number> packed(U * width);
  std::vector<int64_t> item_of(U);
  for (long n = 0; n < N; n++) std::fill(item_of.begin() + g.begin[n], item_of.begin() + g.begin[n + 1], n);
#pragma omp parallel num_threads(threads) if (U * O * I > (1 << 16))
  {
    std::vector<Number> sum(I);
    std::vector<float> out(most * BLOCK);
#pragma omp for schedule(static)
    for (long u = 0; u < U; u++) {
      const long n = item_of[u], from = g.first[u], to = g.first[u + 1];
      const Number* row = x + (SCATTER ? g.pair[from] : token[g.pair[from]]) * x_stride;
      if (SCATTER && to - from > 1) {
        for (long i = 0; i < I; i += 16) {
          __m512 total = _mm512_setzero_ps();
          for (long k = from; k < to; k++)
            total = _mm512_add_ps(total, Format::widen(rest(I - i), x + g.pair[k] * x_stride + i));
          Format::narrow(rest(I - i), sum.data() + i, total);
        }
        row = sum.data();
      }
      pack<Format>(row, I, width, g.begin[n + 1] - g.begin[n], u - g.begin[n], packed.data() + g.begin[n] * width);
    }
    // A thread has some outputs of all items: no two add to one number, and the order of additions is always the same.
#pragma omp for schedule(dynamic, 1)
    for (long o = 0; o < O; o += share) {
      const long rows = std::min(share, O - o);
      for (long n = 0; n < N; n++) {
        const long first = g.begin[n], M = g.begin[n + 1] - first;
        if (M == 0) continue;
        if (is_thin && M >= THIN) {
          const auto turned = lanes <= 4 ? thin<Format, SCATTER, 4, Number>
                            : lanes <= 8 ? thin<Format, SCATTER, 8, Number> : thin<Format, SCATTER, 16, Number>;
          turned(w + n * w_stride + o * I, rows, I, packed.data() + first * width, g, first, M, token, y, y_stride, o);
          continue;
        }
        block<Format>(w + n * w_stride + o * I, rows, I, width, packed.data() + first * width, M, out.data());
        for (long m = 0; m < M; m++)
          for (long r = 0; r < rows; r += 16) {
            const __mmask16 mask = rest(rows - r);
            const __m512 sum = _mm512_maskz_loadu_ps(mask, out.data() + m * BLOCK + r);
            store<Format, SCATTER>(g, first + m, token, y, y_stride, o + r, mask, sum);
          }
      }
    }
  }
}

template <class Format, class Number = typename Format::Number>
void spread(const Number* x, long x_stride, const int64_t* token, float* y, long y_stride, long P, long O, int threads) {
  const long share = (O / threads + 15) / 16 * 16;  // a thread has some columns of all rows
#pragma omp parallel for num_threads(threads) schedule(static) if (P * O > (1 << 16))
  for (long o = 0; o < O; o += share)
    for (long p = 0; p < P; p++)
      for (long r = o; r < std::min(o + share, O); r += 16) {
        if (p + 1 < P) _mm_prefetch((const char*)(y + token[p + 1] * y_stride + r), _MM_HINT_T0);
        const __mmask16 mask = rest(std::min(o + share, O) - r);
        float* to = y + token[p] * y_stride + r;
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), Format::widen(mask, x + p * x_stride + r));
        _mm512_mask_storeu_ps(to, mask, sum);
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

template <class Format, class Number = typename Format::Number>
void swiglu(const Number* x, long x_stride, const float* scale, Number* y, long P, long F, int threads) {
  const __m512 one = _mm512_set1_ps(1.f);
#pragma omp parallel for num_threads(threads) schedule(static) if (P * F > (1 << 15))
  for (long p = 0; p < P; p++)
    for (long f = 0; f < F; f += 16) {
      const __mmask16 mask = rest(F - f);
      const __m512 gate = Format::widen(mask, x + p * x_stride + f), up = Format::widen(mask, x + p * x_stride + F + f);
      const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
      const __m512 hidden = _mm512_mul_ps(_mm512_div_ps(gate, below), _mm512_mul_ps(up, _mm512_set1_ps(scale[p])));
      Format::narrow(mask, y + p * F + f, hidden);
    }
}

}  // namespace

#define ENTRY(NAME, FORMAT, SCATTER)                                                                                 \
  extern "C" void NAME(const FORMAT::Number* x, long x_stride, const FORMAT::Number* w, long w_stride,               \
                       const int64_t* item, const int64_t* token, void* y, long y_stride, long P, long N, long O,    \
                       long I, int threads) {                                                                        \
    products<FORMAT, SCATTER>(x, x_stride, w, w_stride, item, token, y, y_stride, P, N, O, I, threads);              \
  }

ENTRY(locum_add_bfloat16, BFloat16, false)
ENTRY(locum_add_float32, Float32, false)
ENTRY(locum_scatter_bfloat16, BFloat16, true)
ENTRY(locum_scatter_float32, Float32, true)

#define SPREAD(NAME, FORMAT)                                                                                         \
  extern "C" void NAME(const FORMAT::Number* x, long x_stride, const int64_t* token, float* y, long y_stride, long P, \
                       long O, int threads) {                                                                        \
    spread<FORMAT>(x, x_stride, token, y, y_stride, P, O, threads);                                                  \
  }

SPREAD(locum_spread_bfloat16, BFloat16)
SPREAD(locum_spread_float32, Float32)

#define SWIGLU(NAME, FORMAT)                                                                                         \
  extern "C" void NAME(const FORMAT::Number* x, long x_stride, const float* scale, FORMAT::Number* y, long P, long F, \
                       int threads) {                                                                                \
    swiglu<FORMAT>(x, x_stride, scale, y, P, F, threads);                                                            \
  }

SWIGLU(locum_swiglu_bfloat16, BFloat16)
SWIGLU(locum_swiglu_float32, Float32)
