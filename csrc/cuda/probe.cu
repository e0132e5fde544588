// Probe statistics of the published rules: one pass over x, p, p_prev and q_old (and x_prev, q_new
// where the rule asks) that adds up the L1 sums and stores p as the next step's p_prev; the last
// block turns the sums into (error, gamma). dicache/reference.py has the formulas.
#include "cuda/launch.h"
#include "cuda/reduction.cuh"

namespace dicache::cuda {
namespace {

template <class Format, bool kLeastSquares, bool kWithInput>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    probe_kernel(const __grid_constant__ ProbeArguments arguments, int64_t blocks_per_sample,
                 void* workspace) {
  using T = typename Format::T;
  using Terms = ProbeTerms<kLeastSquares, kWithInput>;
  const Part part = part_of(blocks_per_sample);
  T sums[Terms::kSums] = {};
  if (arguments.samples.is_active(part.sample)) {
    const int newer = arguments.samples.new_entry(part.sample);
    const Sample x = sample_of(arguments.x, part.sample);
    const Sample p = sample_of(arguments.p, part.sample);
    const Sample p_prev = sample_of(arguments.p_prev, part.sample);
    const Sample x_prev = kWithInput ? sample_of(arguments.x_prev, part.sample) : x;
    const Sample q_old = sample_of(arguments.q, 1 - newer, part.sample);
    const Sample q_new = kLeastSquares ? sample_of(arguments.q, newer, part.sample) : q_old;
    const auto load = [&](auto width, int64_t index) {
      constexpr int k = decltype(width)::value;
      struct {
        typename Format::template Block<k> x, p, p_prev, x_prev, q_old, q_new;
      } loaded;
      loaded.x = Format::template load<k>(x, index);
      loaded.p = Format::template load<k>(p, index);
      loaded.p_prev = Format::template load<k>(p_prev, index);
      loaded.q_old = Format::template load<k>(q_old, index);
      if constexpr (kWithInput) {
        loaded.x_prev = Format::template load<k>(x_prev, index);
      }
      if constexpr (kLeastSquares) {
        loaded.q_new = Format::template load<k>(q_new, index);
      }
      return loaded;
    };
    const auto use = [&](auto width, int64_t index, const auto& loaded) {
      constexpr int k = decltype(width)::value;
#pragma unroll
      for (int i = 0; i < k; ++i) {
        const T input = Format::value(loaded.x, i), old = Format::value(loaded.q_old, i);
        Terms::add(sums, input, Format::value(loaded.p, i), Format::value(loaded.p_prev, i),
                   kWithInput ? Format::value(loaded.x_prev, i) : input, old,
                   kLeastSquares ? Format::value(loaded.q_new, i) : old);
      }
      Format::store(p_prev, index, loaded.p);
      if constexpr (kWithInput) {
        Format::store(x_prev, index, loaded.x);
      }
    };
    const bool aligned = are_aligned(x, p, p_prev, x_prev, q_old, q_new);
    constexpr int kAtOnce = kWithInput ? 1 : Format::kAtOnce;
    walk<Format, kAtOnce>(part, arguments.samples.size, aligned, load, use);
  }
  if (publish(sums, workspace)) {
    conclude<Terms, T>(arguments, workspace, blocks_per_sample);
  }
}

template <bool kLeastSquares, bool kWithInput>
cudaError_t launch_kernel(const ProbeArguments& arguments, const Reduction& reduction) {
  const LaunchPlan& plan = reduction.plan;
  return with_format(arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype},
                     [&](auto format) {
                       return launch(reduction.stream, plan.blocks, plan.threads,
                                     probe_kernel<decltype(format), kLeastSquares, kWithInput>,
                                     arguments, plan.blocks_per_sample, reduction.workspace);
                     });
}

}  // namespace

cudaError_t launch_probe(const ProbeArguments& arguments, const Reduction& reduction) {
  if (arguments.rule.least_squares) {
    return arguments.with_input ? launch_kernel<true, true>(arguments, reduction)
                                : launch_kernel<true, false>(arguments, reduction);
  }
  return arguments.with_input ? launch_kernel<false, true>(arguments, reduction)
                              : launch_kernel<false, false>(arguments, reduction);
}

}  // namespace dicache::cuda
