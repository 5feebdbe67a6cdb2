// A model of the L2 cache, to count what a sequence of launches reads from and writes to memory.
//
// Sectors of 32 bytes, fully associative, the least recently used leaves first; a sector whose last
// access asked to be evicted first leaves before all others. Writing fetches nothing, and a written
// sector costs 32 bytes when it leaves or is flushed.
//
// A GPU runs many blocks at once, here they come one after another; the model therefore takes them
// in plain order, as a GPU hands them out. Within a block the accesses of all threads between two
// barriers are sorted as lockstep would issue them: the first of each thread, then the second, ...
#pragma once

#include <cstdint>
#include <vector>

namespace emulation {

class L2 {
 public:
  explicit L2(uint64_t capacity_bytes);

  void access(uint64_t sector, bool write, bool evict_first);
  void flush();

  uint64_t bytes_read = 0;     // from memory
  uint64_t bytes_written = 0;  // to memory

  static constexpr unsigned kSectorBytes = 32;

 private:
  struct Node {
    uint64_t sector;
    uint32_t older, newer;
    bool dirty;
  };

  void clear();
  void evict();
  void link(uint32_t node, bool evict_first);
  void unlink(uint32_t node);
  uint64_t home(uint64_t sector) const;
  void forget(uint64_t sector);

  // Two rings of nodes around a sentinel each; the sentinel's `newer` is the oldest of the ring.
  static constexpr uint32_t kKept = 0, kEvictFirst = 1;
  uint32_t capacity_;
  uint32_t used_ = 0;
  uint32_t unused_ = 0;  // the node of the sector that was just evicted, or 0
  std::vector<Node> nodes_;
  // Open addressing with linear probing: numbers of nodes, 0 where there is none.
  std::vector<uint32_t> table_;
  unsigned shift_ = 60;
};

}  // namespace emulation
