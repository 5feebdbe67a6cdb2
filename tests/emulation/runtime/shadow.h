// What is remembered of memory and of who knows what, to tell whether two accesses are ordered.
//
// An access carries the times at which it was made: how many barriers its block had passed, how
// many __syncwarp its warp, how many fences its thread. Of threads of one block these three numbers
// say which of two accesses comes first. Between blocks of a launch nothing does but an atomic
// after a fence, which hands on a Knowledge.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "emulation/intrinsics.h"

namespace emulation {

constexpr unsigned kWarpThreads = 32;

inline bool is_store(Access access) {
  return access == kStwb || access == kStcs || access == kAtomic || access == kPlainStore;
}

// Reads that nothing is between are remembered as one: of a thread, of some in a warp or a block.
enum class Scope : uint8_t { kThread, kWarp, kBlock };

// An access to some bytes of a word.
struct Entry {
  uint32_t launch = 0, block = 0;
  uint32_t barriers = 0, warp_syncs = 0, fences = 0;
  uint32_t order = 0;  // of an atomic: its number among those of the word in the launch, from 1 on
  uint16_t thread = 0;
  uint8_t bytes = 0;  // a bit for each
  Access access = kPlainLoad;
  Scope scope = Scope::kThread;
  bool read_only = false;  // through __ldg, or one of the reads that it stands for was
  const void* code = nullptr;
  // Of several reads of a warp, the second.
  uint16_t other_thread = 0;
  const void* other_code = nullptr;

  unsigned warp() const { return thread / kWarpThreads; }
};

// Four bytes of memory. What is ordered before a later access that conflicts with all that it
// conflicts with is forgotten, so lists are short, but for what many blocks read.
struct Word {
  std::vector<Entry> writes, reads;
};

// A fence of a thread: all that the thread had done, and that was ordered before, comes before it.
struct Point {
  uint32_t block, barriers, warp_syncs, fences;
  uint16_t thread;

  bool covers(const Entry& e) const {
    if (e.barriers < barriers) return true;
    if (e.scope == Scope::kBlock || e.warp() != thread / kWarpThreads) return false;
    if (e.warp_syncs < warp_syncs) return true;
    return e.scope == Scope::kThread && e.thread == thread && e.fences <= fences;
  }
};

// What is ordered before some moment of a thread, beyond its own block: fences of other blocks of
// the launch. A later fence of a thread covers its earlier ones.
struct Knowledge {
  std::vector<Point> points;                            // by block and thread, one for each
  std::vector<std::pair<uintptr_t, uint32_t>> atomics;  // how many of a word came before
  bool waited = false;                                  // for the launches before

  bool covers(const Entry& e, uintptr_t word) const;
};

// Shared by all who know the same; null for nothing.
using Known = std::shared_ptr<const Knowledge>;

Known join(const Known& a, const Known& b);

}  // namespace emulation
