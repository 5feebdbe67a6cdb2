#include "shadow.h"

#include <iterator>
#include <tuple>

namespace emulation {
namespace {

bool same_thread(const Point& a, const Point& b) {
  return a.block == b.block && a.thread == b.thread;
}

// Among those of one thread the latest first.
bool precedes(const Point& a, const Point& b) {
  return std::tie(a.block, a.thread, b.fences) < std::tie(b.block, b.thread, a.fences);
}

bool later_of_word(const std::pair<uintptr_t, uint32_t>& a,
                   const std::pair<uintptr_t, uint32_t>& b) {
  return std::tie(a.first, b.second) < std::tie(b.first, a.second);
}

}  // namespace

bool Knowledge::covers(const Entry& e, uintptr_t word) const {
  if (e.access == kAtomic) {
    for (const auto& [seen, count] : atomics) {
      if (seen == word && e.order <= count) return true;
    }
  }
  auto at = std::lower_bound(points.begin(), points.end(), e.block,
                             [](const Point& p, uint32_t block) { return p.block < block; });
  for (; at != points.end() && at->block == e.block; ++at) {
    if (at->covers(e)) return true;
  }
  return false;
}

Known join(const Known& a, const Known& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  // Threads of a block ask the same question one after another.
  static Known last_a, last_b, last;
  if (a == last_a && b == last_b) return last;
  auto both = std::make_shared<Knowledge>();
  both->waited = a->waited || b->waited;
  std::merge(a->points.begin(), a->points.end(), b->points.begin(), b->points.end(),
             std::back_inserter(both->points), precedes);
  both->points.erase(std::unique(both->points.begin(), both->points.end(), same_thread),
                     both->points.end());
  std::merge(a->atomics.begin(), a->atomics.end(), b->atomics.begin(), b->atomics.end(),
             std::back_inserter(both->atomics), later_of_word);
  both->atomics.erase(std::unique(both->atomics.begin(), both->atomics.end(),
                                  [](const auto& x, const auto& y) { return x.first == y.first; }),
                      both->atomics.end());
  last_a = a;
  last_b = b;
  last = both;
  return both;
}

}  // namespace emulation
