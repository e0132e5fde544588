// Combine residuals: y = x + r_old + gamma (r_new - r_old), one pass, gamma read on the device.
//
// `finish` is here too: the tiny launch that turns sums, perhaps all-reduced ones, into (error,
// gamma).
#include "cuda/combine.cuh"

#include "cuda/launch.h"

namespace dicache::cuda {
namespace {

template <class Format>
__global__ void __launch_bounds__(kGpuThreads, kBlocksPerMultiprocessor)
    combine_kernel(const __grid_constant__ CombineArguments arguments, int64_t blocks_per_sample) {
  const Part part = part_of(blocks_per_sample);
  const bool is_active = arguments.samples.is_active(part.sample);
  if (is_active || arguments.fills) {
    combine_part<Format>(arguments, part, is_active);
  }
}

// One thread: a few numbers a sample. kKind is known so that the rows stay in registers.
template <class T, Statistics kKind>
__global__ void finish_kernel(FinishArguments arguments) {
  constexpr int kColumns = columns_of(kKind);
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
    finish(result + 2 * sample, row, kKind, arguments.rule);
  }
  finish(result + 2 * arguments.batch, batch_row, kKind, arguments.rule);
}

template <class T>
cudaError_t launch_finish_kernel(const FinishArguments& arguments, cudaStream_t stream) {
  switch (arguments.kind) {
    case Statistics::kProbe:
      return launch(stream, 1, 1, finish_kernel<T, Statistics::kProbe>, arguments);
    case Statistics::kProbeWithInput:
      return launch(stream, 1, 1, finish_kernel<T, Statistics::kProbeWithInput>, arguments);
    default:
      return launch(stream, 1, 1, finish_kernel<T, Statistics::kAlignment>, arguments);
  }
}

}  // namespace

cudaError_t launch_combine(const CombineArguments& arguments, cudaStream_t stream) {
  const LaunchPlan plan = plan_elementwise(arguments.samples.batch, arguments.samples.size);
  if (plan.blocks == 0) {
    return cudaSuccess;
  }
  return with_format(
      arguments.samples.is_wide, {arguments.x.dtype, arguments.r.dtype}, [&](auto format) {
        return launch(stream, plan.blocks, plan.threads, combine_kernel<decltype(format)>,
                      arguments, plan.blocks_per_sample);
      });
}

cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream) {
  return arguments.is_wide ? launch_finish_kernel<double>(arguments, stream)
                           : launch_finish_kernel<float>(arguments, stream);
}

}  // namespace dicache::cuda
