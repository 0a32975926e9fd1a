// Products of rows with matrices in few bits, straight from their bytes: whole numbers of 4 or 8 bits in groups of a row.
//
//   locum_few_bits          y[p] = W[item[p]] x[row[p]]     in float32; pairs with item -1 are left as they are
//   locum_numbers           the numbers that the bytes of one matrix stand for
//   locum_few_bits_experts  y[t] = sum over k of weight[t][k] W_down silu(W_gate x[t]) W_up x[t],    W those of item index[t][k]
//
// Codes are multiplied as whole numbers with x in whole numbers of 16 bits: those of a group of x share a scale,
// the power of two with which the largest of them just fits. So a product is off by at most 2^-15 of that for each x; of x in
// bfloat16, all that are above a 128th of it are exact. The sum of a group is exact. It is multiplied with both scales in
// float32, and the sum of its x with its minimum: number = code scale + minimum, where a symmetric group has -half scale.
//
// A weight is read once for up to MOST pairs of its item, in the order in which it lies: nothing else comes from far away. So one
// row of x costs what reading W costs; several rows of W are multiplied together, because one sum after the other would wait.
//
// How many codes are multiplied at a time, and in what order x lies for that, says few_bits_256.h, or few_bits_512.h.
//
// Needs AVX2, and uses AVX512 with VNNI where it is compiled for it. Letters: P pairs, N items, O outputs and I inputs of an item, M pairs and R rows of W that are multiplied together.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "codes.h"
#ifdef __AVX512VNNI__
#include "few_bits_512.h"
#else
#include "few_bits_256.h"
#endif

namespace {

constexpr long PART = 32;      // columns of x that are packed at a time
constexpr long EIGHT = 8;      // numbers of x in a register, as they are packed
constexpr long MOST = 4;       // pairs of one item that share what is decoded
constexpr long BLOCK = 64;     // rows of W that a thread takes at a time
constexpr long LINE = 64;      // bytes that the cache fetches together
constexpr long AHEAD = 8192;   // bytes of codes that are fetched before they are needed, into the second cache

// Where what lies in the bytes of one matrix; `minimums` of -1: there are none.
struct Places {
  long row, first, scales, minimums, scale_row, half;
};

// Rows of x as whole numbers, with a scale for every group and what minimums and scales of W are multiplied with: the sum of the
// group, and what its codes stand for beside the products. Groups are filled up to whole registers.
struct Packed {
  long group, width, groups, wide;  // numbers of a group and of a row, its groups, and these filled up
  std::unique_ptr<uint8_t[]> numbers;
  std::unique_ptr<float[]> scales, sums, beside;

  Packed(long rows, long I, long group, long step)
      : group(group), width((I + step - 1) / step * step), groups((I + group - 1) / group),
        wide((groups + LANES - 1) / LANES * LANES), numbers(new uint8_t[2 * rows * width]()), scales(new float[rows * wide]()),
        sums(new float[rows * wide]()), beside(new float[rows * wide]()) {}
};

// 16 numbers in order from two registers of eight.
inline __m256i narrowed(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }

// One row of x into its place. `half` of a code is to be taken from each.
template <long BITS>
void pack(const float* x, long I, long half, const Packed& to, long row) {
  alignas(32) float part[LARGEST];
  const __m256i ones = _mm256_set1_epi16(1);
  uint8_t* numbers = to.numbers.get() + 2 * row * to.width;
  for (long g = 0; g < to.groups; g++) {
    const long begin = g * to.group, some = std::min(to.group, I - begin);
    const long filled = std::min(to.group, to.width - begin);
    std::memcpy(part, x + begin, some * sizeof(float));
    std::fill(part + some, part + filled, 0.f);
    __m256 most = _mm256_setzero_ps(), none = most;  // what is no number is seen in `none` alone
    for (long i = 0; i < filled; i += EIGHT) {
      const __m256 here = _mm256_load_ps(part + i);
      most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.f), here));
      none = _mm256_fmadd_ps(here, _mm256_setzero_ps(), none);
    }
    float lanes[EIGHT];
    _mm256_storeu_ps(lanes, most);
    const float wrong = sum_of(none);
    int exponent = 0;
    if (wrong == 0.f) std::frexp(*std::max_element(lanes, lanes + EIGHT), &exponent);
    exponent = std::max(exponent, -100);  // its inverse must be a number too
    const float scale = std::ldexp(1.f, exponent - 15);
    const __m256 inverse = _mm256_set1_ps(wrong == 0.f ? std::ldexp(1.f, 15 - exponent) : 0.f);
    __m256i sum = _mm256_setzero_si256();
    long left_out = 0;
    for (long i = 0; i < filled; i += PART) {
      __m256i whole[4];
      for (long v = 0; v < 4; v++)
        whole[v] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(part + i + v * EIGHT), inverse));
      const __m256i low = narrowed(whole[0], whole[1]), high = narrowed(whole[2], whole[3]);
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)));
      left_out += place<BITS>(low, high, numbers, begin + i);
    }
    const float all = sum_of(_mm256_cvtepi32_ps(sum)), beside = left_out - half * all;
    to.scales[row * to.wide + g] = scale + wrong;
    to.sums[row * to.wide + g] = all * scale + wrong;
    to.beside[row * to.wide + g] = beside * scale + wrong;
  }
}

// Scales of rows of W times those of x, for each pair; the sum of rest[r][m] is what minimums add, and what codes stand for beside
// products.
template <long R, long M>
void scale_rows(const uint8_t* matrix, long row, const Places& at, const Packed& x, const int64_t* pairs, float* scales,
                Floats (&rest)[R][M]) {
  const long groups = x.groups, wide = x.wide;
  for (long r = 0; r < R; r++) {
    const uint8_t *from = matrix + at.scales + 2 * (row + r) * at.scale_row, *least = from;
    if (at.minimums >= 0) least = matrix + at.minimums + 2 * (row + r) * at.scale_row;
    for (long m = 0; m < M; m++) rest[r][m] = same(0.f);
    for (long g = 0; g < wide; g += LANES) {
      const Floats scale = widened(from + 2 * g, groups - g);
      for (long m = 0; m < M; m++) {
        const long place = pairs[m] * wide + g;
        save(scales + (r * M + m) * wide + g, times(scale, load(&x.scales[place])));
        rest[r][m] = times_plus(scale, load(&x.beside[place]), rest[r][m]);
        if (at.minimums >= 0) rest[r][m] = times_plus(widened(least + 2 * g, groups - g), load(&x.sums[place]), rest[r][m]);
      }
    }
  }
}

// out[r][m] = row `row` + r of W times pair m. `scales` has room for those of R rows and M pairs.
template <long BITS, long GROUP, long R, long M>
void tile(const uint8_t* matrix, long row, const Places& at, const Packed& packed, const int64_t* pairs, float* scales,
          float (*out)[MOST]) {
  constexpr long COLUMNS = std::max(GROUP, STEP<BITS>), BYTES = COLUMNS * BITS / 8, GROUPS = COLUMNS / GROUP;
  Floats total[R][M];
  scale_rows<R, M>(matrix, row, at, packed, pairs, scales, total);
  const uint8_t* x[M];
  for (long m = 0; m < M; m++) x[m] = packed.numbers.get() + 2 * pairs[m] * packed.width;
  const long apart = at.row, wide = packed.wide, whole = at.row / BYTES;
  const uint8_t* codes = matrix + row * at.row;
  for (long c = 0; c < whole; c++) {
    if (c * BYTES % LINE == 0)  // the processor's own prefetching ends with a page
      for (long r = 0; r < R; r++)
        for (long b = 0; b < BYTES; b += LINE)
          _mm_prefetch((const char*)codes + r * apart + c * BYTES + b + AHEAD, _MM_HINT_T1);
    add_step<BITS, GROUP>(codes + c * BYTES, apart, x, scales + c * GROUPS, wide, total);
    for (long m = 0; m < M; m++) x[m] += 2 * COLUMNS;
  }
  if (whole * BYTES < at.row) {  // the row ends within a step, and with the last row the matrix
    uint8_t last[R][BYTES] = {}, filled[M][2 * COLUMNS] = {};
    const uint8_t* of[M];
    for (long r = 0; r < R; r++) std::memcpy(last[r], codes + r * apart + whole * BYTES, at.row - whole * BYTES);
    for (long m = 0; m < M; m++) {
      std::memcpy(filled[m], x[m], std::min(2 * COLUMNS, 2 * (packed.width - whole * COLUMNS)));
      of[m] = filled[m];
    }
    add_step<BITS, GROUP>(last[0], BYTES, of, scales + whole * GROUPS, wide, total);
  }
  if constexpr (R == 4 && M == 1) {
    const __m128 of = sums_of(total[0][0], total[1][0], total[2][0], total[3][0]);
    for (long r = 0; r < R; r++) out[r][0] = of[r];
  } else {
    for (long r = 0; r < R; r++)
      for (long m = 0; m < M; m++) out[r][m] = sum_of(total[r][m]);
  }
}

// What all products of one call have in common.
struct Call {
  const uint8_t* bytes;
  long item_bytes;
  Places at;
  const Packed& x;
  float* y;
  long y_stride;
};

// Rows `begin` to `end` of one item's W times M of its pairs, as many rows together as registers hold. `packed`: where x is.
template <long BITS, long GROUP, long M>
void rows(const Call& c, long item, long begin, long end, const int64_t* packed, const int64_t* pairs, float* scales) {
  constexpr long R = M == 1 ? TOGETHER<BITS> : M == 2 ? 2 : 1;
  const uint8_t* matrix = c.bytes + item * c.item_bytes;
  for (long o = begin, some; o < end; o += some) {
    float out[R][MOST];
    some = end - o < R ? 1 : R;
    if (some == R)
      tile<BITS, GROUP, R, M>(matrix, c.at.first + o, c.at, c.x, packed, scales, out);
    else
      tile<BITS, GROUP, 1, M>(matrix, c.at.first + o, c.at, c.x, packed, scales, out);
    for (long r = 0; r < some; r++)
      for (long m = 0; m < M; m++) c.y[pairs[m] * c.y_stride + o + r] = out[r][m];
  }
}

typedef void (*Rows)(const Call&, long, long, long, const int64_t*, const int64_t*, float*);

template <long BITS, long GROUP>
Rows rows_for(long M) {
  static const Rows of[] = {rows<BITS, GROUP, 1>, rows<BITS, GROUP, 2>, rows<BITS, GROUP, 3>, rows<BITS, GROUP, MOST>};
  return of[M - 1];
}

Rows rows_for(long bits, long group, long M) {
  if (bits == 4) return group == 32 ? rows_for<4, 32>(M) : group == 64 ? rows_for<4, 64>(M) : rows_for<4, 128>(M);
  return group == 32 ? rows_for<8, 32>(M) : group == 64 ? rows_for<8, 64>(M) : rows_for<8, 128>(M);
}

// silu(gate) up scale of `count` numbers, with e^x as native.cpp has it.
void gated(const float* gate, const float* up, float scale, float* to, long count) {
  for (long f = 0; f < count; f += EIGHT) {
    alignas(32) float some[3][EIGHT] = {};
    const long left = std::min(EIGHT, count - f);
    std::memcpy(some[0], gate + f, left * sizeof(float));
    std::memcpy(some[1], up + f, left * sizeof(float));
    const __m256 x = _mm256_load_ps(some[0]), minus = _mm256_sub_ps(_mm256_setzero_ps(), x);
    const __m256 e = _mm256_min_ps(_mm256_max_ps(minus, _mm256_set1_ps(-87.f)), _mm256_set1_ps(87.f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(e, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), e), sum = _mm256_set1_ps(1.f / 5040);
    rest = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), rest);
    for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
      sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(c));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const __m256 below = _mm256_fmadd_ps(sum, _mm256_castsi256_ps(power), _mm256_set1_ps(1.f));
    const __m256 silu = _mm256_div_ps(x, below);
    _mm256_store_ps(some[2], _mm256_mul_ps(silu, _mm256_mul_ps(_mm256_load_ps(some[1]), _mm256_set1_ps(scale))));
    std::memcpy(to + f, some[2], left * sizeof(float));
  }
}

}  // namespace

extern "C" void locum_few_bits(const float* x, long x_stride, const Matrices& w, const int64_t* item, const int64_t* row, float* y,
                               long y_stride, long P, int threads) {
  const long N = w.N, O = w.O, I = w.I, bits = w.bits, group = w.group;
  const Places at = {w.row, w.first, w.scales, w.minimums, w.scale_row, 1l << (bits - 1)};
  std::vector<std::vector<int64_t>> of(N);
  std::vector<int64_t> used, begin, pairs, packed;  // rows of x; of each item, its first pair; pairs by item; their rows
  for (long p = 0; p < P; p++)
    if (item[p] >= 0) of[item[p]].push_back(p), used.push_back(row[p]);
  std::sort(used.begin(), used.end());
  used.erase(std::unique(used.begin(), used.end()), used.end());
  for (const auto& here : of) {
    begin.push_back(pairs.size());
    pairs.insert(pairs.end(), here.begin(), here.end());
  }
  begin.push_back(pairs.size());
  if (pairs.empty()) return;
  for (const int64_t p : pairs) packed.push_back(std::lower_bound(used.begin(), used.end(), row[p]) - used.begin());
  const long X = used.size(), half = w.minimums < 0 ? at.half : 0;
  const Packed made(X, I, group, bits == 4 ? STEP<4> : STEP<8>);
  struct Task { long item, block; };
  std::vector<Task> tasks;
  for (long n = 0; n < N; n++)
    for (long o = 0; begin[n] < begin[n + 1] && o < O; o += BLOCK) tasks.push_back({n, o});
  const Call call = {w.bytes, w.item_bytes, at, made, y, y_stride};
#pragma omp parallel num_threads(threads) if ((long)pairs.size() * O * I > (1 << 16))
  {
#pragma omp for schedule(static)
    for (long r = 0; r < X; r++) (bits == 4 ? pack<4> : pack<8>)(x + used[r] * x_stride, I, half, made, r);
    const std::unique_ptr<float[]> room(new float[2 * MOST * made.wide]);
    // Every output is one thread's, and is one sum in a fixed order.
#pragma omp for schedule(static)
    for (long t = 0; t < (long)tasks.size(); t++) {
      const long n = tasks[t].item, o = tasks[t].block;
      for (long q = begin[n]; q < begin[n + 1]; q += MOST) {
        const long M = std::min(MOST, begin[n + 1] - q);
        rows_for(bits, group, M)(call, n, o, std::min(o + BLOCK, O), &packed[q], &pairs[q], room.get());
      }
    }
  }
}

extern "C" void locum_few_bits_experts(const float* x, long x_stride, const Matrices& gate_up, const Matrices& down,
                                       const int64_t* index, const float* weight, float* y, long T, long K, int threads) {
  const long P = T * K, F = down.I, D = down.O;
  std::vector<int64_t> token(P), each(P);
  for (long p = 0; p < P; p++) token[p] = p / K, each[p] = p;
  const std::unique_ptr<float[]> pre(new float[P * 2 * F]), hidden(new float[P * F]), out(new float[P * D]);
  locum_few_bits(x, x_stride, gate_up, index, token.data(), pre.get(), 2 * F, P, threads);
  for (long p = 0; p < P; p++)
    if (index[p] >= 0) gated(&pre[p * 2 * F], &pre[p * 2 * F + F], weight[p], &hidden[p * F], F);
  locum_few_bits(hidden.get(), F, down, index, each.data(), out.get(), D, P, threads);
  std::fill(y, y + T * D, 0.f);
  for (long p = 0; p < P; p++)
    for (long d = 0; d < D && index[p] >= 0; d++) y[p / K * D + d] += out[p * D + d];
}

template <class Number>
void all_numbers(const Matrices& w, Number* to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long o = 0; o < w.O; o++) make_rows(w, 0, o, 1, to + o * w.I);
}

extern "C" void locum_numbers_bfloat16(const Matrices& w, uint16_t* to, int threads) { all_numbers(w, to, threads); }

extern "C" void locum_numbers_float32(const Matrices& w, float* to, int threads) { all_numbers(w, to, threads); }
