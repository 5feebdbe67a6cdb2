#include "host.h"

#include <map>
#include <memory>
#include <stdexcept>

namespace emulation {
namespace {

// No tensor is there: where nobody makes the device of a tensor the current one, it shows.
constexpr int kElsewhere = 63;

struct Stream {
  int device;
};

struct Thread {
  int device = kElsewhere;
  int scopes = 0;
  int calls_until_failure = -1;  // negative: none fails
  cudaError_t error = cudaSuccess;
  std::map<int, std::unique_ptr<Stream>> streams;
};

Thread& thread() {
  static thread_local Thread instance;
  return instance;
}

bool demanded = false;

}  // namespace

DeviceScope::DeviceScope(int device) : before_(thread().device) {
  thread().device = device;
  ++thread().scopes;
}

DeviceScope::~DeviceScope() {
  thread().device = before_;
  --thread().scopes;
}

bool demand_scopes() { return demanded = true; }

void* current_stream(int device) {
  std::unique_ptr<Stream>& stream = thread().streams[device];
  if (stream == nullptr) stream.reset(new Stream{device});
  return stream.get();
}

void expect_device(int device, const std::string& what) {
  if (device == thread().device) return;
  throw std::runtime_error(what + " " + std::to_string(device) + ", but the current device is " +
                           std::to_string(thread().device));
}

std::string misplaced(cudaStream_t stream) {
  if (!demanded) return {};
  if (thread().scopes == 0) return "no device guard is alive";
  if (stream == nullptr) return "on the NULL stream, and not on the current one";
  if (reinterpret_cast<void*>(stream) != current_stream(thread().device)) {
    return "on a stream that is not the current one of the current device";
  }
  return {};
}

int scopes() { return thread().scopes; }

void fail_call_after(int others) { thread().calls_until_failure = others; }

cudaError_t left_error() { return thread().error; }

cudaError_t begin_call() {
  int& left = thread().calls_until_failure;
  if (left < 0 || left-- > 0) return cudaSuccess;
  return thread().error = cudaErrorInvalidConfiguration;
}

cudaError_t take_error() {
  const cudaError_t error = thread().error;
  thread().error = cudaSuccess;
  return error;
}

}  // namespace emulation
