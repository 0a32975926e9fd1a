// What a step of few tokens does, each in one call: matrices are read once, where they lie. Experts also in few
// bits (codes.h), which become numbers some rows at a time.
//
//   locum_linear   y[m] = W x[m] + bias
//   locum_experts  y[t] = sum over k of weight[t][k] W_down silu(W_gate x[t]) W_up x[t],    W those of expert index[t][k]
//   locum_norm     y[m] = (plus + weight) x[m] / sqrt(mean of x[m]^2 + eps)
//   locum_route    logits[t] = W x[t] + bias; their softmax's K largest, first the largest, those of one size by their index
//
//   locum_attend   y[b][h] = sum over s of p[s] v[b][h / (H / G)][s], p the softmax over s of scale k[b][h / (H / G)][s] q[b][h]
//
//   locum_project  n = norm(x); q, k, v = W n + bias of it, q and k through norms of their own if they have some, and turned by position
//   locum_attended h = x + W attend(q, k, v) + bias, and norm(h): with what comes before, a decoder layer up to its experts
//
// Experts that are none (an index below 0, or N and above) do not run. Formats: bfloat16 and float32; sums, and what comes
// between the products of an expert, in float32 but for the hidden states, which are rounded as the second product takes them.
// Needs avx512_bf16. Letters: M rows of x, O outputs and I inputs, T tokens, K top-k, P pairs, N experts, D and F their widths; B prompts,
// H heads, G heads of keys and values, S positions, D and C widths of keys and of values.

#include "codes.h"
#include "tiles.h"

#include <omp.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

namespace {

constexpr long ALONE = 1 << 16;  // products below this many numbers are not worth a second thread

// Rows of W that a thread takes at a time: enough for all threads.
inline long share_of(long O, int threads) { return std::clamp(O / (4 * threads) / ROWS * ROWS, 4 * ROWS, BLOCK); }

inline long whole(long I, long step) { return (I + step - 1) / step * step; }

template <class Format, class Number>
std::unique_ptr<Number[]> packed_rows(const Number* x, long x_stride, long M, long I) {
  const long width = whole(I, Format::STEP);
  std::unique_ptr<Number[]> packed(new Number[M * width]);
  for (long m = 0; m < M; m++) pack<Format>(x + m * x_stride, I, width, M, m, packed.get());
  return packed;
}

template <class Format, class Number = typename Format::Number>
void linear(const Number* x, long x_stride, const Number* w, const Number* bias, Number* y, long y_stride, long M, long O,
            long I, int threads) {
  const auto packed = packed_rows<Format>(x, x_stride, M, I);
  const long share = share_of(O, threads), width = whole(I, Format::STEP);
#pragma omp parallel num_threads(threads) if (threads > 1 && O * I > ALONE)
  {
    const std::unique_ptr<float[]> out(new float[M * BLOCK]);
#pragma omp for schedule(dynamic, 1)
    for (long o = 0; o < O; o += share) {
      const long rows = std::min(share, O - o);
      block<Format>(w + o * I, rows, I, width, packed.get(), M, out.get());
      for (long m = 0; m < M; m++)
        for (long r = 0; r < rows; r += 16) {
          __m512 sum = _mm512_loadu_ps(out.get() + m * BLOCK + r);
          if (bias) sum = _mm512_add_ps(sum, Format::widen(rest(rows - r), bias + o + r));
          Format::narrow(rest(rows - r), y + m * y_stride + o + r, sum);
        }
    }
  }
}

// Pairs by expert: those of expert n are pair[begin[n]] to pair[begin[n + 1] - 1].
struct Pairs {
  std::vector<long> pair, begin, used;  // `used`: experts that have any

  Pairs(const int64_t* index, long P, long N) : begin(N + 1, 0) {
    for (long p = 0; p < P; p++)
      if (index[p] >= 0 && index[p] < N) begin[index[p] + 1]++;
    for (long n = 0; n < N; n++) {
      if (begin[n + 1]) used.push_back(n);
      begin[n + 1] += begin[n];
    }
    pair.resize(begin[N]);
    std::vector<long> next(begin.begin(), begin.end() - 1);
    for (long p = 0; p < P; p++)
      if (index[p] >= 0 && index[p] < N) pair[next[index[p]]++] = p;
  }
  long count(long n) const { return begin[n + 1] - begin[n]; }
};

template <class Format, class Number = typename Format::Number>
void experts(const Number* x, long x_stride, const Weights<Number>& gate_up, const Weights<Number>& down, const int64_t* index,
             const float* weight, Number* y, long T, long K, long N, long D, long F, int threads) {
  const Pairs pairs(index, T * K, N);
  const long U = pairs.pair.size(), wide = whole(D, Format::STEP), deep = whole(F, Format::STEP);
  long most = 0;
  for (const long n : pairs.used) most = std::max(most, pairs.count(n));
  const std::unique_ptr<Number[]> packed(new Number[U * wide]), hidden(new Number[U * F]), second(new Number[U * deep]);
  const long first_share = share_of(F, threads), last_share = share_of(D, threads), experts = pairs.used.size();
  const long parts = (F + first_share - 1) / first_share;
  // `done` for each pair of an expert, by its place among them.
  const auto each = [&](long n, const auto& done) {
    for (long u = pairs.begin[n]; u < pairs.begin[n + 1]; u++) done(u, u - pairs.begin[n], pairs.pair[u]);
  };
#pragma omp parallel num_threads(threads) if (threads > 1 && U * D * F > ALONE)
  {
    const std::unique_ptr<float[]> out(new float[2 * most * BLOCK]), total(new float[T * BLOCK]);
    float *gates = out.get(), *ups = gates + most * BLOCK;
    const std::unique_ptr<Number[]> made(new Number[BLOCK * std::max(D, F)]);  // of matrices in few bits
#pragma omp for schedule(static)
    for (long i = 0; i < experts; i++)
      each(pairs.used[i], [&](long u, long m, long p) {
        const long n = pairs.used[i];
        pack<Format>(x + p / K * x_stride, D, wide, pairs.count(n), m, packed.get() + pairs.begin[n] * wide);
      });
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < experts * parts; task++) {
      const long n = pairs.used[task / parts], f = task % parts * first_share, rows = std::min(first_share, F - f);
      const Number* units = packed.get() + pairs.begin[n] * wide;
      block<Format>(gate_up.rows(n, f, rows, D, made.get()), rows, D, wide, units, pairs.count(n), gates);
      block<Format>(gate_up.rows(n, F + f, rows, D, made.get()), rows, D, wide, units, pairs.count(n), ups);
      each(n, [&](long u, long m, long p) {
        for (long r = 0; r < rows; r += 16) {
          const __m512 gate = _mm512_loadu_ps(gates + m * BLOCK + r), up = _mm512_loadu_ps(ups + m * BLOCK + r);
          Format::narrow(rest(rows - r), hidden.get() + u * F + f + r, gated(gate, up, weight[p]));
        }
      });
    }
#pragma omp for schedule(static)
    for (long i = 0; i < experts; i++)
      each(pairs.used[i], [&](long u, long m, long) {
        const long n = pairs.used[i];
        pack<Format>(hidden.get() + u * F, F, deep, pairs.count(n), m, second.get() + pairs.begin[n] * deep);
      });
    // A thread has some outputs of all experts, so every sum is in the order of the experts.
#pragma omp for schedule(dynamic, 1)
    for (long o = 0; o < D; o += last_share) {
      const long rows = std::min(last_share, D - o);
      std::fill(total.get(), total.get() + T * BLOCK, 0.f);
      for (const long n : pairs.used) {
        const Number* units = second.get() + pairs.begin[n] * deep;
        block<Format>(down.rows(n, o, rows, F, made.get()), rows, F, deep, units, pairs.count(n), gates);
        each(n, [&](long, long m, long p) {
          float* to = total.get() + p / K * BLOCK;
          for (long r = 0; r < rows; r++) to[r] += gates[m * BLOCK + r];
        });
      }
      for (long t = 0; t < T; t++)
        for (long r = 0; r < rows; r += 16)
          Format::narrow(rest(rows - r), y + t * D + o + r, _mm512_loadu_ps(total.get() + t * BLOCK + r));
    }
  }
}

template <class Format, class Number = typename Format::Number>
void norm(const Number* x, long x_stride, const Number* weight, float plus, float eps, Number* y, long M, long D) {
  for (long m = 0; m < M; m++) {
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < D; d += 16) {
      const __m512 some = Format::widen(rest(D - d), x + m * x_stride + d);
      squares = _mm512_fmadd_ps(some, some, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps));
    for (long d = 0; d < D; d += 16) {
      const __mmask16 mask = rest(D - d);
      const __m512 of = _mm512_add_ps(Format::widen(mask, weight + d), _mm512_set1_ps(plus));
      const __m512 some = _mm512_mul_ps(Format::widen(mask, x + m * x_stride + d), scale);
      Format::narrow(mask, y + m * D + d, _mm512_mul_ps(of, some));
    }
  }
}

template <class Format, class Number = typename Format::Number>
void route(const Number* x, long x_stride, const Number* w, const Number* bias, bool sums_to_one, Number* logits, int64_t* index,
           float* weight, long T, long K, long N, long D, int threads) {
  linear<Format>(x, x_stride, w, bias, logits, N, T, N, D, threads);
  std::vector<float> of(N);
  std::vector<int64_t> order(N);
  for (long t = 0; t < T; t++) {
    for (long n = 0; n < N; n += 16) {
      const __mmask16 mask = rest(N - n);
      _mm512_mask_storeu_ps(of.data() + n, mask, Format::widen(mask, logits + t * N + n));
    }
    for (float& one : of) one = one == one ? one : INFINITY;  // what is no number comes first, and makes all weights none
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + K, order.end(),
                      [&](int64_t a, int64_t b) { return of[a] > of[b] || (of[a] == of[b] && a < b); });
    const float most = of[order[0]];
    float all = 0;
    for (long n = 0; n < (sums_to_one ? K : N); n++) all += std::exp((sums_to_one ? of[order[n]] : of[n]) - most);
    for (long k = 0; k < K; k++) {
      index[t * K + k] = order[k];
      weight[t * K + k] = std::exp(of[order[k]] - most) / all;
    }
  }
}

// A tensor [B, heads, S, width], by how far its items are apart; the last ones lie side by side.
template <class Number>
struct Heads {
  Number* numbers;
  long of_prompt, of_head, of_position;
  Number* at(long b, long h, long s) const { return numbers + b * of_prompt + h * of_head + s * of_position; }
};

// Softmax of S numbers, but for the division by their sum, which it returns. What is no number makes the sum none.
inline float exponentials(float* x, long S) {
  const float most = *std::max_element(x, x + S);
  __m512 sum = _mm512_setzero_ps();
  for (long s = 0; s < S; s += 16) {
    const __mmask16 mask = rest(S - s);
    const __m512 here = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + s), _mm512_set1_ps(most)), e = exponential(here);
    _mm512_mask_storeu_ps(x + s, mask, e);
    sum = _mm512_mask_add_ps(sum, mask, sum, _mm512_fmadd_ps(here, _mm512_setzero_ps(), e));
  }
  return _mm512_reduce_add_ps(sum);
}

template <class Format, class Number = typename Format::Number>
void attend(const Heads<const Number>& q, const Heads<const Number>& k, const Heads<const Number>& v, const Heads<Number>& y,
            float scale, long B, long H, long G, long S, long D, long C, int threads) {
  constexpr long STEP = Format::STEP, WIDE = 4;  // registers of outputs at a time
#pragma omp parallel num_threads(threads) if (threads > 1 && B * H * S * D > ALONE)
  {
    const std::unique_ptr<float[]> p(new float[S]);
#pragma omp for schedule(static)
    for (long head = 0; head < B * H; head++) {
      const long b = head / H, h = head % H, g = h / (H / G);
      for (long s = 0; s < S; s++) {
        __m512 sum = _mm512_setzero_ps();
        for (long d = 0; d < D; d += STEP)
          sum = Format::plus(sum, Format::load(rest(D - d, STEP), k.at(b, g, s) + d), Format::load(rest(D - d, STEP), q.at(b, h, 0) + d));
        p[s] = scale * _mm512_reduce_add_ps(sum);
      }
      const __m512 whole = _mm512_set1_ps(1.f / exponentials(p.get(), S));
      for (long c = 0; c < C; c += 16 * WIDE) {
        __m512 sum[WIDE] = {};
        for (long s = 0; s < S; s++)
          for (long w = 0; w < WIDE && c + 16 * w < C; w++)
            sum[w] = _mm512_fmadd_ps(_mm512_set1_ps(p[s]), Format::widen(rest(C - c - 16 * w), v.at(b, g, s) + c + 16 * w), sum[w]);
        for (long w = 0; w < WIDE && c + 16 * w < C; w++)
          Format::narrow(rest(C - c - 16 * w), y.at(b, h, 0) + c + 16 * w, _mm512_mul_ps(sum[w], whole));
      }
    }
  }
}

// x = x cos + (-second half of x, first half) sin, for heads of width D: products and sum are rounded, as torch does.
template <class Format, class Number = typename Format::Number>
void turn(Number* x, const Number* cos, const Number* sin, long heads, long D) {
  const long half = D / 2;
  Number two[2 * 16];
  const auto rounded = [&](__m512 a, __m512 b) {  // each alone, then their sum
    Format::narrow(0xffff, two, a);
    Format::narrow(0xffff, two + 16, b);
    return _mm512_add_ps(Format::widen(0xffff, two), Format::widen(0xffff, two + 16));
  };
  for (long h = 0; h < heads; h++, x += D)
    for (long d = 0; d < half; d += 16) {
      const __mmask16 mask = rest(half - d);
      const auto at = [&](const Number* from, long i) { return Format::widen(mask, from + i); };
      const __m512 first = at(x, d), second = at(x, half + d), minus = _mm512_sub_ps(_mm512_setzero_ps(), second);
      Format::narrow(mask, x + d, rounded(_mm512_mul_ps(first, at(cos, d)), _mm512_mul_ps(minus, at(sin, d))));
      Format::narrow(mask, x + half + d,
                     rounded(_mm512_mul_ps(second, at(cos, half + d)), _mm512_mul_ps(first, at(sin, half + d))));
    }
}

// A norm's weights; none, for none.
template <class Number>
struct Norm {
  const Number* weight;
  float plus, eps;
};

// `qk_width`: of q's and k's norms, a head's or all of them.
template <class Format, class Number = typename Format::Number>
void project(const Number* x, long x_stride, const Norm<Number>& before, const Number* const* weights, const Number* const* biases,
             const Norm<Number>* of_qk, bool by_head, const Number* cos, const Number* sin, long of_prompt, Number* const* made,
             const long* outputs, long M, long D, long head, int threads) {
  const std::unique_ptr<Number[]> normed(new Number[M * D]);
  norm<Format>(x, x_stride, before.weight, before.plus, before.eps, normed.get(), M, D);
  for (long i = 0; i < 3; i++) {
    const long O = outputs[i], width = by_head ? head : O;
    linear<Format>(normed.get(), D, weights[i], biases[i], made[i], O, M, O, D, threads);
    if (i == 2) break;  // values stay as they are
    if (of_qk[i].weight) norm<Format>(made[i], width, of_qk[i].weight, of_qk[i].plus, of_qk[i].eps, made[i], M * O / width, width);
    for (long m = 0; m < M; m++) turn<Format>(made[i] + m * O, cos + m * of_prompt, sin + m * of_prompt, O / head, head);
  }
}

template <class Format, class Number = typename Format::Number>
void attended(const Heads<const Number>& q, const Heads<const Number>& k, const Heads<const Number>& v, float scale, const Number* w,
              const Number* bias, const Number* x, long x_stride, const Norm<Number>& after, Number* h, Number* n, long B, long H,
              long G, long S, long head, long C, long D, int threads) {
  const std::unique_ptr<Number[]> y(new Number[B * H * C]);
  attend<Format>(q, k, v, {y.get(), H * C, C, 0}, scale, B, H, G, S, head, C, threads);
  linear<Format>(y.get(), H * C, w, bias, h, D, B, D, H * C, threads);
  for (long b = 0; b < B; b++)
    for (long d = 0; d < D; d += 16) {
      const __mmask16 mask = rest(D - d);
      Format::narrow(mask, h + b * D + d,
                     _mm512_add_ps(Format::widen(mask, x + b * x_stride + d), Format::widen(mask, h + b * D + d)));
    }
  norm<Format>(h, D, after.weight, after.plus, after.eps, n, B, D);
}

}  // namespace

#define ENTRIES(FORMAT, NAME)                                                                                          \
  extern "C" void locum_linear_##NAME(const FORMAT::Number* x, long x_stride, const FORMAT::Number* w,                 \
                                      const FORMAT::Number* bias, FORMAT::Number* y, long M, long O, long I,           \
                                      int threads) {                                                                   \
    linear<FORMAT>(x, x_stride, w, bias, y, O, M, O, I, threads);                                                      \
  }                                                                                                                    \
  extern "C" void locum_experts_##NAME(const FORMAT::Number* x, long x_stride, const FORMAT::Number* gate_up,          \
                                       long gate_up_stride, const Matrices* coded_gate_up, const FORMAT::Number* down, \
                                       long down_stride, const Matrices* coded_down, const int64_t* index,             \
                                       const float* weight, FORMAT::Number* y, long T, long K, long N, long D, long F, \
                                       int threads) {                                                                  \
    experts<FORMAT>(x, x_stride, {gate_up, gate_up_stride, coded_gate_up}, {down, down_stride, coded_down}, index,     \
                    weight, y, T, K, N, D, F, threads);                                                                \
  }                                                                                                                    \
  extern "C" void locum_norm_##NAME(const FORMAT::Number* x, long x_stride, const FORMAT::Number* weight, float plus,  \
                                    float eps, FORMAT::Number* y, long M, long D) {                                    \
    norm<FORMAT>(x, x_stride, weight, plus, eps, y, M, D);                                                             \
  }                                                                                                                    \
  extern "C" void locum_route_##NAME(const FORMAT::Number* x, long x_stride, const FORMAT::Number* w,                  \
                                     const FORMAT::Number* bias, int sums_to_one, FORMAT::Number* logits,              \
                                     int64_t* index, float* weight, long T, long K, long N, long D, int threads) {     \
    route<FORMAT>(x, x_stride, w, bias, sums_to_one, logits, index, weight, T, K, N, D, threads);                      \
  }                                                                                                                    \
  extern "C" void locum_attend_##NAME(const FORMAT::Number* q, const FORMAT::Number* k, const FORMAT::Number* v,       \
                                      FORMAT::Number* y, const long* apart, float scale, long B, long H, long G,       \
                                      long S, long D, long C, int threads) {                                           \
    attend<FORMAT>({q, apart[0], apart[1], 0}, {k, apart[2], apart[3], apart[4]}, {v, apart[5], apart[6], apart[7]},   \
                   {y, apart[8], apart[9], 0}, scale, B, H, G, S, D, C, threads);                                      \
  }                                                                                                                    \
  extern "C" void locum_project_##NAME(const FORMAT::Number* const* in, FORMAT::Number* const* out, const long* size,  \
                                       const float* number, int threads) {                                             \
    const Norm<FORMAT::Number> before{in[1], number[0], number[1]};                                                    \
    const Norm<FORMAT::Number> of_qk[2] = {{in[8], number[2], number[3]}, {in[9], number[4], number[5]}};              \
    project<FORMAT>(in[0], size[0], before, in + 2, in + 5, of_qk, size[1], in[10], in[11], size[2], out, size + 3,    \
                    size[6], size[7], size[8], threads);                                                               \
  }                                                                                                                    \
  extern "C" void locum_attended_##NAME(const FORMAT::Number* const* in, FORMAT::Number* const* out,                   \
                                        const long* apart, const long* size, const float* number, int threads) {       \
    attended<FORMAT>({in[0], apart[0], apart[1], 0}, {in[1], apart[2], apart[3], apart[4]},                            \
                     {in[2], apart[5], apart[6], apart[7]}, number[0], in[3], in[4], in[5], apart[8],                  \
                     {in[6], number[1], number[2]}, out[0], out[1], size[0], size[1], size[2], size[3], size[4],       \
                     size[5], size[6], threads);                                                                       \
  }

ENTRIES(BFloat16, bfloat16)
ENTRIES(Float32, float32)
