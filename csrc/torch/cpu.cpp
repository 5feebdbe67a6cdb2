// The library of the operators: their registration, and that of the kernels for the CPU.
//
// A C++ program that loads this library alone has the forward operators without autograd.
#include "abi.h"

#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "operators.h"
#include "schemas.h"

namespace cbam {
namespace {

struct Cpu {
  static constexpr int64_t kAlignment = 1;
  struct Scope {
    explicit Scope(const Tensor&) {}
  };
  static void run(const Tensor&, const ForwardArgs& args) {
    prepare(args.problem, args.output);
    cpu::kernels().forward(args);
  }
  static void run(const Tensor&, const ApplyArgs& args) {
    prepare(args.problem, args.output);
    cpu::kernels().apply(args);
  }
  static void run(const Tensor&, const ApplyBackwardArgs& args) {
    cpu::kernels().apply_backward(args);
  }
  static void run(const Tensor&, const BackwardArgs& args) {
    prepare(args.problem, args.grad_input);
    cpu::kernels().backward(args);
  }
  static void run(const Tensor&, const PoolArgs& args) { cpu::kernels().pool(args); }
  static void run(const Tensor&, const ChannelStatsArgs& args) {
    cpu::kernels().channel_stats(args);
  }
  static void run(const Tensor&, const ChannelStatsBackwardArgs& args) {
    cpu::kernels().channel_stats_backward(args);
  }
  static void run(const Tensor&, const PoolBackwardArgs& args) {
    prepare(args.problem, args.grad_input);
    cpu::kernels().pool_backward(args);
  }

 private:
  // `written`: a feature map, or null.
  static void prepare(const Problem& p, void* written) {
    if (written == nullptr) return;
    cpu::prefer_huge_pages(written, p.n * p.c * p.pixels() * element_size(p.dtype));
  }
};

int64_t cpu_isa() { return cpu::kernels().isa; }

int64_t use_cpu_isa(int64_t isa) {
  const cpu::KernelTable* before = cpu::use_kernels(isa);
  STD_TORCH_CHECK(before != nullptr, "_use_cpu_isa: this machine has no instruction set ", isa,
                  " (0 is generic, 1 AVX2, 2 AVX-512)");
  return before->isa;
}

}  // namespace

bool is_first_cpu_copy() {
  // The instruction set of the CPU kernels: KernelTable::isa.
  static const FirstCopy first("_cpu_isa() -> int");
  return static_cast<bool>(first);
}

namespace {

STABLE_TORCH_LIBRARY_FRAGMENT(cbam, m) {
  if (!is_first_cpu_copy()) return;
  define_operators(m);
  // Chooses another for all calls to come, of every thread, and returns the one that was in use.
  m.def("_use_cpu_isa(int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CPU, m) {
  if (is_first_cpu_copy()) implement_operators<Cpu>(m);
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CompositeExplicitAutograd, m) {
  if (!is_first_cpu_copy()) return;
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_use_cpu_isa", TORCH_BOX(&use_cpu_isa));
}

}  // namespace
}  // namespace cbam
