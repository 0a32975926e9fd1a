// Codes of whole numbers in groups of a row, as quantisers choose them (formats/int_groups.py, experts/quantisers.py), to the same bits.
//
//   locum_least_range   of each group, the range among those tried with which its levels lose least
//   locum_in_order      the codes of a group's columns, one column after the other, each making up for what the ones before it lost
//
// Numbers are float32, as they are in torch: a product of a code and a scale is exact, so nothing depends on how it is added to.
// Needs AVX2. Letters: M groups, Y ranges, J columns of a group, O rows.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

constexpr long MOST = 128;  // columns of a group
constexpr long ROWS = 16;   // that go through a group's columns side by side

inline float code_of(float x, float scale, float low, float half, bool has_low) {
  const float code = std::nearbyint(has_low ? (x - low) / scale : x / scale + half);
  return code < 0 ? 0 : code > 2 * half - 1 ? 2 * half - 1 : code;
}

template <long J, bool LOW>
float lost_by(const float* x, const float* cost, float unit, float scale, float low, float half) {
  float square[J];
  const float divisor = scale == 0 ? 1 : scale;
  for (long j = 0; j < J; j++) {
    const float code = scale == 0 ? half : code_of(x[j], divisor, low, half, LOW);
    const float number = LOW ? code * scale + low : (code - half) * scale;
    const float off = (number - x[j]) / unit;
    square[j] = off * off * cost[j];
  }
  for (long some = J / 2; some; some /= 2)  // by halves, as `summed` does
    for (long j = 0; j < some; j++) square[j] += square[j + some];
  return square[0];
}

template <long J, bool LOW>
void least_range(const float* x, const float* cost, long costs, const float* unit, const float* scale, const float* low, long M,
                 long Y, float half, int64_t* best, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long m = 0; m < M; m++) {
    float least = INFINITY;
    best[m] = 0;
    for (long y = 0; y < Y; y++) {
      const long at = y * M + m;
      const float lost = lost_by<J, LOW>(x + m * J, cost + m % costs * J, unit[m], scale[at], LOW ? low[at] : 0, half);
      if (lost < least) least = lost, best[m] = y;
    }
  }
}

template <bool LOW>
void in_order(const double* rest, long step, const double* upper, long upper_step, long O, long J, const float* scale,
              const float* low, float half, float* code, double* lost, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long first = 0; first < O; first += ROWS) {
    const long rows = std::min(ROWS, O - first);
    double left[MOST][ROWS], gone[ROWS];
    float found[ROWS], of_scale[ROWS], of_low[ROWS], divisor[ROWS];
    for (long r = 0; r < ROWS; r++) {
      const long o = first + std::min(r, rows - 1);
      of_scale[r] = scale[o], of_low[r] = LOW ? low[o] : 0, divisor[r] = scale[o] == 0 ? 1 : scale[o];
      for (long j = 0; j < J; j++) left[j][r] = rest[o * step + j];
    }
    for (long j = 0; j < J; j++) {
      const double pivot = upper[j * upper_step + j];
      for (long r = 0; r < ROWS; r++) {
        found[r] = of_scale[r] == 0 ? half : code_of(float(left[j][r]), divisor[r], of_low[r], half, LOW);
        const float number = LOW ? found[r] * of_scale[r] + of_low[r] : (found[r] - half) * of_scale[r];
        gone[r] = (left[j][r] - number) / pivot;
      }
      for (long k = j + 1; k < J; k++) {
        const double share = upper[j * upper_step + k];
        for (long r = 0; r < ROWS; r++) left[k][r] -= share * gone[r];
      }
      for (long r = 0; r < rows; r++) code[(first + r) * J + j] = found[r], lost[(first + r) * J + j] = gone[r];
    }
  }
}

}  // namespace

extern "C" {

void locum_least_range(const float* x, const float* cost, long costs, const float* unit, const float* scale, const float* low, long M,
                       long Y, long J, float half, int64_t* best, int threads) {
  const auto run = [&](auto with_low, auto without) { (low ? with_low : without)(x, cost, costs, unit, scale, low, M, Y, half, best, threads); };
  if (J == 32) run(least_range<32, true>, least_range<32, false>);
  if (J == 64) run(least_range<64, true>, least_range<64, false>);
  if (J == 128) run(least_range<128, true>, least_range<128, false>);
}

void locum_in_order(const double* rest, long step, const double* upper, long upper_step, long O, long J, const float* scale,
                    const float* low, float half, float* code, double* lost, int threads) {
  (low ? in_order<true> : in_order<false>)(rest, step, upper, upper_step, O, J, scale, low, half, code, lost, threads);
}

}
