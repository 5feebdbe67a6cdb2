// What a library says of itself before it is loaded: cbam_ext/building/files.py looks for this text
// in the file, and a library of another version than the package is left alone.

namespace {

// `used`, or the compiler would leave it out: nothing else here speaks of it.
[[gnu::used]] const char kIdentity[] = "cbam_ext library, version " CBAM_VERSION;

}  // namespace
