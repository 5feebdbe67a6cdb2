// Lets a library that was linked on a new Linux run on one with glibc 2.28.
//
// A linker takes the newest version of each symbol of glibc, so that a library would ask for the
// glibc of the machine that built it. OLDER_GLIBC(name, version) defines `name` once more, for this
// library alone, as a jump to the version that glibc keeps for older programs.
#pragma once

#include <cstdlib>  // __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(R"(
.macro older_glibc name, version
  .pushsection .text
  .globl \name
  .hidden \name
  .type \name, @function
  .symver older_glibc_\name, \name@GLIBC_\version
\name:
  jmp older_glibc_\name@PLT
  .size \name, . - \name
  .popsection
.endm
)");
#define OLDER_GLIBC(name, version) __asm__("older_glibc " #name ", " #version);
#else  // other systems have other versions
#define OLDER_GLIBC(name, version)
#endif
