#include <algorithm>

#include "device.h"
#include "emulation/rounds.h"
#undef double

namespace emulation {
namespace {

// Of each thread of the running block; those of another block begin anew.
struct Thread {
  uint64_t block;
  unsigned rounds;
  bool in_round;
};
std::vector<Thread> threads;

Thread& running_thread() {
  const unsigned index = scheduler().thread();
  if (index >= threads.size()) threads.resize(index + 1);
  Thread& thread = threads[index];
  const uint64_t block = launch_count() << 32 | blockIdx.x;
  if (thread.block != block) thread = {block, 0, false};
  return thread;
}

}  // namespace

void begin_round_of_loads() {
  Thread& thread = running_thread();
  if (thread.in_round) return;
  thread.in_round = true;
  counters.rounds = std::max<uint64_t>(counters.rounds, ++thread.rounds);
}

void end_round_of_loads() {
  if (scheduler().is_running()) running_thread().in_round = false;
}

}  // namespace emulation
