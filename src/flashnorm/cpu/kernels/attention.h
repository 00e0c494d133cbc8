// Attention over a cache, for the rows of one key-value head: one pass over the keys, with a running maximum.
//
// The cache is stored like packed weights. Keys are [position / 16][channel][16], so that the scores are a matrix
// product with positions as outputs. Values are [channel / 16][position][16], so that the weighted sum of values is a
// matrix product with channels as outputs. If a tile takes its inputs in pairs, the cache stores pairs as well.
#pragma once

#include "matmul.h"

namespace FLASHNORM_ISA {

constexpr int kSpan = 128;  // positions that are processed at once
constexpr int kMostHeadDim = 256;

template <class T>
struct Cache {
  using Element = typename T::Element;
  int head_dim, capacity;  // capacity is a multiple of 16

  int64_t size() const { return int64_t(capacity) * head_dim; }
  Element& key(Element* head, int position, int channel) const {
    return head[int64_t(position / kBlock) * head_dim * kBlock + in_block(channel, position % kBlock)];
  }
  Element& value(Element* head, int position, int channel) const {
    return head[int64_t(channel / kBlock) * capacity * kBlock + in_block(position, channel % kBlock)];
  }

 private:
  static int64_t in_block(int input, int output) {
    return (int64_t(input / T::kStep) * kBlock + output) * T::kStep + input % T::kStep;
  }
};

// The softmax of one row over some of the positions: the largest score, and the sum of e^(score - largest).
struct Partial {
  float largest, total;
};

// A matrix product with `count` blocks of 16 outputs; calls `emit(row, first output, vector of 16 outputs)`.
template <class T, class Emit>
void blocks(int count, int rows, const typename T::Activation* x, int ldx, const typename T::Element* w, int64_t block,
            int in, const Emit& emit) {
  Ahead nothing;
  int b = 0;
  for (; b + kWide <= count; b += kWide)
    tile_of<T, kWide>(rows, x, ldx, w + b * block, block, in, nothing, [&](int r, const Vec(&y)[kWide]) {
      for (int n = 0; n < kWide; ++n) emit(r, (b + n) * kBlock, y[n]);
    });
  for (; b < count; ++b)
    tile_of<T, 1>(rows, x, ldx, w + b * block, block, in, nothing,
                         [&](int r, const Vec(&y)[1]) { emit(r, b * kBlock, y[0]); });
}

// Attention of `rows` (at most kTokens) queries over positions [begin, end); row r sees only [first[r], last[r]].
// A score s counts as cap tanh(s / cap), if there is a cap. out: [rows][head_dim], not divided by the total in `partial`.
template <class T>
void attend(const Cache<T>& cache, const typename T::Element* keys, const typename T::Element* values,
            const typename T::Activation* q, int ldq, int rows, const int* first, const int* last, int begin, int end,
            float cap, float* out, Partial* partial) {
  const int d = cache.head_dim;
  alignas(64) float score[kTokens][kSpan];
  for (int r = 0; r < rows; ++r) {
    partial[r] = {-INFINITY, 0};
    memset(out + r * d, 0, d * sizeof(float));
  }
  for (int from = begin; from < end; from += kSpan) {
    const int count = std::min(kSpan, end - from);
    const int padded = (count + kBlock - 1) / kBlock * kBlock;
    blocks<T>(padded / kBlock, rows, q, ldq, keys + int64_t(from) * d, int64_t(kBlock) * d, d,
              [&](int r, int i, Vec s) { store(score[r] + i, cap > 0 ? splat(cap) * tanh(s * splat(1 / cap)) : s); });
    for (int r = 0; r < rows; ++r) {
      float* s = score[r];
      const int low = std::max(0, first[r] - from), high = std::min(count, last[r] + 1 - from);
      for (int i = 0; i < std::min(low, padded); ++i) s[i] = -INFINITY;
      for (int i = std::max(high, 0); i < padded; ++i) s[i] = -INFINITY;
      Vec most = splat(partial[r].largest);
      for (int i = 0; i < padded; i += kBlock) most = max(most, load(s + i));
      const float largest = largest_of(most);
      if (largest == -INFINITY) {
        memset(s, 0, padded * sizeof(float));
        continue;
      }
      const float rescale = std::exp(partial[r].largest - largest);
      Vec total = splat(0);
      for (int i = 0; i < padded; i += kBlock) {
        Vec e = exp(load(s + i) + splat(-largest));
        store(s + i, e);
      }
      for (int i = 0; i < std::min(low, padded); ++i) s[i] = 0;  // `exp` gives e^-87 for them, not 0
      for (int i = std::max(high, 0); i < padded; ++i) s[i] = 0;
      for (int i = 0; i < padded; i += kBlock) total = total + load(s + i);
      partial[r] = {largest, partial[r].total * rescale + sum_of(total)};
      if (rescale != 1)
        for (int i = 0; i < d; ++i) out[r * d + i] *= rescale;
    }
    alignas(64) typename T::Activation weight[kTokens][kSpan];
    for (int r = 0; r < rows; ++r) put(weight[r], score[r], padded);
    blocks<T>(d / kBlock, rows, &weight[0][0], kSpan, values + int64_t(from) * kBlock, int64_t(kBlock) * cache.capacity,
              count, [&](int r, int i, Vec s) { store(out + r * d + i, load(out + r * d + i) + s); });
  }
}

}  // namespace FLASHNORM_ISA
