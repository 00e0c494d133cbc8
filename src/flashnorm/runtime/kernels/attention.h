// Attention over a cache, for the rows of one key-value head: one pass over the keys, with a running maximum.
//
// The cache is stored like weights: keys as [position / 16][channel][16], so that scores are a matrix product with
// positions as outputs; values as [channel / 16][position][16], so that what is read is one with channels as outputs.
#pragma once

#include "matmul.h"

namespace FLASHNORM_ISA {

constexpr int kSpan = 128;  // positions at a time
constexpr int kMostHeadDim = 256;

template <class C>
struct Cache {
  using Element = typename C::Element;
  int head_dim, capacity;  // capacity is a multiple of 16

  int64_t size() const { return int64_t(capacity) * head_dim; }
  Element& key(Element* head, int position, int channel) const {
    return head[(int64_t(position / kBlock) * head_dim + channel) * kBlock + position % kBlock];
  }
  Element& value(Element* head, int position, int channel) const {
    return head[(int64_t(channel / kBlock) * capacity + position) * kBlock + channel % kBlock];
  }
};

// What a pass over some of the positions leaves of a row.
struct Partial {
  float largest, total;
};

// `rows` (at most kTokens) queries against positions [begin, end). Row r sees [first[r], last[r]] of them.
// out: [rows][head_dim], not divided by the total.
template <class C>
void attend(const Cache<C>& cache, const typename C::Element* keys, const typename C::Element* values, const float* q,
            int ldq, int rows, const int* first, const int* last, int begin, int end, float* out, Partial* partial) {
  const int d = cache.head_dim;
  alignas(64) float score[kTokens][kSpan];
  for (int r = 0; r < rows; ++r) {
    partial[r] = {-INFINITY, 0};
    memset(out + r * d, 0, d * sizeof(float));
  }
  for (int from = begin; from < end; from += kSpan) {
    const int count = std::min(kSpan, end - from);
    const auto* k = keys + int64_t(from) * d;
    for (int b = 0; b * kBlock < count; ++b)
      tile_of<Plain<C>, 1>(rows, q, ldq, k + int64_t(b) * kBlock * d, 0, d,
                           [&](int r, const Vec(&s)[1]) { store(score[r] + b * kBlock, s[0]); });
    for (int r = 0; r < rows; ++r) {
      float* s = score[r];
      const int padded = (count + kBlock - 1) / kBlock * kBlock;
      const int low = std::max(0, first[r] - from), high = std::min(count, last[r] + 1 - from);
      for (int i = 0; i < std::min(low, padded); ++i) s[i] = -INFINITY;
      for (int i = std::max(high, 0); i < padded; ++i) s[i] = -INFINITY;
      float largest = partial[r].largest;
      for (int i = std::max(0, low); i < high; ++i) largest = std::max(largest, s[i]);
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
      for (int i = 0; i < std::min(low, padded); ++i) s[i] = 0;  // e^-87 is not quite nothing
      for (int i = std::max(high, 0); i < padded; ++i) s[i] = 0;
      for (int i = 0; i < padded; i += kBlock) total = total + load(s + i);
      partial[r] = {largest, partial[r].total * rescale + sum_of(total)};
      if (rescale != 1)
        for (int i = 0; i < d; ++i) out[r * d + i] *= rescale;
    }
    for (int c = 0; c < d; c += kBlock)
      tile_of<Plain<C>, 1>(rows, &score[0][0], kSpan, values + int64_t(c) * cache.capacity + int64_t(from) * kBlock, 0,
                           count, [&](int r, const Vec(&s)[1]) {
                             store(out + r * d + c, load(out + r * d + c) + s[0]);
                           });
  }
}

}  // namespace FLASHNORM_ISA
