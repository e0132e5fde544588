// The operators' loops over a range of tasks, for one instruction set.
//
// Work is cut into tasks of (sample, chunk of kCpuChunk elements). A task adds its elements up in
// fp32 lanes (fp64 for fp64 data), then adds the lanes in index order in fp64 and stores the
// partial sums in a row of its own. Which thread runs a task therefore changes nothing. Where all
// tensors of a call have one dtype (`Same`) that dtype is known at compile time; else (`Mixed`)
// every load looks it up, once in 16 elements.
//
// Included by one file an instruction set, behind its target pragma. Nothing here has external
// linkage but the table at the end, and nothing from the standard library may be instantiated here.
#pragma once

#include "cpu/bodies_table.h"
#include "cpu/vector.h"
#include "dicache/elements.h"
#include "dicache/launch_plan.h"

namespace dicache {
namespace {

// A place in a tensor: the chunk's first element.
struct Place {
  char* data;
  DType dtype;

  DICACHE_LANES char* at(int64_t index) const { return data + index * bytes_of(dtype); }
};

DICACHE_LANES Place place_of(const Tokens& tokens, int64_t sample, int64_t first) {
  const Place begin{static_cast<char*>(tokens.data), tokens.dtype};
  return {begin.at(sample * tokens.batch_stride + first), tokens.dtype};
}

DICACHE_LANES Place place_of(const Window& window, int entry, int64_t sample, int64_t first) {
  const Place begin{static_cast<char*>(window.data), window.dtype};
  return {begin.at(entry * window.entry_stride + sample * window.batch_stride + first),
          window.dtype};
}

// Whole vectors go straight to memory. The chunk's last `count` < kLanes elements pass through a
// zeroed vector; a zero adds nothing to any sum.
template <DType kDType, class V>
DICACHE_LANES V load_as(const char* from, int count) {
  using Raw = typename Storage<kDType>::Raw;
  Raw raw{};
  if (count == kLanes) {
    std::memcpy(&raw, from, sizeof(Raw));
  } else {
    std::memcpy(&raw, from, count * bytes_of(kDType));
  }
  return Convert<V>::from(Storage<kDType>::decode(raw));
}

// Returns the value as stored.
template <DType kDType, class V>
DICACHE_LANES V store_as(char* to, V value, int count) {
  using Raw = typename Storage<kDType>::Raw;
  const Raw raw = Storage<kDType>::encode(value);
  if (count == kLanes) {
    std::memcpy(to, &raw, sizeof(Raw));
  } else {
    std::memcpy(to, &raw, count * bytes_of(kDType));
  }
  return Convert<V>::from(Storage<kDType>::decode(raw));
}

template <DType kDType, class Vector>
struct Same {
  using V = Vector;
  static DICACHE_LANES bool is_float16(Place) { return kDType == DType::kFloat16; }
  static DICACHE_LANES V load(Place place, int64_t index, int count) {
    return load_as<kDType, V>(place.data + index * bytes_of(kDType), count);
  }
  static DICACHE_LANES V store(Place place, int64_t index, V value, int count) {
    return store_as<kDType, V>(place.data + index * bytes_of(kDType), value, count);
  }
};

template <class Vector>
struct Mixed {
  using V = Vector;
  static DICACHE_LANES bool is_float16(Place place) { return place.dtype == DType::kFloat16; }
  static DICACHE_LANES V load(Place place, int64_t index, int count) {
    const char* from = place.at(index);
    switch (place.dtype) {
      case DType::kBFloat16:
        return load_as<DType::kBFloat16, V>(from, count);
      case DType::kFloat16:
        return load_as<DType::kFloat16, V>(from, count);
      case DType::kFloat32:
        return load_as<DType::kFloat32, V>(from, count);
      default:
        return load_as<DType::kFloat64, V>(from, count);
    }
  }
  static DICACHE_LANES V store(Place place, int64_t index, V value, int count) {
    char* to = place.at(index);
    switch (place.dtype) {
      case DType::kBFloat16:
        return store_as<DType::kBFloat16, V>(to, value, count);
      case DType::kFloat16:
        return store_as<DType::kFloat16, V>(to, value, count);
      case DType::kFloat32:
        return store_as<DType::kFloat32, V>(to, value, count);
      default:
        return store_as<DType::kFloat64, V>(to, value, count);
    }
  }
};

// Tokens of a step that is filled in.
template <class Format>
DICACHE_LANES void store_tokens(Place y, int64_t index, typename Format::V value, int count) {
  using V = typename Format::V;
  if (Format::is_float16(y)) {
    value = saturated(value, repeat<V>(kLargestFloat16));
  }
  Format::store(y, index, value, count);
}

// A vector that is written into a buffer of its own dtype comes back as it was.
DICACHE_LANES void copy(Place from, Place to, int64_t index, int count) {
  std::memcpy(to.at(index), from.at(index), count * bytes_of(from.dtype));
}

struct Task {
  int64_t sample, first, count;
};

DICACHE_LANES Task task_of(const Samples& samples, int64_t index) {
  const int64_t chunks = cpu_chunks(samples.size);
  const int64_t first = index % chunks * kCpuChunk;
  const int64_t left = samples.size - first;
  return {index / chunks, first, left < kCpuChunk ? left : kCpuChunk};
}

// Calls step(index, count) for whole vectors and then for the rest.
template <class Step>
DICACHE_LANES void for_each_vector(int64_t size, const Step& step) {
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) {
    step(index, kLanes);
  }
  if (index < size) {
    step(index, static_cast<int>(size - index));
  }
}

template <int kSums, class V>
DICACHE_LANES void add_lanes(double* partial, const V* sums) {
  static_assert(kSums <= kMaxPartials);
  for (int sum = 0; sum < kSums; ++sum) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      total += sums[sum][lane];
    }
    partial[sum] = total;
  }
}

template <class Format, class Terms, bool kWithInput>
void probe_tasks(const ProbeArguments& arguments, int64_t begin, int64_t end, double* partials) {
  using V = typename Format::V;
  for (int64_t index = begin; index < end; ++index) {
    const auto [sample, first, size] = task_of(arguments.samples, index);
    V sums[Terms::kSums] = {};
    if (arguments.samples.is_active(sample)) {
      const int newer = arguments.samples.new_entry(sample);
      const Place x = place_of(arguments.x, sample, first);
      const Place p = place_of(arguments.p, sample, first);
      const Place p_prev = place_of(arguments.p_prev, sample, first);
      const Place x_prev = kWithInput ? place_of(arguments.x_prev, sample, first) : x;
      const Place q_old = place_of(arguments.q, 1 - newer, sample, first);
      const Place q_new = place_of(arguments.q, newer, sample, first);
      for_each_vector(size, [&](int64_t at, int count) __attribute__((always_inline)) {
        const V old = Format::load(q_old, at, count);
        Terms::add(sums, Format::load(x, at, count), Format::load(p, at, count),
                   Format::load(p_prev, at, count), Format::load(x_prev, at, count), old,
                   Terms::kReadsNew ? Format::load(q_new, at, count) : old);
        copy(p, p_prev, at, count);
        if (kWithInput) {
          copy(x, x_prev, at, count);
        }
      });
    }
    add_lanes<Terms::kSums>(partials + index * kMaxPartials, sums);
  }
}

template <class Format>
void probe_body(const ProbeArguments& arguments, int64_t begin, int64_t end, double* partials) {
  const auto tasks =
      arguments.rule.least_squares
          ? (arguments.with_input ? probe_tasks<Format, ProbeTerms<true, true>, true>
                                  : probe_tasks<Format, ProbeTerms<true, false>, false>)
          : (arguments.with_input ? probe_tasks<Format, ProbeTerms<false, true>, true>
                                  : probe_tasks<Format, ProbeTerms<false, false>, false>);
  tasks(arguments, begin, end, partials);
}

template <class Format>
void alignment_body(const AlignmentArguments& arguments, int64_t begin, int64_t end,
                    double* partials) {
  using V = typename Format::V;
  for (int64_t index = begin; index < end; ++index) {
    const auto [sample, first, size] = task_of(arguments.samples, index);
    V sums[AlignmentTerms::kSums] = {};
    if (arguments.samples.is_active(sample)) {
      const int newer = arguments.samples.new_entry(sample);
      const Place x = place_of(arguments.x, sample, first);
      const Place p = place_of(arguments.p, sample, first);
      const Place q_old = place_of(arguments.q, 1 - newer, sample, first);
      const Place q_new = place_of(arguments.q, newer, sample, first);
      for_each_vector(size, [&](int64_t at, int count) __attribute__((always_inline)) {
        AlignmentTerms::add(sums, Format::load(x, at, count), Format::load(p, at, count),
                            Format::load(q_old, at, count), Format::load(q_new, at, count));
      });
    }
    add_lanes<AlignmentTerms::kSums>(partials + index * kMaxPartials, sums);
  }
}

template <class Format>
void combine_body(const CombineArguments& arguments, int64_t begin, int64_t end) {
  using V = typename Format::V;
  for (int64_t index = begin; index < end; ++index) {
    const auto [sample, first, size] = task_of(arguments.samples, index);
    const Place y = place_of(arguments.y, sample, first);
    if (!arguments.samples.is_active(sample)) {
      if (arguments.fills) {
        std::memset(y.data, 0, size * bytes_of(y.dtype));
      }
      continue;
    }
    const int newer = arguments.samples.new_entry(sample);
    const V gammas = repeat<V>(read_weight<double>(arguments.gamma, sample));
    const Place x = place_of(arguments.x, sample, first);
    const Place r_old = place_of(arguments.r, 1 - newer, sample, first);
    const Place r_new = place_of(arguments.r, newer, sample, first);
    for_each_vector(size, [&](int64_t at, int count) __attribute__((always_inline)) {
      store_tokens<Format>(y, at,
                           combine(Format::load(x, at, count), Format::load(r_old, at, count),
                                   Format::load(r_new, at, count), gammas),
                           count);
    });
  }
}

template <class Format>
void extrapolate_body(const ExtrapolateArguments& arguments, int64_t begin, int64_t end) {
  using V = typename Format::V;
  for (int64_t index = begin; index < end; ++index) {
    const auto [sample, first, size] = task_of(arguments.samples, index);
    const Place y = place_of(arguments.y, sample, first);
    if (!arguments.samples.is_active(sample)) {
      if (arguments.fills) {
        std::memset(y.data, 0, size * bytes_of(y.dtype));
      }
      continue;
    }
    const int newer = arguments.samples.new_entry(sample);
    V weights[kExtrapolationWeights];
    for (int column = 0; column < kExtrapolationWeights; ++column) {
      weights[column] = repeat<V>(read_weight<double>(arguments.weights, sample, column));
    }
    const Place x = place_of(arguments.x, sample, first);
    const Place p = place_of(arguments.p, sample, first);
    const Place r_a = place_of(arguments.r, newer, sample, first);
    const Place r_b = place_of(arguments.r, 1 - newer, sample, first);
    const Place r_c = place_of(arguments.r_c, sample, first);
    const Place q_a = place_of(arguments.q, newer, sample, first);
    for_each_vector(size, [&](int64_t at, int count) __attribute__((always_inline)) {
      store_tokens<Format>(
          y, at,
          extrapolate(Format::load(x, at, count), Format::load(p, at, count),
                      Format::load(r_a, at, count), Format::load(r_b, at, count),
                      Format::load(r_c, at, count), Format::load(q_a, at, count), weights),
          count);
    });
  }
}

template <class Format>
void record_body(const RecordArguments& arguments, int64_t begin, int64_t end, double* partials) {
  using V = typename Format::V;
  for (int64_t index = begin; index < end; ++index) {
    const auto [sample, first, size] = task_of(arguments.samples, index);
    V sums[RecordTerms::kSums] = {};
    if (arguments.samples.is_active(sample)) {
      const int newer = arguments.samples.new_entry(sample);
      const Place x = place_of(arguments.x, sample, first);
      const Place p = place_of(arguments.p, sample, first);
      const Place y = place_of(arguments.y, sample, first);
      const Place r_slot = place_of(arguments.r, 1 - newer, sample, first);
      const Place q_slot = place_of(arguments.q, 1 - newer, sample, first);
      const Place r_other = place_of(arguments.r, newer, sample, first);
      const Place q_other = place_of(arguments.q, newer, sample, first);
      for_each_vector(size, [&](int64_t at, int count) __attribute__((always_inline)) {
        // x and p may be the slots themselves: all loads come first.
        const V input = Format::load(x, at, count);
        const V probe = Format::load(p, at, count);
        const V output = Format::load(y, at, count);
        const V r = Format::store(r_slot, at, output - input, count);
        const V q = Format::store(q_slot, at, probe - input, count);
        if (arguments.first) {
          Format::store(r_other, at, r, count);
          Format::store(q_other, at, q, count);
        }
        // The other entry now holds q itself where this is the first one: d is zero.
        RecordTerms::add(sums, q, arguments.first ? q : Format::load(q_other, at, count), r);
      });
    }
    add_lanes<RecordTerms::kSums>(partials + index * kMaxPartials, sums);
  }
}

template <class Format>
constexpr Bodies bodies_for() {
  return {probe_body<Format>, alignment_body<Format>, combine_body<Format>,
          extrapolate_body<Format>, record_body<Format>};
}

// In the order of `Layout`.
constexpr Bodies kTable[kLayouts] = {
    bodies_for<Same<DType::kBFloat16, F32>>(),
    bodies_for<Same<DType::kFloat16, F32>>(),
    bodies_for<Same<DType::kFloat32, F32>>(),
    bodies_for<Same<DType::kFloat64, F64>>(),
    bodies_for<Mixed<F32>>(),
    bodies_for<Mixed<F64>>(),
};

}  // namespace
}  // namespace dicache
