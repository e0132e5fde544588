// The pass over one sample that fills it in: y = x + r_old + gamma (r_new - r_old).
#pragma once

#include "cuda/reduction.cuh"

namespace dicache::cuda {

// y may be x itself: a thread loads its elements before it stores them. Both entries are read
// anyway, and `newest` and gamma behind the vectors, which wait for neither.
template <class Format>
__device__ __forceinline__ void combine_part(const CombineArguments& arguments, const Part& part,
                                             bool is_active) {
  using T = typename Format::T;
  const Sample x = sample_of(arguments.x, part.sample);
  const Sample y = sample_of(arguments.y, part.sample);
  const Sample r0 = sample_of(arguments.r, 0, part.sample);
  const Sample r1 = sample_of(arguments.r, 1, part.sample);
  const auto load = [&](auto width, int64_t index) {
    constexpr int k = decltype(width)::value;
    struct {
      typename Format::template Block<k> x, r0, r1;
    } loaded{Format::template load<k>(x, index), Format::template load<k>(r0, index),
             Format::template load<k>(r1, index)};
    return loaded;
  };
  int newer = 0;
  T gamma = 0;
  const auto between = [&] {
    newer = arguments.samples.new_entry(part.sample);
    gamma = read_weight<T>(arguments.gamma, part.sample);
  };
  const auto use = [&](auto width, int64_t index, const auto& loaded) {
    constexpr int k = decltype(width)::value;
    T values[k];
#pragma unroll
    for (int i = 0; i < k; ++i) {
      const T first = Format::value(loaded.r0, i), second = Format::value(loaded.r1, i);
      const T sum = combine(Format::value(loaded.x, i), newer == 0 ? second : first,
                            newer == 0 ? first : second, gamma);
      values[i] = is_active ? sum : T(0);
    }
    store_tokens<Format>(y, index, values);
  };
  const bool aligned = are_aligned(x, y, r0, r1);
  walk<Format, 2>(part, arguments.samples.size, aligned, load, use, between);
}

}  // namespace dicache::cuda
