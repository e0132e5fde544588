// Probe statistics of the published rules: one pass that adds up the L1 sums and stores p as the
// next step's p_prev; the last block turns the sums into (error, gamma). dicache/reference.py has
// the formulas.
#include "cuda/probe.cuh"

#include "cuda/launch.h"

namespace dicache::cuda {
namespace {

template <class Format, class Pass>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    probe_kernel(const __grid_constant__ ProbeArguments arguments, int64_t blocks_per_sample,
                 void* workspace) {
  using T = typename Format::T;
  const Part part = part_of(blocks_per_sample);
  typename Format::V sums[Pass::Terms::kSums] = {};
  if (arguments.samples.is_active(part.sample)) {
    Pass::template add_up<Format>(arguments, part, sums);
  }
  if (publish(sums, workspace)) {
    conclude<typename Pass::Terms, T>(arguments, workspace, blocks_per_sample);
  }
}

}  // namespace

cudaError_t launch_statistics(const ProbeArguments& arguments, const Reduction& reduction) {
  const LaunchPlan& plan = reduction.plan;
  return with_pass(arguments, [&](auto pass) {
    return with_format(arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype},
                       [&](auto format) {
                         return launch(reduction.stream, plan.blocks, plan.threads,
                                       probe_kernel<decltype(format), decltype(pass)>, arguments,
                                       plan.blocks_per_sample, reduction.workspace);
                       });
  });
}

}  // namespace dicache::cuda
