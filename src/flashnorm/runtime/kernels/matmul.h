// Linears: packed weights times the activations of a few tokens (bound by memory) or of many (bound by arithmetic).
//
// Packed: the weights of sixteen outputs lie next to each other, input after input; bf16 in pairs of inputs, which is
// what the dot-product instruction reads. One tile of `kTokens` tokens by `N` such blocks stays in registers.
#pragma once

#include <algorithm>

#include "simd.h"

namespace FLASHNORM_ISA {

#if defined(__AVX512F__)
constexpr int kTokens = 12, kWide = 2;  // 24 sums in 32 registers
#elif defined(__aarch64__)
constexpr int kTokens = 5, kWide = 1;  // 20 in 32
#else
constexpr int kTokens = 4, kWide = 1;  // 8 in 16
#endif
constexpr int kAhead = 1024;  // bytes that are fetched before they are needed

inline void fetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// Weights of plain layout: [block][input][16].
template <class W>
struct Plain {
  using Element = typename W::Element;
  using Activation = float;
  static constexpr int kStep = 1;

  template <int M, int N>
  static inline void step(Vec (&sum)[M][N], const float* x, int ldx, const Element* w, int64_t block, int k) {
    Vec v[N];
    for (int n = 0; n < N; ++n) {
      const Element* from = w + n * block + int64_t(k) * kBlock;
      if ((k * kBlock * sizeof(Element)) % 64 == 0) fetch(reinterpret_cast<const char*>(from) + kAhead);
      v[n] = W::load(from);
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) multiply_add(sum[m][n], v[n], splat(x[m * ldx + k]));
  }
};

// bf16 in pairs: [block][input / 2][16][2], with exact float32 products.
struct Pairs {
  using Element = uint16_t;
  using Activation = float;
  static constexpr int kStep = 2;

  template <int M, int N>
  static inline void step(Vec (&sum)[M][N], const float* x, int ldx, const Element* w, int64_t block, int k) {
    Vec even[N], odd[N];
    for (int n = 0; n < N; ++n) {
      const Element* from = w + n * block + int64_t(k) * kBlock;
      fetch(reinterpret_cast<const char*>(from) + kAhead);
      for (int p = 0; p < kParts; ++p) {
        Bits both;
        memcpy(&both, from + p * 2 * kLanes, sizeof both);
        Bits low = both << 16, high = both & 0xffff0000u;
        memcpy(&even[n].part[p], &low, sizeof low);
        memcpy(&odd[n].part[p], &high, sizeof high);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        multiply_add(sum[m][n], even[n], splat(x[m * ldx + k]));
        multiply_add(sum[m][n], odd[n], splat(x[m * ldx + k + 1]));
      }
  }
};

#if defined(__AVX512BF16__)
// The same with activations in bf16: two products at a time, summed in float32.
struct DotPairs {
  using Element = uint16_t;
  using Activation = uint16_t;
  static constexpr int kStep = 2;

  template <int M, int N>
  static inline void step(Vec (&sum)[M][N], const uint16_t* x, int ldx, const Element* w, int64_t block, int k) {
    __m512bh v[N];
    for (int n = 0; n < N; ++n) {
      const Element* from = w + n * block + int64_t(k) * kBlock;
      fetch(reinterpret_cast<const char*>(from) + kAhead);
      v[n] = (__m512bh)_mm512_loadu_si512(from);
    }
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      memcpy(&pair, x + m * ldx + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < N; ++n)
        sum[m][n].part[0] = Part(_mm512_dpbf16_ps((__m512)sum[m][n].part[0], v[n], both));
    }
  }
};
#endif

// sum[m][n] += x[m] . w[n], over `in` inputs. `block` is the distance of two blocks of outputs, in elements.
template <class L, int M, int N>
inline void multiply(Vec (&sum)[M][N], const typename L::Activation* x, int ldx, const typename L::Element* w,
                     int64_t block, int in) {
  for (int k = 0; k < in; k += L::kStep) L::template step<M, N>(sum, x, ldx, w, block, k);
}

// `emit(token, output, vectors[N])` for every token of a tile.
template <class L, int M, int N, class Emit>
inline void tile(const typename L::Activation* x, int ldx, const typename L::Element* w, int64_t block, int in,
                 int token, int output, const Emit& emit) {
  Vec sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = splat(0);
  multiply<L, M, N>(sum, x, ldx, w, block, in);
  for (int m = 0; m < M; ++m) emit(token + m, output, sum[m]);
}

// A tile of any number of tokens up to kTokens.
template <class L, int N, class Emit, int M = kTokens>
inline void tile_of(int tokens, const typename L::Activation* x, int ldx, const typename L::Element* w, int64_t block,
                    int in, int token, int output, const Emit& emit) {
  if constexpr (M > 0) {
    if (tokens == M)
      tile<L, M, N>(x, ldx, w, block, in, token, output, emit);
    else
      tile_of<L, N, Emit, M - 1>(tokens, x, ldx, w, block, in, token, output, emit);
  }
}

// The share of `count` things that thread `me` of `all` does.
struct Share {
  int begin, end;
  Share(int count, int me, int all) : begin(int64_t(count) * me / all), end(int64_t(count) * (me + 1) / all) {}
};

// All outputs of a linear for all tokens, shared among threads by blocks of outputs: each weight is read once for every
// group of tokens whose activations fit the cache. `N` blocks belong together (a gate and its up projection, say).
template <class L, int N, class Emit>
void linear(const typename L::Activation* x, int ldx, const void* weights, int in, int blocks, int tokens, int me,
            int all, const Emit& emit) {
  const auto* w = static_cast<const typename L::Element*>(weights);
  const int64_t block = int64_t(in) * kBlock;
  const int per_group = std::max<int64_t>(kTokens, (384 * 1024 / (int64_t(in) * sizeof(*x))) / kTokens * kTokens);
  const Share mine((blocks + N - 1) / N, me, all);
  for (int group = 0; group < tokens; group += per_group) {
    const int end = std::min(tokens, group + per_group);
    for (int panel = mine.begin; panel < mine.end; ++panel) {
      const int first = panel * N;
      for (int t = group; t < end; t += kTokens) {
        const int count = std::min(kTokens, end - t);
        if (first + N <= blocks)
          tile_of<L, N>(count, x + int64_t(t) * ldx, ldx, w + first * block, block, in, t, first * kBlock, emit);
        else  // the last one, alone
          tile_of<L, 1>(count, x + int64_t(t) * ldx, ldx, w + first * block, block, in, t, first * kBlock, emit);
      }
    }
  }
}

}  // namespace FLASHNORM_ISA
