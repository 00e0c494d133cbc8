// Memory for intermediate results, cut from one block.
#pragma once

#include <cstdint>

namespace FLASHNORM_ISA {

struct Arena {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (count * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

}  // namespace FLASHNORM_ISA
