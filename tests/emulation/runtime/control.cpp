// What tests/emulation/control.py calls, by ctypes: plain C functions, texts as JSON.
#include <dlfcn.h>

#include <exception>
#include <sstream>
#include <utility>

#include "device.h"
#include "host.h"
#include "races.h"

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
      << ", \"rounds\": " << counters.rounds << ", \"memory_read\": " << record.memory_read
      << ", \"memory_written\": " << record.memory_written << "}";
}

// Where in the library the call was made, for addr2line; 0 for none.
uint64_t offset_of(const void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return 0;
  return static_cast<uint64_t>(static_cast<const char*>(code) -
                               static_cast<const char*>(info.dli_fbase));
}

void write(std::ostream& out, const emulation::RaceDetector& detector,
           const emulation::Entry& entry) {
  const char* const names[] = {"ldg",  "ldca",   "ldcs", "ldcg", "stwb",
                               "stcs", "atomic", "read", "write"};
  out << "{\"kernel\": \"" << detector.kernel(entry.launch) << "\", \"launch\": " << entry.launch
      << ", \"block\": " << entry.block << ", \"thread\": " << entry.thread << ", \"access\": \""
      << names[entry.access] << "\", \"code\": " << offset_of(entry.code) << "}";
}

void write(std::ostream& out, const emulation::RaceDetector& detector,
           const emulation::Conflict& conflict) {
  const char* const names[] = {"race", "stale L1", "read-only path", "uninitialised", "overlap"};
  out << "{\"finding\": \"" << names[static_cast<int>(conflict.finding)] << "\", \"memory\": \""
      << (conflict.shared ? "shared" : "global") << "\", \"address\": " << conflict.address
      << ", \"workspace\": ";
  if (conflict.fresh) {
    out << conflict.in_fresh;
  } else {
    out << "null";
  }
  out << ", \"count\": " << conflict.count << ", \"first\": ";
  write(out, detector, conflict.first);
  out << ", \"second\": ";
  write(out, detector, conflict.second);
  out << "}";
}

const char* const kSyncs[] = {"barrier", "syncwarp", "fence", "wait", "launch", "memset"};

void write(std::ostream& out, const std::string& kernel, const emulation::SyncSite& sync) {
  out << "{\"what\": \"" << kSyncs[static_cast<int>(sync.what)] << "\", \"kernel\": \"" << kernel
      << "\", \"file\": \"" << sync.site.file << "\", \"line\": " << sync.site.line
      << ", \"count\": " << sync.count << "}";
}

}  // namespace

EMULATION_API void emulation_configure(int multiprocessors, int64_t l2_bytes, int64_t shared_bytes,
                                       int dependent_launch, int fill) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::properties() = {multiprocessors, l2_bytes, shared_bytes, dependent_launch != 0, fill};
}

// 0 forward, 1 reverse, 2 random
EMULATION_API void emulation_order(int kind, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::scheduler().set_order(static_cast<emulation::Order>(kind), seed);
}

EMULATION_API void emulation_end_parts(uint64_t parts) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::scheduler().set_end_parts(parts);
}

// Of the calling thread: its call after so many others fails; what is alive, and what was left.
EMULATION_API void emulation_fail_call_after(int others) { emulation::fail_call_after(others); }
EMULATION_API int emulation_scopes() { return emulation::scopes(); }
EMULATION_API int emulation_left_error() { return emulation::left_error(); }

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

// ------------------------------------------------------------------------------------------ races

EMULATION_API void emulation_start_detecting() {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::race_detector() = std::make_unique<emulation::RaceDetector>();
}

// Takes away what orders, one of `kSyncs`, at one place of a kernel.
EMULATION_API void emulation_remove_sync(int what, const char* kernel, const char* file, int line) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::race_detector()->remove(static_cast<emulation::Sync>(what), kernel, file, line);
}

// As if somebody's kernel had been launched that writes this memory.
EMULATION_API void emulation_foreign_launch(const char* name, const void* address, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  emulation::race_detector()->foreign_launch(name, address, static_cast<size_t>(bytes));
}

// Ends the search. The text is valid until the next call.
EMULATION_API const char* emulation_stop_detecting() {
  const std::lock_guard<std::mutex> lock(emulation::device_mutex());
  static std::string text;
  const std::unique_ptr<emulation::RaceDetector> done = std::move(emulation::race_detector());
  std::ostringstream out;
  const char* separator = "";
  out << "{\"conflicts\": [";
  for (const emulation::Conflict& conflict : done->conflicts()) {
    out << std::exchange(separator, ", ");
    write(out, *done, conflict);
  }
  separator = "";
  out << "], \"syncs\": [";
  for (const auto& [kernel, syncs] : done->syncs()) {
    for (const emulation::SyncSite& sync : syncs) {
      out << std::exchange(separator, ", ");
      write(out, kernel, sync);
    }
  }
  out << "]}";
  text = out.str();
  return text.c_str();
}
