// The pass of the verified alignment over one sample: x, p and both window entries are read, and
// nothing is written. Both entries are read anyway, so no load waits for `newest`, which only
// chooses in registers.
#pragma once

#include "cuda/reduction.cuh"

namespace dicache::cuda {

struct AlignmentPass {
  using Arguments = AlignmentArguments;
  using Terms = AlignmentTerms;

  template <class Format, class V>
  static __device__ __forceinline__ void add_up(const Arguments& arguments, const Part& part,
                                                V (&sums)[Terms::kSums]) {
    const int newer = arguments.samples.new_entry(part.sample);
    const Sample x = sample_of(arguments.x, part.sample);
    const Sample p = sample_of(arguments.p, part.sample);
    const Sample q0 = sample_of(arguments.q, 0, part.sample);
    const Sample q1 = sample_of(arguments.q, 1, part.sample);
    const auto load = [&](auto width, int64_t index) {
      constexpr int k = decltype(width)::value;
      struct {
        typename Format::template Block<k> x, p, q0, q1;
      } loaded{Format::template load<k>(x, index), Format::template load<k>(p, index),
               Format::template load<k>(q0, index), Format::template load<k>(q1, index)};
      return loaded;
    };
    const auto use = [&](auto width, int64_t, const auto& loaded) {
      constexpr int k = decltype(width)::value;
      const auto add = [&](const auto& q_old, const auto& q_new) {
#pragma unroll
        for (int i = 0; i < k; i += Format::kLanes) {
          AlignmentTerms::add(sums, Format::values(loaded.x, i), Format::values(loaded.p, i),
                              Format::values(q_old, i), Format::values(q_new, i));
        }
      };
      // A branch that a whole block takes alike costs less than a choice for every element.
      newer == 0 ? add(loaded.q1, loaded.q0) : add(loaded.q0, loaded.q1);
    };
    const bool aligned = are_aligned(x, p, q0, q1);
    walk<Format, Format::kAtOnce>(part, arguments.samples.size, aligned, load, use);
  }
};

}  // namespace dicache::cuda
