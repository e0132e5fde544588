// Extrapolate residuals: y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (p - x - q_a), one
// pass, weights read on the device.
#include "cuda/launch.h"
#include "cuda/reduction.cuh"

namespace dicache::cuda {
namespace {

// Blocks a multiprocessor: 80 registers a thread. With the 64 of four the compiler does not ask for
// all six vectors before it waits for the first of them.
constexpr int kResident = 3;

// y may be x itself: a thread loads its elements before it stores them. A block lives for
// two vectors a thread, one behind the other: there are no registers for twelve. As in combine,
// both entries of the residuals are read whatever `newest` is. Only q_a waits for it, since reading
// both entries of q would be an eighth pass; other vectors are on their way meanwhile.
template <class Format>
__global__ void __launch_bounds__(kGpuThreads, kResident)
    extrapolate_kernel(const __grid_constant__ ExtrapolateArguments arguments,
                       int64_t blocks_per_sample) {
  using T = typename Format::T;
  const Part part = part_of(blocks_per_sample);
  const bool is_active = arguments.samples.is_active(part.sample);
  if (!is_active && !arguments.fills) {
    return;
  }
  const Sample x = sample_of(arguments.x, part.sample);
  const Sample p = sample_of(arguments.p, part.sample);
  const Sample y = sample_of(arguments.y, part.sample);
  const Sample r0 = sample_of(arguments.r, 0, part.sample);
  const Sample r1 = sample_of(arguments.r, 1, part.sample);
  const Sample r_c = sample_of(arguments.r_c, part.sample);
  const Sample q0 = sample_of(arguments.q, 0, part.sample);
  const Sample q1 = sample_of(arguments.q, 1, part.sample);
  const auto load = [&](auto width, int64_t index) {
    constexpr int k = decltype(width)::value;
    const int newer = arguments.samples.new_entry(part.sample);
    struct {
      int newer;
      typename Format::template Block<k> x, p, r0, r1, r_c, q_a;
    } loaded{newer,
             Format::template load<k>(x, index),
             Format::template load<k>(p, index),
             Format::template load<k>(r0, index),
             Format::template load<k>(r1, index),
             Format::template load<k>(r_c, index),
             Format::template load<k>({newer == 0 ? q0.data : q1.data, q0.dtype}, index)};
    return loaded;
  };
  const auto use = [&](auto width, int64_t index, const auto& loaded) {
    constexpr int k = decltype(width)::value;
    T weights[kExtrapolationWeights];
#pragma unroll
    for (int column = 0; column < kExtrapolationWeights; ++column) {
      weights[column] = read_weight<T>(arguments.weights, part.sample, column);
    }
    T values[k];
#pragma unroll
    for (int i = 0; i < k; ++i) {
      const T first = Format::value(loaded.r0, i), second = Format::value(loaded.r1, i);
      const T sum =
          extrapolate(Format::value(loaded.x, i), Format::value(loaded.p, i),
                      loaded.newer == 0 ? first : second, loaded.newer == 0 ? second : first,
                      Format::value(loaded.r_c, i), Format::value(loaded.q_a, i), weights);
      values[i] = is_active ? sum : T(0);
    }
    store_tokens<Format>(y, index, values);
  };
  // Both entries of q: which of them is read must not delay the choice of the width.
  const bool aligned = are_aligned(x, p, y, r0, r1, r_c, q0, q1);
  walk<Format, 1>(part, arguments.samples.size, aligned, load, use);
}

}  // namespace

cudaError_t launch_extrapolate(const ExtrapolateArguments& arguments, cudaStream_t stream) {
  const LaunchPlan plan = plan_elementwise(arguments.samples.batch, arguments.samples.size);
  if (plan.blocks == 0) {
    return cudaSuccess;
  }
  return with_format(arguments.samples.is_wide,
                     {arguments.x.dtype, arguments.p.dtype, arguments.r.dtype}, [&](auto format) {
                       return launch(stream, plan.blocks, plan.threads,
                                     extrapolate_kernel<decltype(format)>, arguments,
                                     plan.blocks_per_sample);
                     });
}

}  // namespace dicache::cuda
