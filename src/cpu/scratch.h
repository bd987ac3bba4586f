// Hands out the caller's scratch memory piece by piece, each piece on cache lines of its own. The sizes
// are those of plan/cpu_workspace.h; running out of memory means that the two disagree.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/check.h"
#include "plan/cpu_workspace.h"

namespace fsattn::cpu {

class ScratchArena {
 public:
  ScratchArena(void* data, size_t bytes) : next_(static_cast<char*>(data)), left_(bytes) {}

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = cpu_buffer_bytes(count, sizeof(T));
    FSATTN_ASSERT(bytes <= left_);
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

  // The rest, cut into equal parts for the threads.
  char* rest() const { return next_; }
  size_t left() const { return left_; }

 private:
  char* next_;
  size_t left_;
};

}  // namespace fsattn::cpu
