// Memory with nothing on either side of it, and calls that may be caught touching that nothing.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

// One page that can be used, between two that cannot.
class GuardedPage {
 public:
  GuardedPage() : size_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, 3 * size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<char*>(memory) + size_;
    if (mprotect(begin_, size_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  ~GuardedPage() { munmap(begin_ - size_, 3 * size_); }
  GuardedPage(const GuardedPage&) = delete;
  GuardedPage& operator=(const GuardedPage&) = delete;

  char* begin() const { return begin_; }
  char* end() const { return begin_ + size_; }

 private:
  size_t size_;
  char* begin_;
};

inline thread_local sigjmp_buf guarded_return;

// Calls f and returns whether it came to its end; it does not where it touches a page that cannot
// be used. f must not hold anything that wants its destructor run.
template <class F>
bool stays_inside(F&& f) {
  struct sigaction caught = {}, segv_before = {}, bus_before = {};
  caught.sa_handler = [](int) { siglongjmp(guarded_return, 1); };
  sigaction(SIGSEGV, &caught, &segv_before);
  sigaction(SIGBUS, &caught, &bus_before);
  const bool inside = sigsetjmp(guarded_return, /*savemask=*/1) == 0;
  if (inside) f();
  sigaction(SIGSEGV, &segv_before, nullptr);
  sigaction(SIGBUS, &bus_before, nullptr);
  return inside;
}
