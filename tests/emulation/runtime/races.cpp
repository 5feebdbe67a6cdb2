#include "races.h"

#include <algorithm>
#include <cstring>

#include "scheduler.h"

namespace emulation {
namespace {

constexpr uintptr_t kWordBytes = 4;
constexpr size_t kMostConflicts = 2000;  // of different places in the sources

// Whether two accesses to a byte need an order.
bool conflict(const Entry& a, const Entry& b) {
  if ((a.bytes & b.bytes) == 0) return false;
  if (a.access == kAtomic && b.access == kAtomic) return false;
  return is_store(a.access) || is_store(b.access);
}

bool contains(const std::vector<uint32_t>& launches, uint32_t launch) {
  return std::find(launches.begin(), launches.end(), launch) != launches.end();
}

void add(std::vector<uint32_t>& to, const std::vector<uint32_t>& launches) {
  for (const uint32_t launch : launches) {
    if (!contains(to, launch)) to.push_back(launch);
  }
}

}  // namespace

std::unique_ptr<RaceDetector>& race_detector() {
  static std::unique_ptr<RaceDetector> instance;
  return instance;
}

Word& RaceDetector::Shadow::at(uintptr_t word) {
  const uintptr_t page = word / kWords;
  if (page != last_page) {
    auto& found = pages[page];
    if (found == nullptr) found = std::make_unique<std::array<Word, kWords>>();
    last = found.get();
    last_page = page;
  }
  return (*last)[word % kWords];
}

// --------------------------------------------------------------------------------- the host's side

uint32_t RaceDetector::add_launch(const std::string& name, bool is_kernel) {
  launches_.emplace_back();
  launches_.back().name = name;
  launches_.back().is_kernel = is_kernel;
  launches_.back().syncs = &syncs_[name];
  return static_cast<uint32_t>(launches_.size() - 1);
}

void RaceDetector::begin_launch(const std::string& kernel, unsigned threads, bool dependent) {
  launch_ = add_launch(kernel, true);
  Launch& now = launches_[launch_];
  now.dependent = dependent || !active(Sync::kLaunch, {"", 0});
  global_.atomics.clear();
  threads_.assign(threads, {});
  if (!now.dependent) return;
  const Launch& before = launches_[launch_ - 1];
  now.open_at_start = before.open_at_trigger;
  add(now.open_at_start, {launch_ - 1});
  // That the launch before has ended says nothing of the ones before it, unless it waited for them.
  now.open_after_wait = before.waited ? before.open_after_wait : before.open_at_start;
  if (before.is_kernel) return;
  Entry first, second;
  first.launch = launch_ - 1;
  second.launch = launch_;
  report(Finding::kOverlap, false, 0, first, second);
}

void RaceDetector::memset(const void* address, size_t bytes) {
  launch_ = add_launch("memset", false);
  if (active(Sync::kMemset, {"", 0})) write_all(launch_, address, bytes);
}

void RaceDetector::foreign_launch(const std::string& name, const void* address, size_t bytes) {
  write_all(add_launch(name, true), address, bytes);
}

// By one who comes after all before.
void RaceDetector::write_all(uint32_t launch, const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = begin; at < begin + bytes;) {
    const uintptr_t end = std::min(begin + bytes, (at / kWordBytes + 1) * kWordBytes);
    Entry write;
    write.launch = launch;
    write.access = kPlainStore;
    write.bytes = static_cast<uint8_t>(((1u << (end - at)) - 1) << at % kWordBytes);
    Word& word = global_.at(at / kWordBytes);
    if (write.bytes == 0xf) word = {};
    word.writes.push_back(write);
    at = end;
  }
}

void RaceDetector::fresh(const void* address, size_t bytes) {
  fresh_begin_ = reinterpret_cast<uintptr_t>(address);
  fresh_bytes_ = bytes;
  fresh_since_ = static_cast<uint32_t>(launches_.size() - 1);
}

void RaceDetector::remove(Sync what, const std::string& kernel, const std::string& file, int line) {
  std::vector<SyncSite>& sites = syncs_[kernel];
  removed_files_.push_back(std::make_unique<std::string>(file));
  sites.push_back({what, {removed_files_.back()->c_str(), line}, 0, true});
}

// Counts what orders, and says whether it is to.
bool RaceDetector::active(Sync what, Site site) {
  std::vector<SyncSite>& sites = *launches_[launch_].syncs;
  for (SyncSite& known : sites) {
    if (known.what != what || known.site.line != site.line) continue;
    if (known.site.file != site.file && std::strcmp(known.site.file, site.file) != 0) continue;
    ++known.count;
    return !known.removed;
  }
  sites.push_back({what, site, 1, false});
  return true;
}

// ---------------------------------------------------------------------------- the scheduler's side

void RaceDetector::begin_block(unsigned block, const unsigned char* shared, size_t bytes) {
  block_ = block;
  shared_begin_ = reinterpret_cast<uintptr_t>(shared);
  shared_bytes_ = bytes;
  threads_.assign(threads_.size(), {});
  barriers_ = 0;
  warp_syncs_.fill(0);
  news_ = triggered_ = false;
  shared_.atomics.clear();
}

void RaceDetector::end_block() {
  Launch& now = launches_[launch_];
  // It lets the next launch begin by its end, if it has not before.
  const bool waited = std::any_of(threads_.begin(), threads_.end(),
                                  [](const Thread& thread) { return thread.waited; });
  if (!triggered_) add(now.open_at_trigger, waited ? now.open_after_wait : now.open_at_start);
  now.waited = now.waited || waited;
}

void RaceDetector::barrier(Site site) {
  if (!active(Sync::kBarrier, site)) return;
  ++barriers_;
  if (news_) join_threads(0, static_cast<unsigned>(threads_.size()));
  news_ = false;
}

void RaceDetector::sync_warp(unsigned warp, unsigned lanes, Site site) {
  if (!active(Sync::kSyncWarp, site)) return;
  ++warp_syncs_[warp];
  if (news_) join_threads(warp * kWarpThreads, warp * kWarpThreads + lanes);
}

void RaceDetector::join_threads(unsigned begin, unsigned end) {
  Thread all;
  for (unsigned i = begin; i < end; ++i) {
    const Thread& thread = threads_[i];
    all.waited = all.waited || thread.waited;
    all.known = join(all.known, thread.known);
    all.published = join(all.published, thread.published);
    all.observed = join(all.observed, thread.observed);
  }
  for (unsigned i = begin; i < end; ++i) {
    all.fences = threads_[i].fences;
    threads_[i] = all;
  }
}

// ------------------------------------------------------------------------------ the running thread

void RaceDetector::fence(Site site) {
  if (!active(Sync::kFence, site)) return;
  const unsigned self = scheduler().thread();
  Thread& thread = threads_[self];
  thread.known = join(thread.known, thread.observed);
  thread.waited = thread.waited || (thread.known != nullptr && thread.known->waited);
  auto here = std::make_shared<Knowledge>();
  here->points.push_back({block_, barriers_, warp_syncs_[self / kWarpThreads], thread.fences,
                          static_cast<uint16_t>(self)});
  here->waited = thread.waited;
  thread.published = join(thread.known, here);
  ++thread.fences;
  news_ = true;
}

void RaceDetector::wait(Site site) {
  // Of a launch that overlaps with nothing, the wait is for nothing.
  if (!launches_[launch_].dependent || !active(Sync::kWait, site)) return;
  threads_[scheduler().thread()].waited = true;
  news_ = true;
}

void RaceDetector::trigger() {
  if (triggered_) return;  // the first thread of a block does it
  triggered_ = true;
  add(launches_[launch_].open_at_trigger, open());
}

const std::vector<uint32_t>& RaceDetector::open() const {
  const Launch& now = launches_[launch_];
  return threads_[scheduler().thread()].waited ? now.open_after_wait : now.open_at_start;
}

// Whether an earlier launch may still be at work, as far as the running thread knows.
bool RaceDetector::may_run(uint32_t launch) const { return contains(open(), launch); }

void RaceDetector::access_global(const void* address, size_t bytes, Access kind, const void* code) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at - shared_begin_ < shared_bytes_) {  // of an atomic
    access(shared_, at - shared_begin_, bytes, kind, code);
  } else {
    access(global_, at, bytes, kind, code);
  }
}

void RaceDetector::access(Shadow& shadow, uintptr_t address, size_t bytes, Access kind,
                          const void* code) {
  const unsigned self = scheduler().thread();
  Entry now;
  now.launch = launch_;
  now.block = block_;
  now.barriers = barriers_;
  now.warp_syncs = warp_syncs_[self / kWarpThreads];
  now.fences = threads_[self].fences;
  now.thread = static_cast<uint16_t>(self);
  now.access = kind;
  now.read_only = kind == kLdg;
  now.code = code;
  if (kind == kAtomic) note_atomic(shadow, address, now);
  const bool load = !is_store(kind) || kind == kAtomic;
  if (load && &shadow == &global_ && !is_initialised(address, bytes)) {
    report(Finding::kUninitialised, false, address, {}, now);
  }
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t end = std::min(address + bytes, (at / kWordBytes + 1) * kWordBytes);
    now.bytes = static_cast<uint8_t>(((1u << (end - at)) - 1) << at % kWordBytes);
    access(shadow.at(at / kWordBytes), at, now, &shadow == &shared_);
    at = end;
  }
}

void RaceDetector::access(Word& word, uintptr_t at, const Entry& now, bool shared) {
  if (shared) {  // what is there of other blocks was another memory
    const auto other = [&](const std::vector<Entry>& entries) {
      return !entries.empty() &&
             (entries.front().launch != now.launch || entries.front().block != now.block);
    };
    if (other(word.writes)) word.writes.clear();
    if (other(word.reads)) word.reads.clear();
  }
  const bool store = is_store(now.access);
  // Says of an earlier access whether it need not be remembered. An atomic stands for others only:
  // what comes later may conflict with those before it and not with it.
  const auto is_past = [&](const Entry& e) {
    const bool ordered = before(e, at / kWordBytes);
    if (conflict(e, now)) {
      if (!ordered) {
        report(Finding::kRace, shared, at, e, now);
      } else if (!store) {
        check_path(e, now, at);
      } else if (e.read_only && e.launch == now.launch) {
        report(Finding::kReadOnly, shared, at, e, now);
      }
    }
    if (now.access == kAtomic && e.access != kAtomic) return false;
    return store && ordered && (e.bytes & ~now.bytes) == 0;
  };
  const auto forget = [&](std::vector<Entry>& entries) {
    entries.erase(std::remove_if(entries.begin(), entries.end(), is_past), entries.end());
  };
  forget(word.writes);
  if (!store) return note_read(word, now);
  forget(word.reads);
  word.writes.push_back(now);
}

// Reads of a block that come one after another, or that no barrier is between, become one.
void RaceDetector::note_read(Word& word, const Entry& now) const {
  std::vector<Entry>& reads = word.reads;
  if (!reads.empty() && reads.back().launch != now.launch) {
    const auto past = [&](const Entry& e) { return !may_run(e.launch); };
    reads.erase(std::remove_if(reads.begin(), reads.end(), past), reads.end());
  }
  for (auto e = reads.rbegin(); e != reads.rend(); ++e) {
    if (e->launch != now.launch || e->block != now.block) break;
    if (e->bytes != now.bytes) continue;
    const bool read_only = e->read_only || now.read_only;
    const bool same_warp = e->warp() == now.warp() && e->scope != Scope::kBlock;
    const bool later = e->barriers < now.barriers ||
                       (same_warp && e->warp_syncs < now.warp_syncs) ||
                       (e->scope == Scope::kThread && e->thread == now.thread);
    if (later) {
      *e = now;
    } else if (!same_warp) {
      e->scope = Scope::kBlock;
    } else if (e->scope == Scope::kThread) {
      e->scope = Scope::kWarp;
      e->other_thread = now.thread;
      e->other_code = now.code;
    }
    e->read_only = read_only;
    return;
  }
  reads.push_back(now);
}

// The order of atomics on a word is that in which they come; one knows of those before it.
void RaceDetector::note_atomic(Shadow& shadow, uintptr_t address, Entry& now) {
  const uintptr_t word = address / kWordBytes;
  Atomics& atomics = shadow.atomics[word];
  Thread& thread = threads_[now.thread];
  atomics.published = join(atomics.published, thread.published);
  thread.observed = join(thread.observed, atomics.published);
  now.order = ++atomics.count;
  auto seen = std::make_shared<Knowledge>();
  seen->atomics.emplace_back(word, now.order);
  thread.known = join(thread.known, seen);
  news_ = true;
}

// Of a read that is ordered after the write, whether it may still get something older.
void RaceDetector::check_path(const Entry& write, const Entry& read, uintptr_t at) {
  const bool same_launch = write.launch == read.launch;
  if (read.access == kLdg &&
      (same_launch || contains(launches_[launch_].open_at_start, write.launch))) {
    report(Finding::kReadOnly, false, at, write, read);
  } else if (same_launch && write.block != read.block &&
             (read.access == kLdca || read.access == kLdcs)) {
    report(Finding::kStaleL1, false, at, write, read);
  }
}

// Whether anything was written of what is loaded: with a struct comes the padding in it.
bool RaceDetector::is_initialised(uintptr_t address, size_t bytes) {
  if (address - fresh_begin_ >= fresh_bytes_) return true;
  for (uintptr_t word = address / kWordBytes; word * kWordBytes < address + bytes; ++word) {
    const std::vector<Entry>& writes = global_.at(word).writes;
    if (std::any_of(writes.begin(), writes.end(),
                    [&](const Entry& e) { return e.launch > fresh_since_; })) {
      return true;
    }
  }
  return false;
}

bool RaceDetector::before(const Entry& e, uintptr_t word) const {
  if (e.launch != launch_) return !may_run(e.launch);
  const unsigned self = scheduler().thread();
  if (e.block == block_) {
    const Point now{block_, barriers_, warp_syncs_[self / kWarpThreads], e.fences,
                    static_cast<uint16_t>(self)};
    if (now.covers(e)) return true;
  }
  const Known& known = threads_[self].known;
  return known != nullptr && known->covers(e, word);
}

void RaceDetector::report(Finding finding, bool shared, uintptr_t at, Entry first,
                          const Entry& second) {
  // Of the reads of a warp not the one by the thread that now writes. (The first of a block's was
  // in a warp that ran before this one.)
  if (first.scope == Scope::kWarp && first.thread == second.thread) {
    first.thread = first.other_thread;
    first.code = first.other_code;
  }
  const Places places{finding,
                      shared,
                      first.code,
                      second.code,
                      launches_[first.launch].syncs,
                      launches_[second.launch].syncs};
  const auto known = known_conflicts_.find(places);
  if (known != known_conflicts_.end()) {
    ++conflicts_[known->second].count;
  } else if (conflicts_.size() < kMostConflicts) {
    known_conflicts_[places] = conflicts_.size();
    const uintptr_t in_fresh = at - fresh_begin_;
    const bool fresh = !shared && in_fresh < fresh_bytes_;
    conflicts_.push_back({finding, shared, at, in_fresh, fresh, first, second, 1});
  }
}

}  // namespace emulation
