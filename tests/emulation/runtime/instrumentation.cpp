// What a compiler calls before each access to memory under -fsanitize=thread. The sanitizer's own
// library is not linked: of these accesses those to shared memory matter, and go to the detector of
// races. Kernels reach global memory through the intrinsics, which tell of it themselves.
#include "races.h"

namespace emulation {
namespace {

inline void read(const void* address, size_t bytes, const void* code) {
  if (RaceDetector* const detector = race_detector().get()) {
    detector->access_shared(reinterpret_cast<uintptr_t>(address), bytes, false, code);
  }
}
inline void write(const void* address, size_t bytes, const void* code) {
  if (RaceDetector* const detector = race_detector().get()) {
    detector->access_shared(reinterpret_cast<uintptr_t>(address), bytes, true, code);
  }
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
// How the host's functions look whether their static variables are there.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int order) {
  return __atomic_load_n(at, order);
}

void __tsan_read1(void* at) { read(at, 1, __builtin_return_address(0)); }
void __tsan_read2(void* at) { read(at, 2, __builtin_return_address(0)); }
void __tsan_read4(void* at) { read(at, 4, __builtin_return_address(0)); }
void __tsan_read8(void* at) { read(at, 8, __builtin_return_address(0)); }
void __tsan_read16(void* at) { read(at, 16, __builtin_return_address(0)); }
void __tsan_unaligned_read2(void* at) { read(at, 2, __builtin_return_address(0)); }
void __tsan_unaligned_read4(void* at) { read(at, 4, __builtin_return_address(0)); }
void __tsan_unaligned_read8(void* at) { read(at, 8, __builtin_return_address(0)); }
void __tsan_unaligned_read16(void* at) { read(at, 16, __builtin_return_address(0)); }
void __tsan_read_range(void* at, size_t bytes) { read(at, bytes, __builtin_return_address(0)); }

void __tsan_write1(void* at) { write(at, 1, __builtin_return_address(0)); }
void __tsan_write2(void* at) { write(at, 2, __builtin_return_address(0)); }
void __tsan_write4(void* at) { write(at, 4, __builtin_return_address(0)); }
void __tsan_write8(void* at) { write(at, 8, __builtin_return_address(0)); }
void __tsan_write16(void* at) { write(at, 16, __builtin_return_address(0)); }
void __tsan_unaligned_write2(void* at) { write(at, 2, __builtin_return_address(0)); }
void __tsan_unaligned_write4(void* at) { write(at, 4, __builtin_return_address(0)); }
void __tsan_unaligned_write8(void* at) { write(at, 8, __builtin_return_address(0)); }
void __tsan_unaligned_write16(void* at) { write(at, 16, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { write(at, bytes, __builtin_return_address(0)); }

// clang calls these in place of the functions.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  read(from, bytes, __builtin_return_address(0));
  write(to, bytes, __builtin_return_address(0));
  return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  read(from, bytes, __builtin_return_address(0));
  write(to, bytes, __builtin_return_address(0));
  return __builtin_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  write(to, bytes, __builtin_return_address(0));
  return __builtin_memset(to, value, bytes);
}

}  // extern "C"
}  // namespace emulation
