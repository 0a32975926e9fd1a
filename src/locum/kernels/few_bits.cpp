// Products of rows with matrices in few bits, straight from their bytes: whole numbers of 4 or 8 bits in groups of a row.
//
//   locum_few_bits        y[p] = W[item[p]] x[row[p]]     in float32; pairs with item -1 are left as they are
//
// Codes become small whole numbers, exact in float32. Their products with x are summed group by group; the sum of a group is
// multiplied with its scale, and the sum of its x with its minimum. x is put into the order in which codes come out of their
// bytes, eight at a time: of four bits those of even columns, then those of odd ones.
//
// Vectors are the compiler's own, of any processor. Letters: P pairs, N items, O outputs and I inputs of an item.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr long LANES = 8, MOST = 4;  // pairs of one item that share what is decoded
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

// Where what lies in the bytes of one matrix; `minimums` of -1: there are none.
struct Places {
  long bits, group, row, first, scales, minimums, scale_row;
};

inline float wide(const uint8_t* at) {  // a number of bfloat16
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats numbers(Bytes codes, int half) {
  return __builtin_convertvector(__builtin_convertvector(codes, Whole) - half, Floats);
}

// out[m] = one row of W times pair m of M, whose x lie `width` numbers apart; sums: of the x of each group.
template <long BITS, long M>
void times(const uint8_t* matrix, long row, const Places& at, long groups, const float* x, long width, const float* sums,
           float* out) {
  constexpr long COLUMNS = LANES * 8 / BITS;  // of eight bytes
  const bool has_minimum = at.minimums >= 0;
  const int half = has_minimum ? 0 : 1 << (BITS - 1);
  const uint8_t *codes = matrix + row * at.row, *scales = matrix + at.scales + 2 * row * at.scale_row,
                *minimums = matrix + at.minimums + 2 * row * at.scale_row;
  Floats total[M] = {};
  float rest[M] = {};
  for (long g = 0; g < groups; g++) {
    Floats sum[M] = {};
    for (long i = g * at.group; i < std::min((g + 1) * at.group, width); i += COLUMNS) {
      Bytes eight = {};
      const long here = i * BITS / 8;
      if (here + LANES <= at.row)
        std::memcpy(&eight, codes + here, LANES);
      else  // the row ends, and with the last one the matrix
        std::memcpy(&eight, codes + here, at.row - here);
      if (BITS == 4) {
        const Floats even = numbers(eight & 15, half), odd = numbers(eight >> 4, half);
        for (long m = 0; m < M; m++)
          sum[m] += even * load(x + m * width + i) + odd * load(x + m * width + i + LANES);
      } else {
        const Floats all = numbers(eight, half);
        for (long m = 0; m < M; m++) sum[m] += all * load(x + m * width + i);
      }
    }
    const float scale = wide(scales + 2 * g), least = has_minimum ? wide(minimums + 2 * g) : 0.f;
    for (long m = 0; m < M; m++) {
      total[m] += sum[m] * scale;
      rest[m] += least * sums[m * groups + g];
    }
  }
  for (long m = 0; m < M; m++) {
    float all = rest[m];
    for (long lane = 0; lane < LANES; lane++) all += total[m][lane];
    out[m] = all;
  }
}

template <long BITS>
void times(long M, const uint8_t* matrix, long row, const Places& at, long groups, const float* x, long width,
           const float* sums, float* out) {
  switch (M) {
    case 1: return times<BITS, 1>(matrix, row, at, groups, x, width, sums, out);
    case 2: return times<BITS, 2>(matrix, row, at, groups, x, width, sums, out);
    case 3: return times<BITS, 3>(matrix, row, at, groups, x, width, sums, out);
    default: return times<BITS, MOST>(matrix, row, at, groups, x, width, sums, out);
  }
}

}  // namespace

extern "C" void locum_few_bits(const float* x, long x_stride, const uint8_t* bytes, long item_bytes, const int64_t* item,
                               const int64_t* row, float* y, long y_stride, long P, long N, long O, long I, long bits,
                               long group, long code_row, long first, long scales, long minimums, long scale_row,
                               int threads) {
  const Places at = {bits, group, code_row, first, scales, minimums, scale_row};
  const long columns = LANES * 8 / bits, width = (I + columns - 1) / columns * columns, groups = (I + group - 1) / group;
  std::vector<std::vector<int64_t>> pairs(N);
  for (long p = 0; p < P; p++)
    if (item[p] >= 0) pairs[item[p]].push_back(p);
  std::vector<int64_t> order, begin;
  for (const auto& of : pairs) {
    begin.push_back(order.size());
    order.insert(order.end(), of.begin(), of.end());
  }
  begin.push_back(order.size());
  const long Q = order.size();
  if (Q == 0) return;
  const std::unique_ptr<float[]> packed(new float[Q * width]()), sums(new float[Q * groups]());
  for (long q = 0; q < Q; q++) {
    const float* of = x + row[order[q]] * x_stride;
    for (long i = 0; i < I; i++) {
      const long k = i % columns, place = bits == 4 ? k % 2 * LANES + k / 2 : k;
      packed[q * width + i - k + place] = of[i];
      sums[q * groups + i / group] += of[i];
    }
  }
  // A thread has some outputs of all items, so the order of additions is always the same.
#pragma omp parallel for num_threads(threads) schedule(static) if (Q * O * I > (1 << 16))
  for (long share = 0; share < O; share += 16)
    for (long n = 0; n < N; n++)
      for (long q = begin[n]; q < begin[n + 1]; q += MOST) {
        const long M = std::min(MOST, begin[n + 1] - q);
        for (long o = share; o < std::min(share + 16, O); o++) {
          float out[MOST];
          const auto made = bits == 4 ? times<4> : times<8>;
          made(M, bytes + n * item_bytes, first + o, at, groups, packed.get() + q * width, width, sums.get() + q * groups, out);
          for (long m = 0; m < M; m++) y[order[q + m] * y_stride + o] = out[m];
        }
      }
}
