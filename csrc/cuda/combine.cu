// Combine residuals: y = x + r_old + gamma (r_new - r_old), one pass, gamma read on the device.
//
// `finish` is here too: the tiny launch that turns sums, perhaps all-reduced ones, into (error, gamma).
#include <initializer_list>

#include "cuda/launch.h"
#include "cuda/reduction.cuh"

namespace dicache::cuda {
namespace {

// y may be x itself: a thread loads its elements before it stores them.
template <class Format>
__global__ void __launch_bounds__(kGpuThreads)
    combine_kernel(const __grid_constant__ CombineArguments arguments, int64_t blocks_per_sample) {
  using T = typename Format::T;
  const Part part = part_of(blocks_per_sample);
  if (!arguments.samples.is_active(part.sample)) {
    return;
  }
  const int newer = arguments.samples.new_entry(part.sample);
  const int64_t weight = part.sample * arguments.gamma_stride;
  const T gamma = arguments.gamma_is_wide
                      ? static_cast<T>(static_cast<const double*>(arguments.gamma)[weight])
                      : static_cast<T>(static_cast<const float*>(arguments.gamma)[weight]);
  const Sample x = sample_of(arguments.x, part.sample);
  const Sample y = sample_of(arguments.y, part.sample);
  const Sample r_old = sample_of(arguments.r, 1 - newer, part.sample);
  const Sample r_new = sample_of(arguments.r, newer, part.sample);
  const auto load = [&](auto width, int64_t index) {
    constexpr int k = decltype(width)::value;
    struct {
      typename Format::template Block<k> x, r_old, r_new;
    } loaded{Format::template load<k>(x, index), Format::template load<k>(r_old, index),
             Format::template load<k>(r_new, index)};
    return loaded;
  };
  const auto use = [&](auto width, int64_t index, const auto& loaded) {
    constexpr int k = decltype(width)::value;
    T values[k];
#pragma unroll
    for (int i = 0; i < k; ++i) {
      values[i] = combine(Format::value(loaded.x, i), Format::value(loaded.r_old, i),
                          Format::value(loaded.r_new, i), gamma);
    }
    Format::round_and_store(y, index, values);
  };
  walk<Format, 1>(part, arguments.samples.size, are_aligned(x, y, r_old, r_new), load, use);
}

// One thread: a few numbers a sample. kColumns is known so that the rows stay in registers.
template <class T, int kColumns>
__global__ void finish_kernel(FinishArguments arguments) {
  const T* sums = static_cast<const T*>(arguments.sums);
  T* result = static_cast<T*>(arguments.result);
  T batch_row[kColumns] = {};
  for (int64_t sample = 0; sample < arguments.batch; ++sample) {
    T row[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      row[column] = sums[sample * kColumns + column];
      batch_row[column] += row[column];
    }
    finish(result + 2 * sample, row, kColumns, arguments.rule);
  }
  finish(result + 2 * arguments.batch, batch_row, kColumns, arguments.rule);
}

template <class T>
void launch_finish_of(const FinishArguments& arguments, cudaStream_t stream) {
  switch (arguments.columns) {
    case 5:
      return finish_kernel<T, 5><<<1, 1, 0, stream>>>(arguments);
    case 6:
      return finish_kernel<T, 6><<<1, 1, 0, stream>>>(arguments);
    default:
      return finish_kernel<T, 7><<<1, 1, 0, stream>>>(arguments);
  }
}

}  // namespace

cudaError_t launch_combine(const CombineArguments& arguments, cudaStream_t stream) {
  const LaunchPlan plan = plan_elementwise(arguments.samples.batch, arguments.samples.size);
  if (plan.blocks == 0) {
    return cudaSuccess;
  }
  return with_format(arguments.samples.is_wide, {arguments.x.dtype, arguments.r.dtype},
                     [&](auto format) {
                       combine_kernel<decltype(format)><<<plan.blocks, kGpuThreads, 0, stream>>>(
                           arguments, plan.blocks_per_sample);
                       return cudaGetLastError();
                     });
}

cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream) {
  arguments.is_wide ? launch_finish_of<double>(arguments, stream)
                    : launch_finish_of<float>(arguments, stream);
  return cudaGetLastError();
}

}  // namespace dicache::cuda
