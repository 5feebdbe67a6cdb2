// The library of the operators: their schemas, and the kernels for the CPU.
//
// A C++ program that loads this library alone has the forward operators without autograd.
#include "torch_abi.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cuda/plan.h"
#include "operators.h"

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

// The launch plan of the CUDA kernels, for diagnostics and tests on any machine. `question` and the
// answer are int64 vectors on the CPU; cbam_ext/plan.py names their elements.
Tensor launch_plan(const Tensor& question) {
  constexpr int64_t kQuestions = 11;
  STD_TORCH_CHECK(question.is_cpu() && question.is_contiguous() && question.dim() == 1 &&
                      question.size(0) == kQuestions && question.scalar_type() == ScalarType::Long,
                  "_launch_plan: question must be a contiguous CPU tensor of 11 int64");
  const auto* q = static_cast<const int64_t*>(question.const_data_ptr());
  const Problem problem{q[0],
                        q[1],
                        q[2],
                        q[3],
                        1,
                        q[4],
                        static_cast<DType>(q[5]),
                        q[6] != 0 ? Layout::kNHWC : Layout::kNCHW};
  cuda::Device device;
  device.multiprocessors = static_cast<int>(q[8]);
  device.l2_bytes = q[9];
  device.shared_bytes = q[10];
  const cuda::Pass pass = q[7] != 0 ? cuda::Pass::kBackward : cuda::Pass::kForward;
  const cuda::Plan plan = cuda::make_plan(problem, pass, device);
  const int64_t answer[] = {plan.vector,
                            plan.chunk,
                            plan.sweep.lanes,
                            plan.sweep.row_span,
                            plan.sweep.column_span,
                            plan.sweep.row_spans,
                            plan.sweep.column_spans,
                            plan.sweep.blocks,
                            plan.sweep.pixel_spans,
                            plan.sweep.channel_spans,
                            plan.tiling.rows,
                            plan.tiling.columns,
                            plan.tiling.tiles,
                            plan.tiling.staged ? 1 : 0,
                            plan.gate.vector,
                            plan.gate.lanes,
                            plan.gate.channel_span,
                            plan.gate.channel_spans};
  constexpr int64_t kAnswers = sizeof(answer) / sizeof(answer[0]);
  const Tensor result = empty(question, {kAnswers}, ScalarType::Long);
  std::copy_n(answer, kAnswers, static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

int64_t cpu_isa() { return cpu::kernels().isa; }

STABLE_TORCH_LIBRARY(cbam, m) {
  define_operators(m);
  // The instruction set of the CPU kernels: KernelTable::isa.
  m.def("_cpu_isa() -> int");
  m.def("_launch_plan(Tensor question) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CPU, m) {
  implement_operators<Cpu>(m);
  m.impl("_launch_plan", TORCH_BOX(&launch_plan));
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace
}  // namespace cbam
