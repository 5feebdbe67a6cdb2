// The emulated device: its properties, and what is recorded of its launches.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulation/launch.h"
#include "l2.h"
#include "scheduler.h"

namespace emulation {

struct Properties {
  int multiprocessors = 132;
  int64_t l2_bytes = int64_t{50} << 20;
  int64_t shared_bytes = 227 << 10;  // that a block may have after cudaFuncSetAttribute
  bool dependent_launch = true;
  int fill = 0xff;  // every byte of workspace: NaN, and -1 in a counter; negative: left alone
};

// One launch or memset, as control.py shows it.
struct Record {
  std::string kernel;  // "memset" for one
  unsigned grid = 0, block = 0;
  uint64_t shared_bytes = 0;
  bool dependent = false;  // carried the attribute of programmatic dependent launch
  uint64_t memset_bytes = 0;
  Counters counters{};
  uint64_t memory_read = 0, memory_written = 0;  // by the model of L2
};

// Memory whose accesses are counted by themselves.
struct Region {
  uintptr_t begin, end;
  uint64_t loaded = 0, stored = 0;  // bytes
};

struct Recording {
  std::vector<Record> records;
  std::unique_ptr<L2> l2;  // null: no model
  std::vector<Region> regions;
};

Properties& properties();

// Launches until now, the running one included.
uint64_t launch_count();

// Launches come from any host thread, one at a time.
std::mutex& device_mutex();

// Null while nothing is recorded. The caller holds the mutex.
std::unique_ptr<Recording>& recording();

}  // namespace emulation
