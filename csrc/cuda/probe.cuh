// The pass of the published rules over one sample: x, p, p_prev and q_old are read (and x_prev,
// q_new where the rule asks), and p is stored as the next step's p_prev.
#pragma once

#include "cuda/reduction.cuh"

namespace dicache::cuda {

template <bool kLeastSquares, bool kWithInput>
struct ProbePass {
  using Arguments = ProbeArguments;
  using Terms = ProbeTerms<kLeastSquares, kWithInput>;

  template <class Format, class V>
  static __device__ __forceinline__ void add_up(const Arguments& arguments, const Part& part,
                                                V (&sums)[Terms::kSums]) {
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
      for (int i = 0; i < k; i += Format::kLanes) {
        const V input = Format::values(loaded.x, i), old = Format::values(loaded.q_old, i);
        Terms::add(sums, input, Format::values(loaded.p, i), Format::values(loaded.p_prev, i),
                   kWithInput ? Format::values(loaded.x_prev, i) : input, old,
                   kLeastSquares ? Format::values(loaded.q_new, i) : old);
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
};

// Calls launch(ProbePass{}) for what a rule asks for.
template <class Launch>
cudaError_t with_pass(const ProbeArguments& arguments, const Launch& launch) {
  if (arguments.rule.least_squares) {
    return arguments.with_input ? launch(ProbePass<true, true>{})
                                : launch(ProbePass<true, false>{});
  }
  return arguments.with_input ? launch(ProbePass<false, true>{})
                              : launch(ProbePass<false, false>{});
}

}  // namespace dicache::cuda
