// What tests/emulation/control.py calls, by ctypes: plain C functions, texts as JSON.
#include <exception>
#include <sstream>

#include "device.h"

#define EMULATION_API extern "C" __attribute__((visibility("default")))

namespace {

using emulation::Record;

void write(std::ostream& out, const Record& record) {
  const auto& counters = record.counters;
  out << "{\"kernel\": \"" << record.kernel << "\", \"grid\": " << record.grid
      << ", \"block\": " << record.block << ", \"shared_bytes\": " << record.shared_bytes
      << ", \"dependent\": " << (record.dependent ? "true" : "false")
      << ", \"memset_bytes\": " << record.memset_bytes;
  const char* const names[] = {"ldg", "ldca", "ldcs", "ldcg", "stwb", "stcs"};
  for (unsigned i = 0; i < emulation::kAccessKinds; ++i) {
    out << ", \"" << names[i] << "\": " << counters.bytes[i];
  }
  out << ", \"wide_loads\": " << counters.wide_loads
      << ", \"wide_stores\": " << counters.wide_stores << ", \"atomics\": " << counters.atomics
      << ", \"memory_read\": " << record.memory_read
      << ", \"memory_written\": " << record.memory_written << "}";
}

}  // namespace

EMULATION_API void emulation_configure(int multiprocessors, int64_t l2_bytes, int64_t shared_bytes,
                                       int dependent_launch) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::properties() = {multiprocessors, l2_bytes, shared_bytes, dependent_launch != 0};
}

// 0 forward, 1 reverse, 2 random
EMULATION_API void emulation_order(int kind, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::scheduler().set_order(static_cast<emulation::Order>(kind), seed);
}

EMULATION_API void emulation_last_part(uint64_t parts) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::scheduler().set_last_part(parts);
}

// Returns whether the capacity is one that the model can have; 0 means no model.
EMULATION_API int emulation_start_recording(int64_t l2_bytes) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  auto fresh = std::make_unique<emulation::Recording>();
  try {
    if (l2_bytes != 0) fresh->l2 = std::make_unique<emulation::L2>(l2_bytes);
  } catch (const std::exception&) {
    return 0;
  }
  emulation::recording() = std::move(fresh);
  return 1;
}

// Counts accesses to this memory by themselves, until the recording ends.
EMULATION_API void emulation_watch(const void* address, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (emulation::recording() == nullptr) return;
  emulation::recording()->regions.push_back({begin, begin + static_cast<uintptr_t>(bytes)});
}

// Ends the recording and flushes the model's cache. The text is valid until the next call.
EMULATION_API const char* emulation_stop_recording() {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  static std::string text;
  const std::unique_ptr<emulation::Recording> done = std::move(emulation::recording());
  std::ostringstream out;
  out << "{\"launches\": [";
  uint64_t read = 0, written = 0;
  if (done != nullptr) {
    for (const Record& record : done->records) {
      if (&record != &done->records.front()) out << ", ";
      write(out, record);
    }
    if (done->l2 != nullptr) {
      done->l2->flush();
      read = done->l2->bytes_read;
      written = done->l2->bytes_written;
    }
  }
  out << "], \"watched\": [";
  if (done != nullptr) {
    for (const emulation::Region& region : done->regions) {
      if (&region != &done->regions.front()) out << ", ";
      out << "[" << region.loaded << ", " << region.stored << "]";
    }
  }
  out << "], \"memory_read\": " << read << ", \"memory_written\": " << written << "}";
  text = out.str();
  return text.c_str();
}
