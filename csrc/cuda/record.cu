// Record residuals: one pass over x, p, y and q_new that writes r = y - x and q = p - x over the
// older window entry and adds up what the next step's gamma needs; the last block stores these sums
// and turns `newest`. dicache/reference.py has the formulas.
#include "cuda/launch.h"
#include "cuda/reduction.cuh"

namespace dicache::cuda {
namespace {

// The last block's work: every other one has read `newest` by now.
template <class T>
__device__ __forceinline__ void conclude_record(const RecordArguments& arguments, void* workspace,
                                                int64_t blocks_per_sample) {
  const int64_t batch = arguments.samples.batch;
  for (int64_t first = 0; first < batch; first += kWarps) {
    const int count = samples_at_once(first, batch), thread = threadIdx.x;
    double totals[RecordTerms::kSums];
    add_partials<RecordTerms::kSums, T>(totals, workspace, first, count, blocks_per_sample);
    if (thread < count && arguments.samples.is_active(first + thread)) {
      finish_record(arguments, first + thread, totals);
    }
    __syncthreads();
  }
}

// x and p may be parked in the very slots that are written: a thread loads its elements of every
// tensor before it stores any of them, and no other thread touches these elements.
template <class Format, bool kFirst>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    record_kernel(const __grid_constant__ RecordArguments arguments, int64_t blocks_per_sample,
                  void* workspace) {
  using T = typename Format::T;
  using V = typename Format::V;
  const Part part = part_of(blocks_per_sample);
  V sums[RecordTerms::kSums] = {};
  if (arguments.samples.is_active(part.sample)) {
    const int newer = arguments.samples.new_entry(part.sample);
    const Sample x = sample_of(arguments.x, part.sample);
    const Sample p = sample_of(arguments.p, part.sample);
    const Sample y = sample_of(arguments.y, part.sample);
    const Sample r_slot = sample_of(arguments.r, 1 - newer, part.sample);
    const Sample q_slot = sample_of(arguments.q, 1 - newer, part.sample);
    const Sample r_other = sample_of(arguments.r, newer, part.sample);
    const Sample q_other = sample_of(arguments.q, newer, part.sample);
    const auto load = [&](auto width, int64_t index) {
      constexpr int k = decltype(width)::value;
      struct {
        typename Format::template Block<k> x, p, y, q_other;
      } loaded;
      loaded.x = Format::template load<k>(x, index);
      loaded.p = Format::template load<k>(p, index);
      loaded.y = Format::template load<k>(y, index);
      if constexpr (!kFirst) {
        loaded.q_other = Format::template load<k>(q_other, index);
      }
      return loaded;
    };
    const auto use = [&](auto width, int64_t index, const auto& loaded) {
      constexpr int k = decltype(width)::value;
      T r[k], q[k];
#pragma unroll
      for (int i = 0; i < k; i += Format::kLanes) {
        const V input = Format::values(loaded.x, i);
        set(r, i, Format::values(loaded.y, i) - input);
        set(q, i, Format::values(loaded.p, i) - input);
      }
      Format::round_and_store(r_slot, index, r);
      Format::round_and_store(q_slot, index, q);
      if constexpr (kFirst) {
        Format::round_and_store(r_other, index, r);
        Format::round_and_store(q_other, index, q);
      }
#pragma unroll
      for (int i = 0; i < k; i += Format::kLanes) {
        // A first entry lies in both places: d is zero.
        const V of_probe = get<V>(q, i);
        const V previous = kFirst ? of_probe : Format::values(loaded.q_other, i);
        RecordTerms::add(sums, of_probe, previous, get<V>(r, i));
      }
    };
    const bool aligned = are_aligned(x, p, y, r_slot, q_slot, r_other, q_other);
    walk<Format, Format::kAtOnce>(part, arguments.samples.size, aligned, load, use);
  }
  if (publish(sums, workspace)) {
    conclude_record<T>(arguments, workspace, blocks_per_sample);
  }
}

template <bool kFirst>
cudaError_t launch_kernel(const RecordArguments& arguments, const Reduction& reduction) {
  const LaunchPlan& plan = reduction.plan;
  return with_format(arguments.samples.is_wide,
                     {arguments.x.dtype, arguments.p.dtype, arguments.y.dtype}, [&](auto format) {
                       return launch(reduction.stream, plan.blocks, plan.threads,
                                     record_kernel<decltype(format), kFirst>, arguments,
                                     plan.blocks_per_sample, reduction.workspace);
                     });
}

}  // namespace

cudaError_t launch_record(const RecordArguments& arguments, const Reduction& reduction) {
  return arguments.first ? launch_kernel<true>(arguments, reduction)
                         : launch_kernel<false>(arguments, reduction);
}

}  // namespace dicache::cuda
