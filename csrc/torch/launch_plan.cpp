// The launch plan of the CUDA kernels as an operator: diagnostics, on any machine.
#include "abi.h"

#include <algorithm>

#include "../cuda/plan.h"

namespace cbam {
namespace {

// `question` and the answer are int64 vectors on the CPU; the Python side names their elements.
Tensor launch_plan(const Tensor& question) {
  constexpr int64_t kQuestions = 10;
  STD_TORCH_CHECK(question.is_cpu() && question.is_contiguous() && question.dim() == 1 &&
                      question.size(0) == kQuestions && question.scalar_type() == ScalarType::Long,
                  "_launch_plan: question must be a contiguous CPU tensor of 10 int64");
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
  const cuda::Pass pass = q[7] != 0 ? cuda::Pass::kBackward : cuda::Pass::kForward;
  const cuda::Plan plan = cuda::make_plan(problem, pass, device);
  const int64_t answer[] = {plan.vector,
                            plan.chunk,
                            plan.sweep.down.lanes,
                            plan.sweep.row_span,
                            plan.sweep.column_span,
                            plan.sweep.row_spans,
                            plan.sweep.column_spans,
                            plan.sweep.blocks,
                            plan.sweep.pixel_spans,
                            plan.sweep.channel_spans,
                            plan.mlp.span,
                            plan.mlp.blocks,
                            plan.tiling.rows,
                            plan.tiling.columns,
                            plan.tiling.tiles,
                            plan.tiling.staged ? 1 : 0};
  constexpr int64_t kAnswers = sizeof(answer) / sizeof(answer[0]);
  const Tensor result = empty(question, {kAnswers}, ScalarType::Long);
  std::copy_n(answer, kAnswers, static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(cbam, m) {
  if (is_first_cpu_copy()) m.def("_launch_plan(Tensor question) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cbam, CPU, m) {
  if (is_first_cpu_copy()) m.impl("_launch_plan", TORCH_BOX(&launch_plan));
}

}  // namespace
}  // namespace cbam
