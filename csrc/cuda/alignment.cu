// Probe statistics of the verified alignment: one pass that adds up the inner products; the last
// block solves for gamma and its misfit. dicache/reference.py has the formulas.
#include "cuda/alignment.cuh"

#include "cuda/launch.h"

namespace dicache::cuda {
namespace {

template <class Format>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    alignment_kernel(const __grid_constant__ AlignmentArguments arguments,
                     int64_t blocks_per_sample, void* workspace) {
  using T = typename Format::T;
  const Part part = part_of(blocks_per_sample);
  typename Format::V sums[AlignmentTerms::kSums] = {};
  if (arguments.samples.is_active(part.sample)) {
    AlignmentPass::add_up<Format>(arguments, part, sums);
  }
  if (publish(sums, workspace)) {
    conclude<AlignmentTerms, T>(arguments, workspace, blocks_per_sample);
  }
}

}  // namespace

cudaError_t launch_statistics(const AlignmentArguments& arguments, const Reduction& reduction) {
  const LaunchPlan& plan = reduction.plan;
  return with_format(arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype},
                     [&](auto format) {
                       return launch(reduction.stream, plan.blocks, plan.threads,
                                     alignment_kernel<decltype(format)>, arguments,
                                     plan.blocks_per_sample, reduction.workspace);
                     });
}

}  // namespace dicache::cuda
