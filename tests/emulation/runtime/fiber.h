// Fibres: several call stacks on one host thread, switched by hand.
//
// On x86-64 a switch saves the registers that a function call must keep, a few nanoseconds;
// elsewhere (or with EMULATION_UCONTEXT) ucontext does it, which takes two system calls.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN
#endif
#endif

namespace emulation {

// A place to switch to: a fibre, or the host's own stack.
struct Context {
#ifdef EMULATION_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
#ifdef EMULATION_ASAN
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#endif
};

// Leaves `from` and goes on where `to` was left; returns when somebody switches back to `from`.
#if defined(EMULATION_UCONTEXT) || defined(EMULATION_ASAN)
void switch_context(Context& from, Context& to);
#else
extern "C" void emulation_switch(void** save, void* load);
inline void switch_context(Context& from, Context& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}
#endif

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  size_t colour = 0;
};

// Fibres that are kept for good: each has a stack above a page that no access is allowed to.
class FiberPool {
 public:
  // Every fibre runs `main`, which must not return; it is left only by switching away.
  explicit FiberPool(void (*main)()) : main_(main) {}

  Fiber* take() {
    if (free_.empty()) grow();
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  // The fibre will be taken again and then goes on after the switch by which it was left.
  void give(Fiber* fiber) { free_.push_back(fiber); }
  // All fibres are free and begin anew, whatever they were doing.
  void reset();

 private:
  void grow();
  void prepare(Fiber& fiber);

  void (*main_)();
  std::vector<Fiber*> all_;
  std::vector<Fiber*> free_;
};

}  // namespace emulation
