// Scratch memory: what a kernel keeps between its sweeps.
//
// cuda/arena.h has the same for a GPU. They share no code: what is compiled here is compiled once
// per instruction set, and must not be linked with code for another.
//
// Included once per instruction set by isa.inl.

// Memory for one worker, handed out in order. With no memory behind it, it only counts, so that one
// description of what is needed serves for measuring and for taking.
class Arena {
 public:
  Arena() = default;
  explicit Arena(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* taken = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    // A vector more than asked for: whole vectors are read and written at the end of an array.
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)) + kAlignment, kAlignment);
    return taken;
  }
  template <class T>
  T* zeros(int64_t count) {
    T* taken = take<T>(count);
    if (taken != nullptr) std::fill_n(taken, count, T{0});
    return taken;
  }
  // [rows, padded C], the padding zero.
  template <class T>
  T* channels(const Shape& shape, int64_t rows = 1) {
    const int64_t count = rows * shape.padded_c;
    return shape.c == shape.padded_c ? take<T>(count) : zeros<T>(count);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

// Some objects that take their memory from arenas (one for each worker, say), and the one block
// behind them. T is constructed from (Arena&, const Shape&).
template <class T>
class Prepared {
 public:
  Prepared(int64_t count, const Shape& shape) {
    Arena needed;
    T(needed, shape);
    const size_t bytes = static_cast<size_t>(count * needed.used());
    memory_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
    objects_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      Arena arena(memory_.get() + i * needed.used());
      objects_.emplace_back(arena, shape);
    }
  }

  const T& operator[](int64_t i) const { return objects_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<char, Free> memory_;
  std::vector<T> objects_;
};
