// Ends what isa_begin.h began. For GCC that is the end of the file that is compiled: it makes
// templates only there, for the target that it finds then.
#if defined(__clang__) && CBAM_ISA_LEVEL > 0
#pragma clang attribute pop
#endif
