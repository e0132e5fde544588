// The operators' mathematics: what one element adds to the sums, and what the sums mean.
//
// CPU and GPU bodies compile these same lines, with V = float, double or a pair of floats on the
// GPU and a SIMD vector of them on the CPU, so what the CPU tests execute is what the GPU computes.
// But for `add_product` no multiplication may be fused with an addition (-ffp-contract=off,
// --fmad=false): then y and the recorded residuals are bitwise equal in every backend and in the
// plain PyTorch reference.
//
// A body with SIMD vectors declares `V magnitude(V)`, the absolute value, before it includes this.
#pragma once

#include <math.h>

#include "dicache/arguments.h"

namespace dicache {

// Columns of the rows of sums that statistics leave.
DICACHE_INLINE constexpr int columns_of(Statistics kind) {
  return kind == Statistics::kProbe ? 5 : kind == Statistics::kAlignment ? 6 : 7;
}
constexpr int kMaxColumns = columns_of(Statistics::kProbeWithInput);

// What a sum gains by a product. Sums agree to rounding only, so a body may fuse the two.
template <class V>
DICACHE_INLINE void add_product(V& sum, V a, V b) {
  sum += a * b;
}

DICACHE_INLINE float magnitude(float value) { return fabsf(value); }
DICACHE_INLINE double magnitude(double value) { return fabs(value); }

// sum|p - p_prev|, sum|p_prev|, gamma's numerator; for delta_minus sum|x - x_prev|, sum|x_prev|.
// With a = q - q_old and d = q_new - q_old, gamma's numerator is sum|a| or <a, d>.
template <bool kLeastSquares, bool kWithInput>
struct ProbeTerms {
  static constexpr bool kReadsNew = kLeastSquares;
  static constexpr int kSums = kWithInput ? 5 : 3;
  static constexpr Statistics kKind = kWithInput ? Statistics::kProbeWithInput : Statistics::kProbe;
  static constexpr int kColumns = columns_of(kKind);

  template <class V>
  static DICACHE_INLINE void add(V* sums, V x, V p, V p_prev, V x_prev, V q_old, V q_new) {
    const V a = (p - x) - q_old;
    sums[0] += magnitude(p - p_prev);
    sums[1] += magnitude(p_prev);
    if constexpr (kLeastSquares) {
      add_product(sums[2], a, q_new - q_old);
    } else {
      sums[2] += magnitude(a);
    }
    if constexpr (kWithInput) {
      sums[3] += magnitude(x - x_prev);
      sums[4] += magnitude(x_prev);
    }
  }

  template <class T>
  static DICACHE_INLINE void columns(T* row, const T* sums, const T* entry_sums) {
    row[0] = sums[0];
    row[1] = sums[1];
    row[2] = sums[2];
    row[3] = entry_sums[kLeastSquares ? kDD : kAbsD];
    row[4] = entry_sums[kAbsNew] + entry_sums[kAbsOld];
    if constexpr (kWithInput) {
      row[5] = sums[3];
      row[6] = sums[4];
    }
  }
};

// <a, a>, <a, d>, <q, q>, <p, p>.
struct AlignmentTerms {
  static constexpr int kSums = 4;
  static constexpr Statistics kKind = Statistics::kAlignment;
  static constexpr int kColumns = columns_of(kKind);

  template <class V>
  static DICACHE_INLINE void add(V* sums, V x, V p, V q_old, V q_new) {
    const V q = p - x;
    const V a = q - q_old;
    add_product(sums[0], a, a);
    add_product(sums[1], a, q_new - q_old);
    add_product(sums[2], q, q);
    add_product(sums[3], p, p);
  }

  template <class T>
  static DICACHE_INLINE void columns(T* row, const T* sums, const T* entry_sums) {
    row[0] = sums[0];
    row[1] = sums[1];
    row[2] = sums[2];
    row[3] = entry_sums[kDD];
    row[4] = entry_sums[kAbsNew] + entry_sums[kAbsOld];
    row[5] = sums[3];
  }
};

// sum|d|, <d, d>, sum|r| of the entry that is being recorded, from the values as stored.
struct RecordTerms {
  static constexpr int kSums = 3;

  template <class V>
  static DICACHE_INLINE void add(V* sums, V q, V q_previous, V r) {
    const V d = q - q_previous;
    sums[0] += magnitude(d);
    add_product(sums[1], d, d);
    sums[2] += magnitude(r);
  }
};

template <class T>
DICACHE_INLINE void read_entry_sums(T* values, const EntrySums& entry_sums, int64_t sample) {
  for (int sum = 0; sum < kEntrySums; ++sum) {
    const int64_t index = sample * kEntrySums + sum;
    values[sum] = entry_sums.is_wide ? static_cast<T>(static_cast<double*>(entry_sums.data)[index])
                                     : static_cast<T>(static_cast<float*>(entry_sums.data)[index]);
  }
}

// The sums of the entry that was the newest so far move on. `totals` is in RecordTerms' order.
template <class T>
DICACHE_INLINE void store_entry_sums_as(const RecordArguments& arguments, int64_t sample,
                                        const double* totals) {
  T* row = static_cast<T*>(arguments.entry_sums.data) + sample * kEntrySums;
  const T size = static_cast<T>(totals[2]);
  row[kAbsOld] = arguments.first ? size : row[kAbsNew];
  row[kAbsD] = static_cast<T>(totals[0]);
  row[kDD] = static_cast<T>(totals[1]);
  row[kAbsNew] = size;
}

// What record leaves of an active sample once all of it is read and written.
DICACHE_INLINE void finish_record(const RecordArguments& arguments, int64_t sample,
                                  const double* totals) {
  if (arguments.entry_sums.is_wide) {
    store_entry_sums_as<double>(arguments, sample, totals);
  } else {
    store_entry_sums_as<float>(arguments, sample, totals);
  }
  const_cast<int32_t*>(arguments.samples.newest)[sample] = 1 - arguments.samples.new_entry(sample);
}

template <class T>
DICACHE_INLINE T read_weight(const Weights& weights, int64_t sample, int column = 0) {
  const int64_t index = sample * weights.batch_stride + column;
  if (sizeof(T) == sizeof(double) && weights.is_wide) {
    return static_cast<T>(static_cast<const double*>(weights.data)[index]);
  }
  return static_cast<const float*>(weights.data)[index];
}

// Tokens that are filled in end at fp16's largest number: models work within reach of it, and
// infinity would spoil the picture. NaN stays NaN.
constexpr float kLargestFloat16 = 65504;

template <class V>
DICACHE_INLINE V saturated(V value, V largest) {
  const V capped = value > largest ? largest : value;
  return capped < -largest ? -largest : capped;
}

template <class V>
DICACHE_INLINE V combine(V x, V r_old, V r_new, V gamma) {
  return (x + r_old) + gamma * (r_new - r_old);
}

// w1, w2, w3.
constexpr int kExtrapolationWeights = 3;

template <class V>
DICACHE_INLINE V extrapolate(V x, V p, V r_a, V r_b, V r_c, V q_a, const V* weights) {
  const V along_r = ((x + r_a) + weights[0] * (r_a - r_b)) + weights[1] * (r_b - r_c);
  return along_r + weights[2] * ((p - x) - q_a);
}

template <class T>
DICACHE_INLINE bool is_finite(T value) {
  return value - value == T(0);  // infinity and NaN leave NaN
}

// A zero denominator gives 1 before the clip. What is not finite gives NaN, judged before the clip,
// which would hide an infinity; `residual` = sum|r| stands for the residuals themselves.
template <class T>
DICACHE_INLINE T gamma_of(T top, T bottom, T residual, const Rule& rule) {
  if (!is_finite(top) || !is_finite(bottom) || !is_finite(residual)) {
    return (residual - residual) + (top - top) + (bottom - bottom);  // NaN
  }
  const T gamma = bottom == T(0) ? T(1) : top / bottom;
  const T low = static_cast<T>(rule.low), high = static_cast<T>(rule.high);
  return gamma < low ? low : (gamma > high ? high : gamma);
}

// (error, gamma) of one row of the probe statistics' sums.
template <class T>
DICACHE_INLINE void finish_probe(T* result, const T* row, bool with_input, const Rule& rule) {
  T error = row[0] / row[1];
  if (with_input) {
    error = magnitude(error - row[5] / row[6]);
  }
  result[0] = error;
  result[1] = gamma_of(row[2], row[3], row[4], rule);
}

DICACHE_INLINE float square_root(float value) { return sqrtf(value); }
DICACHE_INLINE double square_root(double value) { return sqrt(value); }

// (error, gamma) of one row of the alignment statistics' sums: the misfit that this gamma leaves.
template <class T>
DICACHE_INLINE void finish_alignment(T* result, const T* row, const Rule& rule) {
  const T gamma = gamma_of(row[1], row[3], row[4], rule);
  const T misfit = row[0] - T(2) * gamma * row[1] + gamma * gamma * row[3];
  const T size = rule.relative_to_probe ? row[5] : row[2];
  result[0] = square_root((misfit < T(0) ? T(0) : misfit) / size);  // NaN stays NaN
  result[1] = gamma;
}

template <class T>
DICACHE_INLINE void finish(T* result, const T* row, Statistics kind, const Rule& rule) {
  if (kind == Statistics::kAlignment) {
    finish_alignment(result, row, rule);
  } else {
    finish_probe(result, row, kind == Statistics::kProbeWithInput, rule);
  }
}

// What the mailbox gets before its serial, number by number; `count` numbers of result.
template <class T>
DICACHE_INLINE void fill_mailbox(const Mailbox& mailbox, const T* result, int64_t count,
                                 int64_t first = 0, int64_t step = 1) {
  char* const data = static_cast<char*>(mailbox.data);
  for (int64_t index = first; index < count; index += step) {
    reinterpret_cast<T*>(data + kMailboxResult)[index] = result[index];
  }
  for (int64_t byte = first; byte < mailbox.promise_bytes; byte += step) {
    data[kMailboxPromise + byte] = static_cast<const char*>(mailbox.promise)[byte];
  }
}

// gamma as statistics leave it in result [B + 1, 2]: of each sample, or of the batch for all.
DICACHE_INLINE Weights gamma_in(const void* result, const Samples& samples, bool by_sample,
                                bool is_wide) {
  const int64_t first = by_sample ? 1 : 2 * samples.batch + 1;
  const char* data = static_cast<const char*>(result) + first * (is_wide ? 8 : 4);
  return {data, by_sample ? 2 : 0, is_wide};
}

}  // namespace dicache
