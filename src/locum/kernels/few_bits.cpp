// Products of rows with matrices in few bits, straight from their bytes: whole numbers of 4 or 8 bits in groups of a row.
//
//   locum_few_bits        y[p] = W[item[p]] x[row[p]]     in float32; pairs with item -1 are left as they are
//
// Codes are multiplied as whole numbers, 16 at a time, with x in whole numbers of 16 bits: those of a group of x share a scale,
// the power of two with which the largest of them just fits. So a product is off by at most 2^-15 of that for each x; of x in
// bfloat16, all that are above a 128th of it are exact. The sum of a group is exact. It is multiplied with both scales in
// float32, and the sum of its x with its minimum: number = code scale + minimum, where a symmetric group has -half scale.
//
// A weight is read once for up to MOST pairs of its item, in the order in which it lies: nothing else comes from far away. So one
// row of x costs what reading W costs; several rows of W are multiplied together, because one sum after the other would wait.
//
// x lies in the order in which codes come out of their bytes, 32 at a time: of four bits those of even columns, then of odd ones.
//
// Needs AVX2. Letters: P pairs, N items, O outputs and I inputs of an item, M pairs and R rows of W that are multiplied together.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr long STEP = 32;      // columns that are multiplied at a time
constexpr long LANES = 8;      // of float32 in a register
constexpr long MOST = 4;       // pairs of one item that share what is decoded
constexpr long BLOCK = 64;     // rows of W that a thread takes at a time
constexpr long LINE = 64;      // bytes that the cache fetches together
constexpr long LARGEST = 128;  // columns of a group, at most

// Where what lies in the bytes of one matrix; `minimums` of -1: there are none.
struct Places {
  long row, first, scales, minimums, scale_row, half;
};

// Rows of x as whole numbers, with a scale and a sum for every group; groups are filled up to whole registers.
struct Packed {
  long group, width, groups, wide;  // numbers of a group and of a row, its groups, and these filled up
  std::unique_ptr<int16_t[]> numbers;
  std::unique_ptr<float[]> scales, sums;
};

inline __m256 widened(const uint8_t* at) {  // eight numbers of bfloat16
  const __m128i halves = _mm_loadu_si128((const __m128i*)at);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline float sum_of(__m256 x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// 16 numbers in order from two registers of eight.
inline __m256i narrowed(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }

// One row of x into its place.
void pack(const float* x, long I, bool halves, const Packed& to, long row) {
  alignas(32) float part[LARGEST];
  const __m256i ones = _mm256_set1_epi16(1);
  for (long g = 0; g < to.groups; g++) {
    const long begin = g * to.group, some = std::min(to.group, I - begin);
    const long filled = std::min(to.group, to.width - begin);
    std::memcpy(part, x + begin, some * sizeof(float));
    std::fill(part + some, part + filled, 0.f);
    __m256 most = _mm256_setzero_ps(), none = most;  // what is no number is seen in `none` alone
    for (long i = 0; i < filled; i += LANES) {
      const __m256 here = _mm256_load_ps(part + i);
      most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.f), here));
      none = _mm256_fmadd_ps(here, _mm256_setzero_ps(), none);
    }
    float lanes[LANES];
    _mm256_storeu_ps(lanes, most);
    const float wrong = sum_of(none);
    int exponent = 0;
    if (wrong == 0.f) std::frexp(*std::max_element(lanes, lanes + LANES), &exponent);
    exponent = std::max(exponent, -100);  // its inverse must be a number too
    const float scale = std::ldexp(1.f, exponent - 15);
    const __m256 inverse = _mm256_set1_ps(wrong == 0.f ? std::ldexp(1.f, 15 - exponent) : 0.f);
    __m256i sum = _mm256_setzero_si256();
    for (long i = 0; i < filled; i += STEP) {
      __m256i whole[4];
      for (long v = 0; v < 4; v++)
        whole[v] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(part + i + v * LANES), inverse));
      __m256i low = narrowed(whole[0], whole[1]), high = narrowed(whole[2], whole[3]);
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)));
      if (halves) {  // numbers of odd columns are the upper halves of lanes
        const __m256i first = low, second = high, lower = _mm256_set1_epi32(0xffff);
        low = _mm256_permute4x64_epi64(
            _mm256_packus_epi32(_mm256_and_si256(first, lower), _mm256_and_si256(second, lower)), 0xd8);
        high = narrowed(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16));
      }
      int16_t* place = to.numbers.get() + row * to.width + begin + i;
      _mm256_storeu_si256((__m256i*)place, low);
      _mm256_storeu_si256((__m256i*)place + 1, high);
    }
    to.scales[row * to.wide + g] = scale + wrong;
    to.sums[row * to.wide + g] = sum_of(_mm256_cvtepi32_ps(sum)) * scale + wrong;
  }
}

// 32 codes as 16-bit numbers, in the order in which x lies.
template <long BITS>
inline void codes_at(const uint8_t* from, __m256i& low, __m256i& high) {
  if (BITS == 4) {
    const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    low = _mm256_and_si256(both, _mm256_set1_epi16(15));
    high = _mm256_srli_epi16(both, 4);
  } else {
    low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    high = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from + 1));
  }
}

// total[r][m] += scales of group g times the sum of its codes times x, of S steps. Rows of W lie `apart` bytes apart, those of x
// `width` numbers, those of scales `wide` numbers.
template <long BITS, long R, long M, long S>
inline __attribute__((always_inline)) void add_group(const uint8_t* codes, long apart, const int16_t* const (&x)[M], long i,
                                                     const float* scales, long wide, __m256 (&total)[R][M]) {
  __m256i sum[R][M];
#pragma GCC unroll 4
  for (long s = 0; s < S; s++)
#pragma GCC unroll 4
    for (long r = 0; r < R; r++) {
      __m256i low, high;
      codes_at<BITS>(codes + r * apart + s * STEP * BITS / 8, low, high);
#pragma GCC unroll 4
      for (long m = 0; m < M; m++) {
        const __m256i* of = (const __m256i*)(x[m] + i + s * STEP);
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

// Scales of rows of W times those of x, for each pair; out[r][m] = what minimums add.
template <long R, long M>
void scale_rows(const uint8_t* matrix, long row, const Places& at, const Packed& x, const int64_t* pairs, float* scales,
                float (*out)[MOST]) {
  const long groups = x.groups, wide = x.wide;
  const __m256 half = _mm256_set1_ps(-(float)at.half);
  for (long r = 0; r < R; r++) {
    const uint8_t *from = matrix + at.scales + 2 * (row + r) * at.scale_row, *least = from;
    if (at.minimums >= 0) least = matrix + at.minimums + 2 * (row + r) * at.scale_row;
    __m256 rest[M];
    for (long m = 0; m < M; m++) rest[m] = _mm256_setzero_ps();
    for (long g = 0; g < wide; g += LANES) {
      uint8_t some[2][2 * LANES] = {};
      const uint8_t *scale_at = from + 2 * g, *least_at = least + 2 * g;
      if (g + LANES > groups) {  // the row ends
        std::memcpy(some[0], scale_at, 2 * (groups - g));
        std::memcpy(some[1], least_at, 2 * (groups - g));
        scale_at = some[0], least_at = some[1];
      }
      const __m256 scale = widened(scale_at);
      const __m256 minimum = at.minimums >= 0 ? widened(least_at) : _mm256_mul_ps(scale, half);
      for (long m = 0; m < M; m++) {
        const long place = pairs[m] * wide + g;
        _mm256_storeu_ps(scales + (r * M + m) * wide + g, _mm256_mul_ps(scale, _mm256_loadu_ps(&x.scales[place])));
        rest[m] = _mm256_fmadd_ps(minimum, _mm256_loadu_ps(&x.sums[place]), rest[m]);
      }
    }
    for (long m = 0; m < M; m++) out[r][m] = sum_of(rest[m]);
  }
}

// out[r][m] = row `row` + r of W times pair m. `scales` has room for those of MOST rows.
template <long BITS, long R, long M, long S>
void tile(const uint8_t* matrix, long row, const Places& at, const Packed& packed, const int64_t* pairs, float* scales,
          float (*out)[MOST]) {
  constexpr long GROUP = S * STEP, BYTES = GROUP * BITS / 8;
  scale_rows<R, M>(matrix, row, at, packed, pairs, scales, out);
  const int16_t* x[M];
  for (long m = 0; m < M; m++) x[m] = packed.numbers.get() + pairs[m] * packed.width;
  const long apart = at.row, wide = packed.wide, whole = at.row / BYTES;
  const uint8_t* codes = matrix + row * at.row;
  __m256 total[R][M];
#pragma GCC unroll 4
  for (long r = 0; r < R; r++)
#pragma GCC unroll 4
    for (long m = 0; m < M; m++) total[r][m] = _mm256_setzero_ps();
  for (long g = 0; g < whole; g++) {
    if (g * BYTES % LINE == 0)  // the rows that come next: the processor's own prefetching ends with a page
      for (long r = 0; r < R; r++) _mm_prefetch((const char*)codes + (R + r) * apart + g * BYTES, _MM_HINT_T0);
    add_group<BITS, R, M, S>(codes + g * BYTES, apart, x, g * GROUP, scales + g, wide, total);
  }
  if (whole < packed.groups) {  // the row ends within a group, and with the last row the matrix
    uint8_t last[R][BYTES] = {};
    int16_t filled[M][GROUP] = {};
    const int16_t* of[M];
    for (long r = 0; r < R; r++) std::memcpy(last[r], codes + r * apart + whole * BYTES, at.row - whole * BYTES);
    for (long m = 0; m < M; m++) {
      std::memcpy(filled[m], x[m] + whole * GROUP, 2 * (packed.width - whole * GROUP));
      of[m] = filled[m];
    }
    add_group<BITS, R, M, S>(last[0], BYTES, of, 0, scales + whole, wide, total);
  }
  for (long r = 0; r < R; r++)
    for (long m = 0; m < M; m++) out[r][m] += sum_of(total[r][m]);
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
template <long BITS, long M, long S>
void rows(const Call& c, long item, long begin, long end, const int64_t* packed, const int64_t* pairs, float* scales) {
  constexpr long R = M == 1 ? 4 : M == 2 ? 2 : 1;
  const uint8_t* matrix = c.bytes + item * c.item_bytes;
  for (long o = begin, some; o < end; o += some) {
    float out[R][MOST];
    some = end - o < R ? 1 : R;
    if (some == R)
      tile<BITS, R, M, S>(matrix, c.at.first + o, c.at, c.x, packed, scales, out);
    else
      tile<BITS, 1, M, S>(matrix, c.at.first + o, c.at, c.x, packed, scales, out);
    for (long r = 0; r < some; r++)
      for (long m = 0; m < M; m++) c.y[pairs[m] * c.y_stride + o + r] = out[r][m];
  }
}

typedef void (*Rows)(const Call&, long, long, long, const int64_t*, const int64_t*, float*);

template <long BITS, long S>
Rows rows_for(long M) {
  static const Rows of[] = {rows<BITS, 1, S>, rows<BITS, 2, S>, rows<BITS, 3, S>, rows<BITS, MOST, S>};
  return of[M - 1];
}

Rows rows_for(long bits, long group, long M) {
  const auto of = [&](auto of32, auto of64, auto of128) { return group == 32 ? of32(M) : group == 64 ? of64(M) : of128(M); };
  return bits == 4 ? of(rows_for<4, 1>, rows_for<4, 2>, rows_for<4, 4>) : of(rows_for<8, 1>, rows_for<8, 2>, rows_for<8, 4>);
}

}  // namespace

extern "C" void locum_few_bits(const float* x, long x_stride, const uint8_t* bytes, long item_bytes, const int64_t* item,
                               const int64_t* row, float* y, long y_stride, long P, long N, long O, long I, long bits,
                               long group, long code_row, long first, long scales, long minimums, long scale_row,
                               int threads) {
  const Places at = {code_row, first, scales, minimums, scale_row, 1l << (bits - 1)};
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
  const long X = used.size(), width = (I + STEP - 1) / STEP * STEP, groups = (I + group - 1) / group;
  const long wide = (groups + LANES - 1) / LANES * LANES;
  Packed made = {group, width, groups, wide, std::unique_ptr<int16_t[]>(new int16_t[X * width]()),
                 std::unique_ptr<float[]>(new float[X * wide]()), std::unique_ptr<float[]>(new float[X * wide]())};
  struct Task { long item, block; };
  std::vector<Task> tasks;
  for (long n = 0; n < N; n++)
    for (long o = 0; begin[n] < begin[n + 1] && o < O; o += BLOCK) tasks.push_back({n, o});
  const Call call = {bytes, item_bytes, at, made, y, y_stride};
#pragma omp parallel num_threads(threads) if ((long)pairs.size() * O * I > (1 << 16))
  {
#pragma omp for schedule(static)
    for (long r = 0; r < X; r++) pack(x + used[r] * x_stride, I, bits == 4, made, r);
    const std::unique_ptr<float[]> room(new float[MOST * wide]);
    // Every output is one thread's, and is one sum in a fixed order.
#pragma omp for schedule(static)
    for (long t = 0; t < (long)tasks.size(); t++) {
      const auto [n, o] = tasks[t];
      for (long q = begin[n]; q < begin[n + 1]; q += MOST) {
        const long M = std::min(MOST, begin[n + 1] - q);
        rows_for(bits, group, M)(call, n, o, std::min(o + BLOCK, O), &packed[q], &pairs[q], room.get());
      }
    }
  }
}
