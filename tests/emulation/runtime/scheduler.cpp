#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "races.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kRandomPermutations = 256;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 in integers

// Shared memory stands between two margins that must keep their content. Under AddressSanitizer it
// is an allocation of its own, whose surroundings are forbidden.
constexpr size_t kMargin = 1024;
constexpr unsigned char kMarginByte = 0xa5;

Scheduler* const instance = new Scheduler;  // its fibres outlive static destructors

}  // namespace

Scheduler& scheduler() { return *instance; }

Scheduler::Scheduler() : pool_(&Scheduler::fiber_main) { set_order(Order::kForward, 0); }

// ------------------------------------------------------------------------------------- orders

void Scheduler::set_order(Order order, uint64_t seed) {
  order_ = order;
  random_ = Random(seed);
  const unsigned count = order == Order::kRandom ? kRandomPermutations : 1;
  permutations_.resize(count * kWarp);
  for (unsigned i = 0; i < count * kWarp; ++i) {
    permutations_[i] = static_cast<uint8_t>(order == Order::kReverse ? kWarp - 1 - i : i % kWarp);
  }
  if (order != Order::kRandom) return;
  for (unsigned p = 0; p < count; ++p) {
    uint8_t* permutation = &permutations_[p * kWarp];
    for (unsigned i = kWarp - 1; i > 0; --i) {
      std::swap(permutation[i], permutation[random_.below(i + 1)]);
    }
  }
}

// For up to 32 lanes or warps: numbers that do not exist are passed over.
const uint8_t* Scheduler::permutation() {
  const unsigned which = order_ == Order::kRandom ? random_.below(kRandomPermutations) : 0;
  return &permutations_[which * kWarp];
}

// --------------------------------------------------------------------------------------- launch

void Scheduler::run(const cudaLaunchConfig_t& config, void (*body)(const void*),
                    const void* context, void (*end_of_round)()) {
  body_ = body;
  end_of_round_ = end_of_round;
  detector_ = race_detector().get();
  body_context_ = context;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  block_threads_ = config.blockDim.x;
  warps_ = (block_threads_ + kWarp - 1) / kWarp;
  threads_.resize(block_threads_);
  exchange_set_ = 0;
  error_.clear();

  part_ = config.gridDim.x < parts_ ? config.gridDim.x : config.gridDim.x / parts_;
  blocks_ = std::min<uint64_t>(2 * part_, config.gridDim.x);
  left_out_ = config.gridDim.x - blocks_;
  blocks_begun_ = 0;
  // Steps of a size prime to the number of blocks visit each block once.
  const bool random = order_ == Order::kRandom && end_of_round == nullptr;
  block_step_ = random ? 1 + random_.below(static_cast<uint32_t>(blocks_)) : 1;
  while (std::gcd(block_step_, blocks_) != 1) ++block_step_;
  block_ = random ? random_.below(static_cast<uint32_t>(blocks_)) : 0;

  prepare_shared(config.dynamicSmemBytes);
  next_block();
  go(host_, next());
#ifdef EMULATION_ASAN
  std::free(shared_);
#endif
  current_ = kHost;
  if (!error_.empty()) {
    pool_.reset();  // threads are left in the middle of the kernel
    throw std::runtime_error(error_);
  }
}

bool Scheduler::next_block() {
  if (blocks_begun_ == blocks_) return false;
  if (blocks_begun_ > 0) block_ = (block_ + block_step_) % blocks_;
  ++blocks_begun_;
  const bool reverse = order_ == Order::kReverse && end_of_round_ == nullptr;
  const uint64_t block = reverse ? blocks_ - 1 - block_ : block_;
  blockIdx.x = static_cast<unsigned>(block < part_ ? block : block + left_out_);
  if (shared_bytes_ > 0) std::memset(shared_, kPoison, shared_bytes_);
  for (Thread& thread : threads_) thread.stop = Stop::kNotStarted;
  if (detector_ != nullptr) detector_->begin_block(blockIdx.x, shared_, shared_bytes_);
  begin_block_round();
  return true;
}

void Scheduler::begin_block_round() {
  warp_order_ = permutation();
  warps_begun_ = 0;
  lanes_ = 0;
  lanes_begun_ = kWarp;
}

void Scheduler::begin_warp_round() {
  lane_order_ = permutation();
  lanes_begun_ = 0;
  exchange_set_ ^= 1;
}

// The thread that runs now: chosen when another one has stopped, on whatever stack that one has.
inline unsigned Scheduler::next() {
  const unsigned thread = next_lane();
  return thread != kHost ? thread : next_round();
}

inline unsigned Scheduler::next_lane() {
  while (lanes_begun_ < kWarp) {
    const unsigned lane = lane_order_[lanes_begun_++];
    if (lane < lanes_) return warp_ * kWarp + lane;
  }
  return kHost;
}

// All lanes of a warp have stopped: the first thread of whatever comes then.
unsigned Scheduler::next_round() {
  for (;;) {
    if (lanes_ > 0) {
      const unsigned first = warp_ * kWarp;
      if (!same_stop(first, first + lanes_, 1)) break;
      const Stop stop = threads_[first].stop;
      if (stop == Stop::kShuffle || stop == Stop::kSyncWarp) {
        if (detector_ != nullptr && stop == Stop::kSyncWarp) {
          detector_->sync_warp(warp_, lanes_, threads_[first].site);
        }
        begin_warp_round();
        return next_lane();
      }
    }
    if (next_warp()) return next_lane();
    // All warps have stopped, each at one place.
    if (!same_stop(0, block_threads_, kWarp)) break;
    if (end_of_round_ != nullptr) end_of_round_();
    if (threads_[0].stop == Stop::kBarrier) {
      if (detector_ != nullptr) detector_->barrier(threads_[0].site);
      begin_block_round();
      continue;
    }
    if (!shared_intact()) {
      fail(0, "the block wrote outside its shared memory of " + std::to_string(shared_bytes_) +
                  " bytes");
      break;
    }
    if (detector_ != nullptr) detector_->end_block();
    if (!next_block()) break;
  }
  return kHost;
}

bool Scheduler::next_warp() {
  while (warps_begun_ < kWarp) {
    warp_ = warp_order_[warps_begun_++];
    if (warp_ >= warps_) continue;
    lanes_ = std::min(kWarp, block_threads_ - warp_ * kWarp);
    begin_warp_round();
    return true;
  }
  return false;
}

// -------------------------------------------------------------------------------------- threads

void Scheduler::fiber_main() { scheduler().run_threads(); }

void Scheduler::run_threads() {
  for (;;) {
    const unsigned thread = current_;
    threadIdx.x = thread;
    body_(body_context_);
    threads_[thread].stop = Stop::kReturned;
    Fiber* fiber = threads_[thread].fiber;
    const unsigned target = next();
    if (target != kHost && threads_[target].stop == Stop::kNotStarted) {
      threads_[target].fiber = fiber;  // goes on here
      current_ = target;
      continue;
    }
    pool_.give(fiber);
    go(fiber->context, target);
  }
}

inline void Scheduler::wait(Stop stop, Site site) {
  const unsigned self = current_;
  threads_[self].stop = stop;
  threads_[self].site = site;
  const unsigned target = next();
  if (target != self) go(threads_[self].fiber->context, target);
  threadIdx.x = self;
}

// Leaves `from`; returns when it is its turn again.
inline void Scheduler::go(Context& from, unsigned target) {
  if (target == kHost) {
    switch_context(from, host_);
    return;
  }
  if (threads_[target].stop == Stop::kNotStarted) threads_[target].fiber = pool_.take();
  current_ = target;
  switch_context(from, threads_[target].fiber->context);
}

inline uint64_t Scheduler::exchange(uint64_t value, unsigned source_lane, Site site) {
  const unsigned set = exchange_set_;
  if (source_lane >= lanes_) {
    fault("shuffle from lane " + std::to_string(source_lane) + ", which the block does not have");
  }
  exchanged_[set][current_ % kWarp] = value;
  wait(Stop::kShuffle, site);
  return exchanged_[set][source_lane];
}

// --------------------------------------------------------------------------------------- errors

void Scheduler::fail(unsigned thread, const std::string& what) {
  error_ =
      "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread) + ": " + what;
}

void Scheduler::fault(const std::string& what) {
  fail(current_, what);
  switch_context(threads_[current_].fiber->context, host_);
  std::abort();  // nobody comes back
}

// Whether these threads stopped at the same place; otherwise says so in error_.
bool Scheduler::same_stop(unsigned begin, unsigned end, unsigned step) {
  const Thread& first = threads_[begin];
  for (unsigned i = begin + step; i < end; i += step) {
    const Thread& other = threads_[i];
    bool same = first.stop == other.stop;
    if (same && first.stop != Stop::kReturned) {
      same = first.site.line == other.site.line &&
             (first.site.file == other.site.file ||
              std::strcmp(first.site.file, other.site.file) == 0);
    }
    if (same) continue;
    const auto meets_warp = [](Stop stop) {
      return stop == Stop::kShuffle || stop == Stop::kSyncWarp;
    };
    const bool warp = meets_warp(first.stop) || meets_warp(other.stop);
    fail(i, std::string(warp ? "lanes of a warp miss a shuffle or __syncwarp: "
                             : "divergent barrier: ") +
                "it " + describe(i) + " while thread " + std::to_string(begin) + " " +
                describe(begin));
    return false;
  }
  return true;
}

std::string Scheduler::describe(unsigned thread) const {
  const Stop stop = threads_[thread].stop;
  if (stop == Stop::kReturned) return "has returned";
  const char* what = stop == Stop::kShuffle    ? "is in a shuffle"
                     : stop == Stop::kSyncWarp ? "is in __syncwarp"
                                               : "is in __syncthreads";
  const Site site = threads_[thread].site;
  const char* slash = std::strrchr(site.file, '/');
  return std::string(what) + " at " + (slash == nullptr ? site.file : slash + 1) + ":" +
         std::to_string(site.line);
}

// -------------------------------------------------------------------------------- shared memory

void Scheduler::prepare_shared(size_t bytes) {
  shared_bytes_ = bytes;
#ifdef EMULATION_ASAN
  shared_ = static_cast<unsigned char*>(std::malloc(bytes));
#else
  const size_t needed = 2 * kMargin + bytes + 16;
  if (shared_storage_.size() < needed) shared_storage_.resize(needed);
  auto address = reinterpret_cast<uintptr_t>(shared_storage_.data()) + kMargin;
  shared_ = reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
  std::memset(shared_ - kMargin, kMarginByte, kMargin);
  std::memset(shared_ + bytes, kMarginByte, kMargin);
#endif
}

bool Scheduler::shared_intact() const {
#ifndef EMULATION_ASAN
  for (size_t i = 0; i < kMargin; i += sizeof(uint64_t)) {
    uint64_t before, after;
    std::memcpy(&before, shared_ - kMargin + i, sizeof(before));
    std::memcpy(&after, shared_ + shared_bytes_ + i, sizeof(after));
    if ((before & after) != 0xa5a5a5a5a5a5a5a5u || (before | after) != 0xa5a5a5a5a5a5a5a5u) {
      return false;
    }
  }
#endif
  return true;
}

// ------------------------------------------------------------------- what intrinsics.h declares

unsigned char* shared_memory() { return instance->shared(); }
void barrier(Site site) { instance->barrier(site); }
void warp_barrier(Site site) { instance->warp_barrier(site); }
uint64_t exchange(uint64_t value, unsigned source_lane, Site site) {
  return instance->exchange(value, source_lane, site);
}
void fault(const char* what) { instance->fault(what); }

}  // namespace emulation
