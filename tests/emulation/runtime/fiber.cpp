#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef EMULATION_UCONTEXT
extern "C" void emulation_switch(void** save, void* load);
extern "C" void emulation_enter();

// The System V ABI keeps rbx, rbp and r12 to r15 over a call. A new fibre is laid out as if it had
// been left in emulation_switch called from emulation_enter, with its main function in rbx; the
// pushed zero ends the chain of return addresses for debuggers and sanitizers.
asm(R"(
.text
.p2align 4
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
.p2align 4
.hidden emulation_enter
.type emulation_enter, @function
emulation_enter:
  xorl %ebp, %ebp
  pushq $0
  jmp *%rbx
.size emulation_enter, .-emulation_enter
)");
#endif

namespace emulation {
namespace {

#ifdef EMULATION_ASAN
constexpr size_t kStackBytes = 256 << 10;  // frames are larger: red zones around every array

// The context that the last switch left: where a fibre arrives, the sanitizer tells the bounds of
// that one's stack, which for the host's stack are known from nowhere else.
Context* left = nullptr;

void arrive(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &left->stack_bottom, &left->stack_bytes);
}
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

void (*fiber_main)() = nullptr;

void enter() {
#ifdef EMULATION_ASAN
  arrive(nullptr);
#endif
  fiber_main();
  std::abort();
}

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

#if defined(EMULATION_UCONTEXT) || defined(EMULATION_ASAN)
void switch_context(Context& from, Context& to) {
#ifdef EMULATION_ASAN
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef EMULATION_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  emulation_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef EMULATION_ASAN
  arrive(from.fake_stack);
#endif
}
#endif

void FiberPool::grow() {
  auto* fiber = new Fiber;
  void* memory = mmap(nullptr, kStackBytes + page_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page_bytes(), PROT_NONE);  // stacks grow down, into it
  fiber->stack = static_cast<unsigned char*>(memory) + page_bytes();
  // Tops of stacks at the same place of a page would compete for the same lines of the cache.
  fiber->colour = all_.size() * 320 % 8192;
  all_.push_back(fiber);
  free_.reserve(all_.size());
  prepare(*fiber);
  free_.push_back(fiber);
}

void FiberPool::prepare(Fiber& fiber) {
  fiber_main = main_;
#ifdef EMULATION_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
  fiber.context.stack_bottom = fiber.stack;
  fiber.context.stack_bytes = kStackBytes;
  fiber.context.fake_stack = nullptr;
#endif
#ifdef EMULATION_UCONTEXT
  getcontext(&fiber.context.registers);
  fiber.context.registers.uc_stack.ss_sp = fiber.stack;
  fiber.context.registers.uc_stack.ss_size = kStackBytes - fiber.colour;
  fiber.context.registers.uc_link = nullptr;
  makecontext(&fiber.context.registers, enter, 0);
#else
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes - fiber.colour - 64);
  *--top = reinterpret_cast<void*>(&emulation_enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  top[4] = reinterpret_cast<void*>(&enter);  // rbx
  fiber.context.stack_pointer = top;
#endif
}

void FiberPool::reset() {
  free_.clear();
  for (Fiber* fiber : all_) {
    prepare(*fiber);
    free_.push_back(fiber);
  }
}

}  // namespace emulation
