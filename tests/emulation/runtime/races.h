// Finds accesses to device memory that nothing puts in an order, whatever order they came in here.
//
// Within a block barriers order, within a warp __syncwarp (a shuffle hands on a value and promises
// nothing of memory). Between blocks of a launch there is an order only through an atomic: what
// precedes a __threadfence before it is ordered before what follows a __threadfence after a later
// atomic on the same word. A launch comes after all that was launched before, unless it may overlap
// (programmatic dependent launch): then only behind its wait, and it may begin as soon as each
// block of the launch before it has triggered or ended.
//
// Global memory is seen through the intrinsics; shared memory where kernels are compiled with
// -fsanitize=thread, whose callbacks (instrumentation.cpp) come here in place of its library.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "shadow.h"

namespace emulation {

enum class Finding { kRace, kStaleL1, kReadOnly, kUninitialised, kOverlap };

// What puts accesses in an order. Each place of one can be taken away, to see what it is for: it
// still happens, so that values stay right, and orders nothing.
enum class Sync { kBarrier, kSyncWarp, kFence, kWait, kLaunch, kMemset };

struct SyncSite {
  Sync what;
  Site site;
  uint64_t count = 0;
  bool removed = false;
};

struct Conflict {
  Finding finding;
  bool shared;
  uintptr_t address;   // in shared memory from its beginning
  uintptr_t in_fresh;  // from the beginning of what was handed out, if it lies in there
  bool fresh;
  Entry first, second;
  uint64_t count = 0;
};

class RaceDetector {
 public:
  // The host's side.
  void begin_launch(const std::string& kernel, unsigned threads, bool dependent);
  void end_launch() { shared_begin_ = shared_bytes_ = 0; }
  void memset(const void* address, size_t bytes);
  // A launch of somebody else, which writes this memory.
  void foreign_launch(const std::string& name, const void* address, size_t bytes);
  // Workspace of a call, of which nothing may be read before it is written.
  void fresh(const void* address, size_t bytes);
  void remove(Sync what, const std::string& kernel, const std::string& file, int line);

  // The scheduler's: all threads of a block, or lanes of a warp, have come to the same place.
  void begin_block(unsigned block, const unsigned char* shared, size_t bytes);
  void end_block();
  void barrier(Site site);
  void sync_warp(unsigned warp, unsigned lanes, Site site);

  // The running thread's.
  void fence(Site site);
  void wait(Site site);
  void trigger();
  void access_global(const void* address, size_t bytes, Access access, const void* code);
  void access_shared(uintptr_t address, size_t bytes, bool write, const void* code) {
    if (address - shared_begin_ >= shared_bytes_) return;
    access(shared_, address - shared_begin_, bytes, write ? kPlainStore : kPlainLoad, code);
  }

  const std::vector<Conflict>& conflicts() const { return conflicts_; }
  const std::map<std::string, std::vector<SyncSite>>& syncs() const { return syncs_; }
  const std::string& kernel(uint32_t launch) const { return launches_[launch].name; }

 private:
  struct Launch {
    std::string name;
    std::vector<SyncSite>* syncs = nullptr;  // of all launches of that name
    bool is_kernel = false, dependent = false, waited = false;
    // Earlier launches that may still be at work: at its beginning, behind its wait, and when it
    // lets the next one begin.
    std::vector<uint32_t> open_at_start, open_after_wait, open_at_trigger;
  };
  struct Thread {
    uint32_t fences = 0;
    bool waited = false;
    Known known;      // what is ordered before
    Known published;  // what was known at its last fence, or at one ordered before: for an atomic
    Known observed;   // what atomics have brought: known after the next fence
  };
  struct Atomics {  // on one word, in this launch
    Known published;
    uint32_t count = 0;
  };
  // Words of memory that begins anywhere, in pages.
  struct Shadow {
    static constexpr size_t kWords = 1024;
    std::unordered_map<uintptr_t, std::unique_ptr<std::array<Word, kWords>>> pages;
    uintptr_t last_page = ~uintptr_t{0};
    std::array<Word, kWords>* last = nullptr;
    std::unordered_map<uintptr_t, Atomics> atomics;  // of this launch, or block
    Word& at(uintptr_t word);
  };

  uint32_t add_launch(const std::string& name, bool is_kernel);
  void write_all(uint32_t launch, const void* address, size_t bytes);
  bool active(Sync what, Site site);
  void join_threads(unsigned begin, unsigned end);

  void access(Shadow& shadow, uintptr_t address, size_t bytes, Access access, const void* code);
  void access(Word& word, uintptr_t at, const Entry& now, bool shared);
  void note_read(Word& word, const Entry& now) const;
  void note_atomic(Shadow& shadow, uintptr_t address, Entry& now);
  void check_path(const Entry& write, const Entry& read, uintptr_t at);
  bool is_initialised(uintptr_t address, size_t bytes);
  bool before(const Entry& e, uintptr_t word) const;
  bool may_run(uint32_t launch) const;
  const std::vector<uint32_t>& open() const;
  void report(Finding finding, bool shared, uintptr_t at, Entry first, const Entry& second);

  std::vector<Launch> launches_{1};  // number 0 is none
  uint32_t launch_ = 0, block_ = 0;
  std::map<std::string, std::vector<SyncSite>> syncs_;       // of each kernel
  std::vector<std::unique_ptr<std::string>> removed_files_;  // their names, for the sites

  std::vector<Thread> threads_;
  uint32_t barriers_ = 0;
  std::array<uint32_t, 32> warp_syncs_{};
  bool news_ = false;       // a thread knows what others may not
  bool triggered_ = false;  // the block has

  Shadow global_, shared_;
  uintptr_t shared_begin_ = 0;
  size_t shared_bytes_ = 0;
  uintptr_t fresh_begin_ = 0;
  size_t fresh_bytes_ = 0;
  uint32_t fresh_since_ = 0;  // the last launch that has nothing to do with it

  using Places = std::tuple<Finding, bool, const void*, const void*, const std::vector<SyncSite>*,
                            const std::vector<SyncSite>*>;
  std::vector<Conflict> conflicts_;
  std::map<Places, size_t> known_conflicts_;
};

// Null while nobody looks for races. The caller holds the device's mutex, or is the running thread.
std::unique_ptr<RaceDetector>& race_detector();

}  // namespace emulation
