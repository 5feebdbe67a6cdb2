// Runs one launch: block after block, the threads of a block as fibres.
//
// A warp runs until all its lanes wait at the block's barrier or have returned, then the next warp
// runs. Within a warp a lane runs until it waits for the others of its warp (a shuffle,
// __syncwarp), then the next lane runs. A thread that never waits is a plain call, and needs no
// switch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulation/launch.h"
#include "fiber.h"

namespace emulation {

class RaceDetector;

// In which order blocks, warps (anew after every barrier) and lanes (anew after every shuffle) run.
enum class Order { kForward, kReverse, kRandom };

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567) {}
  uint32_t below(uint32_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state_ >> 33) % n);
  }

 private:
  uint64_t state_;
};

class Scheduler {
 public:
  Scheduler();

  void set_order(Order order, uint64_t seed);
  // Of every launch only the first and the last of so many parts of its blocks; 1 for all of them.
  // Where blocks go sample by sample, this runs these samples of a batch that is too big to run.
  // Launches of fewer blocks than parts, which sum over samples, run as a whole.
  void set_end_parts(uint64_t parts) { parts_ = parts; }
  // Throws std::runtime_error with what went wrong, and where. `end_of_round`, if not null, is
  // called where all threads of a block have come to a barrier or to the end; blocks then run in
  // plain order.
  void run(const cudaLaunchConfig_t& config, void (*body)(const void*), const void* context,
           void (*end_of_round)());

  // Called by the running thread.
  void barrier(Site site) { wait(Stop::kBarrier, site); }
  void warp_barrier(Site site) { wait(Stop::kSyncWarp, site); }
  uint64_t exchange(uint64_t value, unsigned source_lane, Site site);
  [[noreturn]] void fault(const std::string& what);

  bool is_running() const { return current_ != kHost; }
  unsigned thread() const { return current_; }
  unsigned char* shared() const { return shared_; }

 private:
  enum class Stop : uint8_t { kNotStarted, kShuffle, kSyncWarp, kBarrier, kReturned };
  struct Thread {
    Fiber* fiber;
    Stop stop;
    Site site;
  };
  static constexpr unsigned kHost = ~0u;  // in place of a thread: nothing is left to run

  static void fiber_main();
  void run_threads();
  void wait(Stop stop, Site site);
  void go(Context& from, unsigned target);

  unsigned next();
  unsigned next_lane();
  unsigned next_round();
  bool next_warp();
  bool next_block();
  void begin_block_round();
  void begin_warp_round();
  const uint8_t* permutation();

  bool same_stop(unsigned begin, unsigned end, unsigned step);
  std::string describe(unsigned thread) const;
  void fail(unsigned thread, const std::string& what);

  void prepare_shared(size_t bytes);
  bool shared_intact() const;

  FiberPool pool_;
  Context host_;
  std::vector<Thread> threads_;
  void (*body_)(const void*) = nullptr;
  const void* body_context_ = nullptr;
  void (*end_of_round_)() = nullptr;
  RaceDetector* detector_ = nullptr;  // null while nobody looks for races
  std::string error_;

  Order order_ = Order::kForward;
  Random random_{0};
  std::vector<uint8_t> permutations_;  // 32 each; the first is used unless the order is random

  uint64_t parts_ = 1, part_ = 1, left_out_ = 0;
  uint64_t blocks_ = 0, block_step_ = 1, blocks_begun_ = 0, block_ = 0;
  unsigned block_threads_ = 0, warps_ = 0;
  const uint8_t* warp_order_ = nullptr;
  const uint8_t* lane_order_ = nullptr;
  unsigned warps_begun_ = 0, lanes_begun_ = 0;  // of this round, in positions of the order
  unsigned warp_ = 0, lanes_ = 0;
  unsigned current_ = kHost;

  // Values of a shuffle. Two sets in turn, because a lane may reach the next shuffle while others
  // have still to read from this one.
  uint64_t exchanged_[2][32];
  unsigned exchange_set_ = 0;

  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  std::vector<unsigned char> shared_storage_;
};

Scheduler& scheduler();

}  // namespace emulation
