// Probe statistics of the verified alignment: one pass over x, p and both window entries that adds
// up the inner products and writes nothing; the last block solves for gamma and its misfit. Both
// entries are read anyway, so no load waits for `newest`, which only chooses in registers.
// dicache/reference.py has the formulas.
#include "cuda/launch.h"
#include "cuda/reduction.cuh"

namespace dicache::cuda {
namespace {

template <class Format>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    alignment_kernel(const __grid_constant__ AlignmentArguments arguments,
                     int64_t blocks_per_sample, void* workspace) {
  using T = typename Format::T;
  const Part part = part_of(blocks_per_sample);
  T sums[AlignmentTerms::kSums] = {};
  if (arguments.samples.is_active(part.sample)) {
    const int newer = arguments.samples.new_entry(part.sample);
    const Sample x = sample_of(arguments.x, part.sample);
    const Sample p = sample_of(arguments.p, part.sample);
    const Sample q0 = sample_of(arguments.q, 0, part.sample);
    const Sample q1 = sample_of(arguments.q, 1, part.sample);
    const auto load = [&](auto width, int64_t index) {
      constexpr int k = decltype(width)::value;
      struct {
        typename Format::template Block<k> x, p, q0, q1;
      } loaded{Format::template load<k>(x, index), Format::template load<k>(p, index),
               Format::template load<k>(q0, index), Format::template load<k>(q1, index)};
      return loaded;
    };
    const auto use = [&](auto width, int64_t, const auto& loaded) {
      constexpr int k = decltype(width)::value;
#pragma unroll
      for (int i = 0; i < k; ++i) {
        const T first = Format::value(loaded.q0, i), second = Format::value(loaded.q1, i);
        AlignmentTerms::add(sums, Format::value(loaded.x, i), Format::value(loaded.p, i),
                            newer == 0 ? second : first, newer == 0 ? first : second);
      }
    };
    const bool aligned = are_aligned(x, p, q0, q1);
    walk<Format, Format::kAtOnce>(part, arguments.samples.size, aligned, load, use);
  }
  if (publish(sums, workspace)) {
    conclude<AlignmentTerms, T>(arguments, workspace, blocks_per_sample);
  }
}

}  // namespace

cudaError_t launch_alignment(const AlignmentArguments& arguments, const Reduction& reduction) {
  const LaunchPlan& plan = reduction.plan;
  return with_format(arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype},
                     [&](auto format) {
                       return launch(reduction.stream, plan.blocks, plan.threads,
                                     alignment_kernel<decltype(format)>, arguments,
                                     plan.blocks_per_sample, reduction.workspace);
                     });
}

}  // namespace dicache::cuda
