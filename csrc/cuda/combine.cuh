// What one vector of a filled-in step is, and the pass over a sample that makes them:
// y = x + r_old + gamma (r_new - r_old).
#pragma once

#include "cuda/reduction.cuh"

namespace dicache::cuda {

template <class Format>
struct Combination {
  using T = typename Format::T;
  using V = typename Format::V;

  // Both entries are read anyway, so the loads of vectors wait for neither number.
  struct Numbers {
    int newer;
    V gamma;
  };
  template <int k>
  struct Loaded {
    typename Format::template Block<k> x, r0, r1;
  };

  static __device__ __forceinline__ Numbers numbers(const CombineArguments& arguments,
                                                    int64_t sample) {
    return {arguments.samples.new_entry(sample),
            broadcast<V>(read_weight<T>(arguments.gamma, sample))};
  }

  template <int k>
  static __device__ __forceinline__ Loaded<k> load(const Sample& x, const Sample& r0,
                                                   const Sample& r1, int64_t index) {
    return {Format::template load<k>(x, index), Format::template load<k>(r0, index),
            Format::template load<k>(r1, index)};
  }

  template <int k>
  static __device__ __forceinline__ void fill_in(T (&values)[k], const Loaded<k>& loaded,
                                                 const Numbers& numbers) {
    const auto from = [&](const auto& r_old, const auto& r_new) {
#pragma unroll
      for (int i = 0; i < k; i += Format::kLanes) {
        set(values, i,
            combine(Format::values(loaded.x, i), Format::values(r_old, i), Format::values(r_new, i),
                    numbers.gamma));
      }
    };
    numbers.newer == 0 ? from(loaded.r1, loaded.r0) : from(loaded.r0, loaded.r1);
  }
};

// A block's part of a sample; zeros where it is not active. y may be x itself: a thread loads its
// elements before it stores them.
template <class Format>
__device__ __forceinline__ void combine_part(const CombineArguments& arguments, const Part& part,
                                             bool is_active) {
  using Step = Combination<Format>;
  const Sample x = sample_of(arguments.x, part.sample);
  const Sample y = sample_of(arguments.y, part.sample);
  const Sample r0 = sample_of(arguments.r, 0, part.sample);
  const Sample r1 = sample_of(arguments.r, 1, part.sample);
  const auto numbers = Step::numbers(arguments, part.sample);
  const auto load = [&](auto width, int64_t index) {
    return Step::template load<decltype(width)::value>(x, r0, r1, index);
  };
  const auto use = [&](auto width, int64_t index, const auto& loaded) {
    typename Format::T values[decltype(width)::value] = {};
    if (is_active) {
      Step::fill_in(values, loaded, numbers);
    }
    store_tokens<Format>(y, index, values);
  };
  const bool aligned = are_aligned(x, y, r0, r1);
  walk<Format, Format::kAtOnce>(part, arguments.samples.size, aligned, load, use);
}

}  // namespace dicache::cuda
