// Combine residuals: y = x + r_old + gamma (r_new - r_old), one pass, gamma read on the device.
//
// `finish` is here too: the tiny launch that turns sums, perhaps all-reduced ones, into (error,
// gamma).
#include "cuda/combine.cuh"

#include "cuda/launch.h"

namespace dicache::cuda {
namespace {

// Blocks a multiprocessor: 48 registers a thread, enough for two vectors of three streams.
template <class Format>
constexpr int kCombineBlocks = std::is_same_v<typename Format::T, double> ? 4 : 5;

// y may be x itself: a thread loads its elements before it stores them. `newest` and gamma are used
// behind the vectors, which wait for neither (both entries are read anyway): a block lives for two
// vectors a thread only.
template <class Format>
__global__ void __launch_bounds__(kGpuThreads, kCombineBlocks<Format>)
    combine_kernel(const __grid_constant__ CombineArguments arguments) {
  using T = typename Format::T;
  using Step = Combination<Format>;
  const Tile tile = tile_of(arguments.samples);
  const Sample y = tile_of<Format>(arguments.y, tile.sample, tile.first);
  if (!arguments.samples.is_active(tile.sample)) {
    if (arguments.fills) {
      fill_with_zeros<Format>(tile, y);
    }
    return;
  }
  const Sample x = tile_of<Format>(arguments.x, tile.sample, tile.first);
  const Sample r0 = tile_of<Format>(arguments.r, 0, tile.sample, tile.first);
  const Sample r1 = tile_of<Format>(arguments.r, 1, tile.sample, tile.first);
  const auto load = [&](auto width, int index) {
    return Step::template load<decltype(width)::value>(x, r0, r1, index);
  };
  const auto weigh = [&] { return Step::numbers(arguments, tile.sample); };
  const auto use = [&](auto width, int index, const auto& loaded, const auto& numbers) {
    T values[decltype(width)::value];
    Step::fill_in(values, loaded, numbers);
    store_tokens<Format>(y, index, values);
  };
  walk_tile<Format>(tile, are_aligned(x, y, r0, r1), load, weigh, use);
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
  return with_format(arguments.samples.is_wide, {arguments.x.dtype, arguments.r.dtype},
                     [&](auto format) {
                       return launch(stream, grid_of_tiles(plan, arguments.samples.batch),
                                     plan.threads, combine_kernel<decltype(format)>, arguments);
                     });
}

cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream) {
  return arguments.is_wide ? launch_finish_kernel<double>(arguments, stream)
                           : launch_finish_kernel<float>(arguments, stream);
}

}  // namespace dicache::cuda
