// Probe statistics of the verified alignment: one pass over x, p, q_old and q_new that adds up the
// inner products and writes nothing; the last block solves for gamma and its misfit.
// dicache/reference.py has the formulas.
#include <initializer_list>

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
    const Sample q_old = sample_of(arguments.q, 1 - newer, part.sample);
    const Sample q_new = sample_of(arguments.q, newer, part.sample);
    const auto load = [&](auto width, int64_t index) {
      constexpr int k = decltype(width)::value;
      struct {
        typename Format::template Block<k> x, p, q_old, q_new;
      } loaded{Format::template load<k>(x, index), Format::template load<k>(p, index),
               Format::template load<k>(q_old, index), Format::template load<k>(q_new, index)};
      return loaded;
    };
    const auto use = [&](auto width, int64_t, const auto& loaded) {
      constexpr int k = decltype(width)::value;
#pragma unroll
      for (int i = 0; i < k; ++i) {
        AlignmentTerms::add(sums, Format::value(loaded.x, i), Format::value(loaded.p, i),
                            Format::value(loaded.q_old, i), Format::value(loaded.q_new, i));
      }
    };
    walk<Format, Format::kAtOnce>(part, arguments.samples.size, are_aligned(x, p, q_old, q_new), load, use);
  }
  if (publish(sums, workspace)) {
    conclude<AlignmentTerms, T>(arguments, workspace, blocks_per_sample);
  }
}

}  // namespace

cudaError_t launch_alignment(const AlignmentArguments& arguments, const Reduction& reduction) {
  const auto& plan = reduction.plan;
  return with_format(
      arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype}, [&](auto format) {
        alignment_kernel<decltype(format)><<<plan.blocks, kGpuThreads, 0, reduction.stream>>>(
            arguments, plan.blocks_per_sample, reduction.workspace);
        return cudaGetLastError();
      });
}

}  // namespace dicache::cuda
