// All CPU kernels for one instruction set.
//
// A translation unit (isa_*.cpp) switches the compiler to the set (isa_begin.h) and includes this
// file, so that everything here is compiled once per set in a namespace of its own.

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "cbam_ext needs IEEE arithmetic for NaN and exact ties: build without -ffast-math and -Ofast"
#endif

namespace cbam::cpu::CBAM_ISA {
namespace {

#include "simd.h"

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

#include "tiles.h"
#include "arena.h"
#include "sample.h"
#include "grads.h"
#include "nchw.h"
#include "nhwc.h"
#include "mlp.h"
#include "convolution.h"
#include "parameter_grads.h"
#include "forward.h"
#include "apply_backward.h"
#include "backward.h"

// Calls f(storage type, sweeps) for the problem's dtype and layout.
template <class F>
void with_kernels(const Problem& problem, F&& f) {
  const auto with_layout = [&](auto storage) {
    using S = decltype(storage);
    if (problem.layout == Layout::kNCHW) return f(storage, Nchw<S>{});
    return f(storage, Nhwc<S>{});
  };
  with_storage<BFloat16, Half>(problem.dtype, with_layout);
}

}  // namespace

// constexpr: an initialiser that runs at load would fault on machines without the instruction set.
extern constexpr KernelTable kTable = {
    CBAM_ISA_LEVEL,
    [](const ForwardArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        forward<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const ApplyArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        apply<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const ApplyBackwardArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        apply_backward<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const BackwardArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        backward<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const PoolArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        pool<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const ChannelStatsArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        channel_stats<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const ChannelStatsBackwardArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        channel_stats_backward<decltype(storage), decltype(sweeps)>(args);
      });
    },
    [](const PoolBackwardArgs& args) {
      with_kernels(args.problem, [&](auto storage, auto sweeps) {
        pool_backward<decltype(storage), decltype(sweeps)>(args);
      });
    },
};

}  // namespace cbam::cpu::CBAM_ISA
