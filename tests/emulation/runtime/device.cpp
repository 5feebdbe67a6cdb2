#include "device.h"

#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "host.h"
#include "races.h"
#include "symbols.h"

namespace emulation {

Counters counters;
bool tracing = false;

namespace {

constexpr unsigned kMaxBlock = 1024;
constexpr unsigned kMaxGrid = 0x7fffffff;
constexpr size_t kSharedWithoutAsking = 48 << 10;

uint64_t launches = 0;

// Accesses of each thread since the last barrier: the sector, and how it was accessed.
std::vector<uint64_t> traces[kMaxBlock];

// Hands the accesses since the last barrier to the model of L2.
void replay_traces() {
  L2& l2 = *recording()->l2;
  bool any = true;
  for (size_t i = 0; any; ++i) {
    any = false;
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
      if (i >= traces[thread].size()) continue;
      any = true;
      const uint64_t entry = traces[thread][i];
      const unsigned access = entry & 7;
      l2.access(entry >> 3, is_store(static_cast<Access>(access)),
                access == kLdcs || access == kStcs);
    }
  }
  for (unsigned thread = 0; thread < blockDim.x; ++thread) traces[thread].clear();
}

std::unordered_map<const void*, size_t>& allowed_shared_memory() {
  static std::unordered_map<const void*, size_t> allowed;
  return allowed;
}

std::string check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) {
    return "only launches in one dimension are emulated";
  }
  if (grid.x == 0 || grid.x > kMaxGrid) return "grid of " + std::to_string(grid.x) + " blocks";
  if (block.x == 0 || block.x > kMaxBlock) {
    return "block of " + std::to_string(block.x) + " threads";
  }
  const auto found = allowed_shared_memory().find(kernel);
  const bool asked = found != allowed_shared_memory().end();
  const size_t limit = std::max(kSharedWithoutAsking, asked ? found->second : 0);
  if (config.dynamicSmemBytes > limit) {
    return std::to_string(config.dynamicSmemBytes) + " bytes of shared memory, allowed are " +
           std::to_string(limit);
  }
  return {};
}

bool is_dependent(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      return config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
    }
  }
  return false;
}

const std::string& cached_name(const void* kernel) {
  static std::unordered_map<const void*, std::string> names;
  const auto [found, fresh] = names.try_emplace(kernel);
  if (fresh) found->second = function_name(kernel);
  return found->second;
}

}  // namespace

Properties& properties() {
  static Properties instance;
  return instance;
}

uint64_t launch_count() { return launches; }

std::mutex& device_mutex() {
  static std::mutex instance;
  return instance;
}

std::unique_ptr<Recording>& recording() {
  static std::unique_ptr<Recording> instance;
  return instance;
}

// ------------------------------------------------------------------------------------ host side

void launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
            const void* context) {
  const std::lock_guard<std::mutex> lock(device_mutex());
  ++launches;
  const auto named = [&](const std::string& what) {
    return "kernel launch " + std::to_string(launches) + " (" + cached_name(kernel) + "): " + what;
  };
  if (const std::string problem = misplaced(config.stream); !problem.empty()) {
    throw std::runtime_error(named(problem));
  }
  const std::string problem = check(config, kernel);
  if (!problem.empty()) throw std::runtime_error(named("bad configuration: " + problem));

  Recording* const record_to = recording().get();
  L2* const l2 = record_to == nullptr ? nullptr : record_to->l2.get();
  const uint64_t read_before = l2 == nullptr ? 0 : l2->bytes_read;
  const uint64_t written_before = l2 == nullptr ? 0 : l2->bytes_written;
  counters = {};
  RaceDetector* const detector = race_detector().get();
  tracing = detector != nullptr ||
            (record_to != nullptr && (l2 != nullptr || !record_to->regions.empty()));
  std::string error;
  if (detector != nullptr) {
    detector->begin_launch(cached_name(kernel), config.blockDim.x, is_dependent(config));
  }
  try {
    scheduler().run(config, body, context, l2 == nullptr ? nullptr : replay_traces);
  } catch (const std::runtime_error& failure) {
    error = failure.what();
  }
  tracing = false;
  if (detector != nullptr) detector->end_launch();
  if (!error.empty()) {
    for (auto& trace : traces) trace.clear();
    throw std::runtime_error(named(error));
  }
  if (record_to == nullptr) return;

  Record record;
  record.kernel = cached_name(kernel);
  record.grid = config.gridDim.x;
  record.block = config.blockDim.x;
  record.shared_bytes = config.dynamicSmemBytes;
  record.dependent = is_dependent(config);
  record.counters = counters;
  if (l2 != nullptr) {
    record.memory_read = l2->bytes_read - read_before;
    record.memory_written = l2->bytes_written - written_before;
  }
  record_to->records.push_back(std::move(record));
}

void memset(void* address, int value, size_t bytes, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(device_mutex());
  if (const std::string problem = misplaced(stream); !problem.empty()) {
    throw std::runtime_error("memset: " + problem);
  }
  std::memset(address, value, bytes);
  if (RaceDetector* const detector = race_detector().get()) detector->memset(address, bytes);
  Recording* const record_to = recording().get();
  if (record_to == nullptr) return;
  Record record;
  record.kernel = "memset";
  record.memset_bytes = bytes;
  if (L2* const l2 = record_to->l2.get(); l2 != nullptr && bytes > 0) {
    const uint64_t written_before = l2->bytes_written;
    const auto begin = reinterpret_cast<uintptr_t>(address);
    for (uint64_t sector = begin / L2::kSectorBytes;
         sector <= (begin + bytes - 1) / L2::kSectorBytes; ++sector) {
      l2->access(sector, true, false);
    }
    record.memory_written = l2->bytes_written - written_before;
  }
  record_to->records.push_back(std::move(record));
}

void fresh(void* address, size_t bytes) {
  const std::lock_guard<std::mutex> lock(device_mutex());
  if (properties().fill >= 0) std::memset(address, properties().fill, bytes);
  if (RaceDetector* const detector = race_detector().get()) detector->fresh(address, bytes);
}

bool allow_shared_memory(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(device_mutex());
  if (bytes > static_cast<size_t>(properties().shared_bytes)) return false;
  allowed_shared_memory()[kernel] = bytes;
  return true;
}

// ---------------------------------------------------------------------------- the running thread

unsigned atomic_add(unsigned* address, unsigned value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(unsigned) != 0) {
    fault("misaligned atomic access");
  }
  ++counters.atomics;
  if (tracing) trace(address, sizeof(unsigned), kAtomic);
  const unsigned old = *address;
  *address = old + value;
  return old;
}

void fence(Site site) {
  if (RaceDetector* const detector = race_detector().get()) detector->fence(site);
}
void wait_for_previous_launch(Site site) {
  if (RaceDetector* const detector = race_detector().get()) detector->wait(site);
}
void let_next_launch_begin() {
  if (RaceDetector* const detector = race_detector().get()) detector->trigger();
}

void trace(const void* address, size_t bytes, Access access) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (RaceDetector* const detector = race_detector().get()) {
    detector->access_global(address, bytes, access, __builtin_return_address(0));
  }
  if (recording() == nullptr) return;
  Recording& to = *recording();
  for (Region& region : to.regions) {
    if (begin < region.begin || begin >= region.end) continue;
    (is_store(access) ? region.stored : region.loaded) += bytes;
  }
  if (to.l2 == nullptr) return;
  traces[scheduler().thread()].push_back(begin / L2::kSectorBytes << 3 | access);
}

}  // namespace emulation
