// Memory for one call, handed out in order. With no memory behind it, it only counts, so that one
// description of what is needed serves for measuring and for taking.
#pragma once

#include <cstdint>

namespace cbam::cuda {

class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* const taken = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 256;
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace cbam::cuda
