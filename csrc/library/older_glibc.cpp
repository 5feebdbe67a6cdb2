// What our own code, torch's headers and those of C++ use of glibc beyond 2.28.
#include "older_glibc.h"

// The newer one differs in how it reports errors to the C library, not in its results.
OLDER_GLIBC(exp, 2.2.5)
OLDER_GLIBC(dlsym, 2.2.5)

#ifdef __GLIBC__
// glibc 2.32 and newer tell by it that a process has one thread, and C++ then counts references
// without atomics. Zero says that there may be more.
extern "C" {
[[gnu::visibility("hidden")]] extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif
