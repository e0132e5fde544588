// Statistics, gamma and combination in one launch: the grid waits for itself in between.
//
// The last block to arrive turns the sums into (error, gamma), and into what the host reads, and
// then lets all others go on. That needs every block to be resident, which a cooperative launch
// promises or refuses.
#include "cuda/alignment.cuh"
#include "cuda/combine.cuh"
#include "cuda/launch.h"
#include "cuda/probe.cuh"

namespace dicache::cuda {
namespace {

template <class Format, class Pass>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    probe_and_combine_kernel(const __grid_constant__ typename Pass::Arguments arguments,
                             const __grid_constant__ CombineArguments combination,
                             int64_t blocks_per_sample, void* workspace) {
  using T = typename Format::T;
  // Read before this block arrives: until it has, nobody is let go.
  const unsigned before = threadIdx.x == 0 ? current_round(workspace) : 0;
  const Part part = part_of(blocks_per_sample);
  const bool is_active = arguments.samples.is_active(part.sample);
  typename Format::V sums[Pass::Terms::kSums] = {};
  if (is_active) {
    Pass::template add_up<Format>(arguments, part, sums);
  }
  if (publish(sums, workspace)) {
    // What its other threads wrote, thread 0 has met in a barrier by the end of it.
    conclude<typename Pass::Terms, T>(arguments, workspace, blocks_per_sample);
    if (threadIdx.x == 0) {
      begin_round(workspace, before + 1);
    }
  } else if (threadIdx.x == 0) {
    while (current_round(workspace) == before) {
      wait_for_other_blocks();
    }
  }
  __syncthreads();
  if (part.sample >= arguments.samples.batch) {
    return;  // the block of an empty batch
  }
  combine_part<Format>(combination, part, is_active);
}

template <class Pass>
cudaError_t launch_kernel(const typename Pass::Arguments& arguments,
                          const CombineArguments& combination, const Reduction& reduction) {
  const LaunchPlan& plan = reduction.plan;
  return with_one_dtype(arguments.x.dtype, [&](auto format) {
    return launch_cooperative(reduction.stream, plan.blocks, plan.threads,
                              probe_and_combine_kernel<decltype(format), Pass>, arguments,
                              combination, plan.blocks_per_sample, reduction.workspace);
  });
}

}  // namespace

cudaError_t launch_probe_and_combine(const ProbeArguments& arguments,
                                     const CombineArguments& combination,
                                     const Reduction& reduction) {
  return with_pass(arguments, [&](auto pass) {
    return launch_kernel<decltype(pass)>(arguments, combination, reduction);
  });
}

cudaError_t launch_probe_and_combine(const AlignmentArguments& arguments,
                                     const CombineArguments& combination,
                                     const Reduction& reduction) {
  return launch_kernel<AlignmentPass>(arguments, combination, reduction);
}

}  // namespace dicache::cuda
