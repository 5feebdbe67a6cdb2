#include "l2.h"

#include <stdexcept>

namespace emulation {

L2::L2(uint64_t capacity_bytes) : capacity_(static_cast<uint32_t>(capacity_bytes / kSectorBytes)) {
  if (capacity_bytes / kSectorBytes == 0 || capacity_bytes > uint64_t{1} << 36) {
    throw std::invalid_argument("the model of L2 needs a capacity of 32 bytes to 64 GiB");
  }
  while (uint64_t{1} << (64 - shift_) < 2 * uint64_t{capacity_}) --shift_;
  table_.resize(uint64_t{1} << (64 - shift_));
  clear();
}

void L2::access(uint64_t sector, bool write, bool evict_first) {
  const uint64_t mask = table_.size() - 1;
  uint64_t slot = home(sector);
  while (table_[slot] != 0 && nodes_[table_[slot]].sector != sector) slot = (slot + 1) & mask;
  uint32_t node = table_[slot];
  if (node != 0) {
    unlink(node);
  } else {
    if (!write) bytes_read += kSectorBytes;
    if (used_ == capacity_) {
      evict();
      slot = home(sector);  // evicting moves entries of the table
      while (table_[slot] != 0) slot = (slot + 1) & mask;
    }
    node = unused_;
    unused_ = 0;
    if (node == 0) {
      node = static_cast<uint32_t>(nodes_.size());
      nodes_.push_back({});
    }
    nodes_[node].sector = sector;
    nodes_[node].dirty = false;
    table_[slot] = node;
    ++used_;
  }
  nodes_[node].dirty |= write;
  link(node, evict_first);
}

void L2::flush() {
  for (size_t node = kEvictFirst + 1; node < nodes_.size(); ++node) {
    if (nodes_[node].dirty) bytes_written += kSectorBytes;
  }
  clear();
}

void L2::clear() {
  nodes_ = {{0, kKept, kKept, false}, {0, kEvictFirst, kEvictFirst, false}};
  table_.assign(table_.size(), 0);
  used_ = 0;
}

void L2::evict() {
  const bool any_first = nodes_[kEvictFirst].newer != kEvictFirst;
  const uint32_t node = nodes_[any_first ? kEvictFirst : kKept].newer;
  unlink(node);
  forget(nodes_[node].sector);
  if (nodes_[node].dirty) bytes_written += kSectorBytes;
  unused_ = node;
  --used_;
}

// Puts a node at the young end of its ring.
void L2::link(uint32_t node, bool evict_first) {
  const uint32_t ring = evict_first ? kEvictFirst : kKept;
  nodes_[node].newer = ring;
  nodes_[node].older = nodes_[ring].older;
  nodes_[nodes_[ring].older].newer = node;
  nodes_[ring].older = node;
}

void L2::unlink(uint32_t node) {
  nodes_[nodes_[node].older].newer = nodes_[node].newer;
  nodes_[nodes_[node].newer].older = nodes_[node].older;
}

uint64_t L2::home(uint64_t sector) const { return sector * 0x9e3779b97f4a7c15u >> shift_; }

// Takes a sector out of the table and closes the gap, so that no search ends too early.
void L2::forget(uint64_t sector) {
  const uint64_t mask = table_.size() - 1;
  uint64_t gap = home(sector);
  while (nodes_[table_[gap]].sector != sector) gap = (gap + 1) & mask;
  for (uint64_t next = (gap + 1) & mask; table_[next] != 0; next = (next + 1) & mask) {
    const uint64_t wanted = home(nodes_[table_[next]].sector);
    if (((next - wanted) & mask) >= ((next - gap) & mask)) {
      table_[gap] = table_[next];
      gap = next;
    }
  }
  table_[gap] = 0;
}

}  // namespace emulation
