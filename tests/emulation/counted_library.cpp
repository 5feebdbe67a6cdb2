// The operators under a namespace of their own, to be loaded beside those of the fast build.
#define cbam_emulated cbam_counted
#include "library.cpp"
