// Extrapolate residuals: y = x + r_a + w1 (r_a - r_b) + w2 (r_b - r_c) + w3 (p - x - q_a), one
// pass, weights read on the device.
#include "cuda/launch.h"
#include "cuda/reduction.cuh"

namespace dicache::cuda {
namespace {

// Blocks a multiprocessor: 80 registers a thread. With the 64 of four the compiler does not ask for
// all six vectors before it waits for the first of them.
template <class Format>
constexpr int kExtrapolateBlocks = std::is_same_v<typename Format::T, double> ? 2 : 3;

// y may be x itself: a thread loads its elements before it stores them. As in combine, a block
// lives for two vectors a thread, and both entries of the residuals are read whatever `newest` is.
// Only q_a waits for it, since reading both entries of q would be an eighth pass; other vectors are
// on their way meanwhile.
template <class Format>
__global__ void __launch_bounds__(kGpuThreads, kExtrapolateBlocks<Format>)
    extrapolate_kernel(const __grid_constant__ ExtrapolateArguments arguments) {
  using T = typename Format::T;
  using V = typename Format::V;
  const Tile tile = tile_of(arguments.samples);
  const Sample y = tile_of<Format>(arguments.y, tile.sample, tile.first);
  if (!arguments.samples.is_active(tile.sample)) {
    if (arguments.fills) {
      fill_with_zeros<Format>(tile, y);
    }
    return;
  }
  const Sample x = tile_of<Format>(arguments.x, tile.sample, tile.first);
  const Sample p = tile_of<Format>(arguments.p, tile.sample, tile.first);
  const Sample r0 = tile_of<Format>(arguments.r, 0, tile.sample, tile.first);
  const Sample r1 = tile_of<Format>(arguments.r, 1, tile.sample, tile.first);
  const Sample r_c = tile_of<Format>(arguments.r_c, tile.sample, tile.first);
  const Sample q0 = tile_of<Format>(arguments.q, 0, tile.sample, tile.first);
  const Sample q1 = tile_of<Format>(arguments.q, 1, tile.sample, tile.first);
  const auto load = [&](auto width, int index) {
    constexpr int k = decltype(width)::value;
    const int newer = arguments.samples.new_entry(tile.sample);
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
  const auto weigh = [&] {
    struct {
      V value[kExtrapolationWeights];
    } weights;
#pragma unroll
    for (int column = 0; column < kExtrapolationWeights; ++column) {
      weights.value[column] = broadcast<V>(read_weight<T>(arguments.weights, tile.sample, column));
    }
    return weights;
  };
  const auto use = [&](auto width, int index, const auto& loaded, const auto& weights) {
    constexpr int k = decltype(width)::value;
    T values[k];
    const auto fill_in = [&](const auto& r_a, const auto& r_b) {
#pragma unroll
      for (int i = 0; i < k; i += Format::kLanes) {
        set(values, i,
            extrapolate(Format::values(loaded.x, i), Format::values(loaded.p, i),
                        Format::values(r_a, i), Format::values(r_b, i),
                        Format::values(loaded.r_c, i), Format::values(loaded.q_a, i),
                        weights.value));
      }
    };
    loaded.newer == 0 ? fill_in(loaded.r0, loaded.r1) : fill_in(loaded.r1, loaded.r0);
    store_tokens<Format>(y, index, values);
  };
  // Both entries of q: which of them is read must not delay the choice of the width.
  walk_tile<Format>(tile, are_aligned(x, p, y, r0, r1, r_c, q0, q1), load, weigh, use);
}

}  // namespace

cudaError_t launch_extrapolate(const ExtrapolateArguments& arguments, cudaStream_t stream) {
  const LaunchPlan plan = plan_elementwise(arguments.samples.batch, arguments.samples.size);
  if (plan.blocks == 0) {
    return cudaSuccess;
  }
  return with_format(arguments.samples.is_wide,
                     {arguments.x.dtype, arguments.p.dtype, arguments.r.dtype}, [&](auto format) {
                       return launch(stream, grid_of_tiles(plan, arguments.samples.batch),
                                     plan.threads, extrapolate_kernel<decltype(format)>, arguments);
                     });
}

}  // namespace dicache::cuda
