// Products of rows with many matrices, each matrix read once; what comes before and after a product is done on the way.
//
//   locum_add      y[p]        += W[item[p]] x[token[p]]      all of one format
//   locum_scatter  y[token[p]] += W[item[p]] x[p]             y in float32, in a fixed order
//   locum_gated    y[p] = scale[p] silu(W_gate x[token[p]]) W_up x[token[p]],     W[item[p]] = W_gate above W_up
//   locum_spread   y[token[p]] += x[p]                        y in float32, in a fixed order
//   locum_swiglu   y[p] = scale[p] silu(x[p, :F]) x[p, F:]
//
// Few units of an item: W is read straight from where it lies, row by row (`block`). More: 64 rows of W are turned round
// first, so that a lane is a row and no product needs a sum over lanes (`panels`).
//
// W in few bits (`coded`) becomes numbers some rows at a time, which stay in the second cache until they are multiplied.
//
// Pairs p of one item and one token are one unit: its product is computed once; locum_scatter adds up the x of the unit
// first. Pairs with item -1 are left out. Formats: bfloat16 and float32, sums in float32. Needs avx512_bf16.
//
// Letters: P pairs, U units, N items, O outputs and I inputs of an item.

#include <omp.h>

#include <memory>
#include <vector>

#include "codes.h"
#include "tiles.h"

constexpr long PANEL = 64;   // rows of W that are turned round together: 4 registers of 16 lanes
constexpr long DEPTH = 8192; // bytes of each of them, at most: they stay in the second cache, too
constexpr long TURN = 96;    // units of an item from which turning W round pays
constexpr long THIN = 8;     // the same where a row of W fits one register

namespace {

enum Mode { ADD, SCATTER, GATED };

struct alignas(64) Line { char bytes[64]; };  // what is read by the register begins where a register does

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

// What all rows and items of one call have in common.
struct Call {
  const int64_t* token;
  const float* scale;
  void* y;
  long y_stride, I, width;
};

// Adds 16 outputs of a unit, or fewer with a mask, to the rows of y that they are for, from column o on.
template <class Format, Mode MODE>
inline void store(const Call& c, const Units& g, long unit, long o, __mmask16 mask, __m512 x) {
  for (long k = g.first[unit]; k < g.first[unit + 1]; k++) {
    if (MODE == SCATTER) {
      float* to = (float*)c.y + c.token[g.pair[k]] * c.y_stride + o;
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), x));
      return;  // the unit's pairs were summed before
    }
    typename Format::Number* to = (typename Format::Number*)c.y + g.pair[k] * c.y_stride + o;
    Format::narrow(mask, to, _mm512_add_ps(Format::widen(mask, to), x));
  }
}

// Of 16 registers of 16 numbers of 4 bytes, rows become columns.
inline void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (long i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (long i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (long k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  // Now lane l of r[4 i + j] has column 4 l + j of rows 4 i to 4 i + 3, where j counts 0, 1, 2, 3.
#pragma GCC unroll 4
  for (long j = 0; j < 4; j++)
#pragma GCC unroll 2
    for (long i = 0; i < 16; i += 8) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
#pragma GCC unroll 4
  for (long j = 0; j < 4; j++)
#pragma GCC unroll 2
    for (long i = 0; i < 8; i += 4) {
      r[i + j] = _mm512_shuffle_i32x4(t[i + j], t[i + 8 + j], 0x88);
      r[i + 8 + j] = _mm512_shuffle_i32x4(t[i + j], t[i + 8 + j], 0xdd);
    }
}

// 16 rows of W or fewer, turned round into every fourth register from `to` on, one for each lane of inputs.
template <class Format, class Number>
void turn(const Number* w, long rows, long I, long inputs, Number* to) {
  for (long i = 0; i < inputs; i += Format::STEP) {
    __m512i r[16];
    for (long k = 0; k < 16; k++)
      r[k] = k < rows ? (__m512i)Format::load(rest(inputs - i, Format::STEP), w + k * I + i) : _mm512_setzero_si512();
    transpose(r);
    for (long k = 0; k < 16; k++, to += 4 * Format::STEP) _mm512_storeu_si512(to, r[k]);
  }
}

// out[m] = PANEL rows of W, turned round, times unit m; added to what is there if there is `more` of the product.
template <class Format, long M, class Number>
__attribute__((noinline)) void panel_tile(const Number* w, long lanes, const Number* x, float* out, bool more) {
  constexpr long STEP = Format::STEP;
  __m512 acc[M][4];
#pragma GCC unroll 6
  for (long m = 0; m < M; m++)
#pragma GCC unroll 4
    for (long v = 0; v < 4; v++) acc[m][v] = more ? _mm512_loadu_ps(out + m * PANEL + 16 * v) : _mm512_setzero_ps();
  const auto step = [&](long lane) __attribute__((always_inline)) {
    typename Format::Register a[4];
#pragma GCC unroll 4
    for (long v = 0; v < 4; v++) a[v] = Format::load(w + STEP * v);
    w += 4 * STEP;
#pragma GCC unroll 6
    for (long m = 0; m < M; m++) {
      int numbers;
      std::memcpy(&numbers, x + m * STEP + lane * Format::LANE, sizeof numbers);
      const auto b = (typename Format::Register)_mm512_set1_epi32(numbers);
#pragma GCC unroll 4
      for (long v = 0; v < 4; v++) acc[m][v] = Format::plus(acc[m][v], a[v], b);
    }
  };
  for (; lanes >= 16; lanes -= 16, x += M * STEP)
#pragma GCC unroll 16
    for (long lane = 0; lane < 16; lane++) step(lane);
  for (long lane = 0; lane < lanes; lane++) step(lane);
#pragma GCC unroll 6
  for (long m = 0; m < M; m++)
#pragma GCC unroll 4
    for (long v = 0; v < 4; v++) _mm512_storeu_ps(out + m * PANEL + 16 * v, acc[m][v]);
}

// Where a unit's outputs go is fetched while they are computed.
template <class Number, Mode MODE>
inline void fetch(const Call& c, const Units& g, long unit, long o, long rows) {
  for (long k = g.first[unit]; k < g.first[unit + 1]; k++) {
    const long row = MODE == SCATTER ? c.token[g.pair[k]] : g.pair[k], size = MODE == SCATTER ? 4 : sizeof(Number);
    const char* to = (const char*)c.y + (row * c.y_stride + o) * size;
    for (long b = 0; b < rows * size; b += 64) _mm_prefetch(to + b, _MM_HINT_T0);
    if (MODE == SCATTER) return;
  }
}

// A unit's outputs, from column o on, to where they belong.
template <class Format, Mode MODE, class Number = typename Format::Number>
inline void finish(const Call& c, const Units& g, long unit, long o, long rows, const float* sums) {
  for (long r = 0; r < rows; r += 16) {
    const __m512 sum = _mm512_loadu_ps(sums + r);
    if (MODE != GATED) store<Format, MODE>(c, g, unit, o + r, rest(rows - r), sum);
    if (MODE != GATED) continue;
    const __m512 up = _mm512_loadu_ps(sums + PANEL / 2 + r);
    for (long k = g.first[unit]; k < g.first[unit + 1]; k++)
      Format::narrow(rest(rows - r), (Number*)c.y + g.pair[k] * c.y_stride + o + r, gated(sum, up, c.scale[g.pair[k]]));
  }
}

// All M units of one item, from `first` on, times rows of W: outputs from o on, or gates and ups of half as many. There are
// several panels only where one holds all inputs; a unit's outputs are then made side by side.
template <class Format, Mode MODE, class Number>
void panels(const Call& c, const Number* w, const Number* up, long rows, const Units& g, long first, long M, const Number* x,
            long o, Number* turned, float* sums) {
  constexpr long DEEP = DEPTH / sizeof(Number), BOTH = MODE == GATED ? 2 : 1, WIDE = PANEL / BOTH;
  for (long i = 0; i < c.I; i += DEEP) {
    const long inputs = std::min(DEEP, c.I - i), lanes = (inputs + Format::LANE - 1) / Format::LANE;
    for (long r = 0; r < rows; r += WIDE)
      for (long v = 0; v < 4; v++) {
        const long row = r + 16 * v % WIDE;
        turn<Format>((16 * v < WIDE ? w : up) + row * c.I + i, rows - row, c.I, inputs, turned + r * BOTH * c.width + v * Format::STEP);
      }
    const bool last = i + inputs == c.I;
    for (long t = 0, m = 0; m < M; t++) {
      const long end = tile_begin(M, t + 1);
      float* out = sums + (c.I > DEEP ? m * PANEL : 0);
      for (long r = 0; r < rows; r += WIDE) {
        const long some = std::min(WIDE, rows - r);
        for (long unit = m; last && unit < end; unit++) fetch<Number, MODE>(c, g, first + unit, o + r, some);
        with_units(end - m, [&](auto known) {
          constexpr long K = decltype(known)::value;
          panel_tile<Format, K>(turned + r * BOTH * c.width, lanes, x + m * c.width + i * K, out, i > 0);
        });
        for (long unit = m; last && unit < end; unit++)
          finish<Format, MODE>(c, g, first + unit, o + r, some, out + (unit - m) * PANEL);
      }
      m = end;
    }
  }
}

template <class Format, Mode MODE, class Number = typename Format::Number>
void products(const Number* x, long x_stride, const Weights<Number>& w, const int64_t* item, const int64_t* token,
              const float* scale, void* y, long y_stride, long P, long N, long O, long I, int threads) {
  constexpr long STEP = Format::STEP;
  const Units g = group(item, token, P, N);
  const long U = g.first.size() - 1, width = (I + STEP - 1) / STEP * STEP;
  if (U == 0) return;
  const Call c = {token, scale, y, y_stride, I, width};
  long most = 0;
  for (long n = 0; n < N; n++) most = std::max<long>(most, g.begin[n + 1] - g.begin[n]);
  const long many = I <= STEP ? THIN : TURN, wide = MODE == GATED ? PANEL / 2 : PANEL;
  const bool few = MODE != GATED && (most < many || O < wide);
  long share = few ? std::clamp(O / (4 * threads) / ROWS * ROWS, 4 * ROWS, BLOCK) : wide;  // enough for all threads
  if (!few && I <= STEP) share = (O + wide * threads - 1) / (wide * threads) * wide;  // little to compute
  const std::unique_ptr<Number[]> packed(new Number[U * width]);
  std::vector<int64_t> item_of(U);
  for (long n = 0; n < N; n++) std::fill(item_of.begin() + g.begin[n], item_of.begin() + g.begin[n + 1], n);
#pragma omp parallel num_threads(threads) if (U * O * I > (1 << 16))
  {
    std::vector<Number> sum(I);
#pragma omp for schedule(static)
    for (long u = 0; u < U; u++) {
      const long n = item_of[u], from = g.first[u], to = g.first[u + 1];
      const Number* row = x + (MODE == SCATTER ? g.pair[from] : token[g.pair[from]]) * x_stride;
      if (MODE == SCATTER && to - from > 1) {
        for (long i = 0; i < I; i += 16) {
          __m512 total = _mm512_setzero_ps();
          for (long k = from; k < to; k++)
            total = _mm512_add_ps(total, Format::widen(rest(I - i), x + g.pair[k] * x_stride + i));
          Format::narrow(rest(I - i), sum.data() + i, total);
        }
        row = sum.data();
      }
      pack<Format>(row, I, width, g.begin[n + 1] - g.begin[n], u - g.begin[n], packed.get() + g.begin[n] * width);
    }
    const std::unique_ptr<float[]> out(new float[most * BLOCK]);
    const long panels_of = (share + wide - 1) / wide, depth = std::min<long>(width * sizeof(Number), DEPTH);
    const std::unique_ptr<Line[]> turned(new Line[panels_of * PANEL * depth / sizeof(Line)]);
    const long half = std::min(share, O) * I, room = w.coded ? (MODE == GATED ? 2 : 1) * half * sizeof(Number) : 0;
    const std::unique_ptr<Line[]> made(new Line[room / sizeof(Line) + 1]);
    // A thread has some outputs of all items: no two add to one number, and the order of additions is always the same.
#pragma omp for schedule(dynamic, 1)
    for (long o = 0; o < O; o += share) {
      const long rows = std::min(share, O - o);
      for (long n = 0; n < N; n++) {
        const long first = g.begin[n], M = g.begin[n + 1] - first;
        if (M == 0) continue;
        const Number *units = packed.get() + first * width, *of = w.rows(n, o, rows, I, (Number*)made.get()), *up = of;
        if (MODE == GATED) up = w.rows(n, O + o, rows, I, (Number*)made.get() + half);
        const bool turns = MODE == GATED || (M >= many && rows >= wide / 2);
        if (turns) panels<Format, MODE>(c, of, up, rows, g, first, M, units, o, (Number*)turned.get(), out.get());
        for (long r = 0; !turns && r < rows; r += BLOCK) {
          const long some = std::min(BLOCK, rows - r);
          block<Format>(of + r * I, some, I, width, units, M, out.get());
          for (long m = 0; m < M; m++) finish<Format, MODE>(c, g, first + m, o + r, some, out.get() + m * BLOCK);
        }
      }
    }
  }
}

template <class Format, class Number = typename Format::Number>
void spread(const Number* x, long x_stride, const int64_t* token, float* y, long y_stride, long P, long O, int threads) {
  const long share = (O + 16 * threads - 1) / (16 * threads) * 16;  // a thread has some columns of all rows
#pragma omp parallel for num_threads(threads) schedule(static) if (P * O > (1 << 16))
  for (long o = 0; o < O; o += share)
    for (long p = 0; p < P; p++)
      for (long r = o; r < std::min(o + share, O); r += 16) {
        if (p + 1 < P) {  // rows end where the processor's own prefetching does
          _mm_prefetch((const char*)(y + token[p + 1] * y_stride + r), _MM_HINT_T0);
          _mm_prefetch((const char*)(x + (p + 1) * x_stride + r), _MM_HINT_T0);
        }
        const __mmask16 mask = rest(std::min(o + share, O) - r);
        float* to = y + token[p] * y_stride + r;
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), Format::widen(mask, x + p * x_stride + r));
        _mm512_mask_storeu_ps(to, mask, sum);
      }
}

template <class Format, class Number = typename Format::Number>
void swiglu(const Number* x, long x_stride, const float* scale, Number* y, long P, long F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (P * F > (1 << 15))
  for (long p = 0; p < P; p++)
    for (long f = 0; f < F; f += 16) {
      const __mmask16 mask = rest(F - f);
      if (p + 1 < P) {
        _mm_prefetch((const char*)(x + (p + 1) * x_stride + f), _MM_HINT_T0);
        _mm_prefetch((const char*)(x + (p + 1) * x_stride + F + f), _MM_HINT_T0);
      }
      const __m512 gate = Format::widen(mask, x + p * x_stride + f), up = Format::widen(mask, x + p * x_stride + F + f);
      Format::narrow(mask, y + p * F + f, gated(gate, up, scale[p]));
    }
}

}  // namespace

#define ENTRY(NAME, FORMAT, MODE)                                                                                        \
  extern "C" void NAME(const FORMAT::Number* x, long x_stride, const FORMAT::Number* w, long w_stride,                   \
                       const Matrices* coded, const int64_t* item, const int64_t* token, const float* scale, void* y,    \
                       long y_stride, long P, long N, long O, long I, int threads) {                                     \
    products<FORMAT, MODE>(x, x_stride, {w, w_stride, coded}, item, token, scale, y, y_stride, P, N, O, I, threads);       \
  }

ENTRY(locum_add_bfloat16, BFloat16, ADD)
ENTRY(locum_add_float32, Float32, ADD)
ENTRY(locum_scatter_bfloat16, BFloat16, SCATTER)
ENTRY(locum_scatter_float32, Float32, SCATTER)
ENTRY(locum_gated_bfloat16, BFloat16, GATED)
ENTRY(locum_gated_float32, Float32, GATED)

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
