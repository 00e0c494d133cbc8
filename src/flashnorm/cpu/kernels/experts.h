// Which experts compute which rows: each row chooses some, and the rows are then grouped by expert.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"

namespace FLASHNORM_ISA {

struct Routing {
  int experts, per_row;
  int32_t* chosen;  // [rows][per_row]: the experts of each row
  float* weights;   // [rows][per_row]: by which their outputs are multiplied
  int32_t* starts;  // [experts + 1]: where each expert's part of `order` begins
  int32_t* order;   // [rows * per_row]: indices into `chosen`, by expert and then by row

  void lay_out(Arena& arena, int rows, int most_experts, int most_per_row) {
    const int64_t pairs = int64_t(rows) * most_per_row;
    chosen = arena.take<int32_t>(pairs);
    weights = arena.take<float>(pairs);
    starts = arena.take<int32_t>(most_experts + 1);
    order = arena.take<int32_t>(pairs);
  }

  int count(int expert) const { return starts[expert + 1] - starts[expert]; }

  int row(int index) const { return order[index] / per_row; }

  // Chooses the largest of a row's scores, and the first of equal ones. The weights are the softmax of all scores.
  // A score that is no number is not larger than another; the weights then are no numbers, as in PyTorch.
  void choose(const float* score, int row, bool renormalise) {
    int32_t* list = chosen + int64_t(row) * per_row;
    float* weight = weights + int64_t(row) * per_row;
    for (int expert = 0, size = 0; expert < experts; ++expert) {
      if (size == per_row && !(score[expert] > score[list[size - 1]])) continue;
      int at = size < per_row ? size++ : size - 1;
      for (; at > 0 && score[expert] > score[list[at - 1]]; --at) list[at] = list[at - 1];
      list[at] = expert;
    }
    const float largest = score[list[0]];
    double total = 0, of_chosen = 0;
    for (int expert = 0; expert < experts; ++expert) total += std::exp(score[expert] - largest);
    for (int i = 0; i < per_row; ++i) of_chosen += weight[i] = float(std::exp(score[list[i]] - largest) / total);
    if (renormalise)
      for (int i = 0; i < per_row; ++i) weight[i] = float(weight[i] / of_chosen);
  }

  // Sorts the choices of all rows by expert.
  void group(int rows) {
    const int64_t pairs = int64_t(rows) * per_row;
    std::fill(starts, starts + experts + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) ++starts[chosen[i] + 1];
    for (int expert = 0; expert < experts; ++expert) starts[expert + 1] += starts[expert];
    for (int64_t i = 0; i < pairs; ++i) order[starts[chosen[i]]++] = int32_t(i);
    for (int expert = experts; expert > 0; --expert) starts[expert] = starts[expert - 1];
    starts[0] = 0;
  }
};

}  // namespace FLASHNORM_ISA
