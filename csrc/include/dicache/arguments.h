// The operators' arguments without torch: raw pointers, element strides, dtypes.
//
// One struct an operator. The bindings (csrc/torch) fill it after checking every tensor; the bodies
// (csrc/cpu, csrc/cuda) trust it. Elements of one sample are contiguous; samples and window entries
// lie at any stride, so that a slice of a larger tensor needs no copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DICACHE_INLINE __host__ __device__ __forceinline__
#else
// No out-of-line copy may exist: the CPU bodies are compiled for several instruction sets, and the
// linker would keep one copy for all of them.
#define DICACHE_INLINE inline __attribute__((always_inline))
#endif

namespace dicache {

enum class DType : int32_t { kBFloat16, kFloat16, kFloat32, kFloat64 };

DICACHE_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Tokens [B, ...]: sample b begins at element b * batch_stride.
struct Tokens {
  void* data;
  int64_t batch_stride;
  DType dtype;
};

// A window [2, B, ...] of residuals: entry e of sample b begins at element
// e * entry_stride + b * batch_stride.
struct Window {
  void* data;
  int64_t entry_stride;
  int64_t batch_stride;
  DType dtype;
};

// What every operator works on. `active` may be null: all samples.
struct Samples {
  int64_t batch;          // B
  int64_t size;           // elements of one sample
  bool is_wide;           // arithmetic in fp64, because an input is fp64; else fp32
  const int32_t* newest;  // [B]
  const uint8_t* active;  // [B]

  // The window entry that is the newer one of a sample.
  DICACHE_INLINE int new_entry(int64_t sample) const { return newest[sample] != 0 ? 1 : 0; }
  DICACHE_INLINE bool is_active(int64_t sample) const {
    return sample < batch && (active == nullptr || active[sample] != 0);
  }
};

// Columns of entry_sums [B, 4], which `record` leaves for the next step's statistics.
enum EntrySum { kAbsD, kDD, kAbsNew, kAbsOld, kEntrySums };

// An fp32 or fp64 tensor of sums, whatever the arithmetic is.
struct EntrySums {
  void* data;
  bool is_wide;
};

// Numbers by which a sample's residuals are weighed: [B], or some in a row [B, n].
struct Weights {
  const void* data;
  int64_t batch_stride;  // 0: one row serves all samples
  bool is_wide;          // fp64; only where samples.is_wide
};

// Which statistics a row of sums is of; `with input`: delta_minus.
enum class Statistics : int32_t { kProbe, kProbeWithInput, kAlignment };

// How the sums become (error, gamma).
struct Rule {
  double low, high;        // gamma's range
  bool least_squares;      // probe statistics: gamma from inner products instead of L1 norms
  bool relative_to_probe;  // alignment: error relative to ||p|| instead of ||q||
};

// Where the host finds (error, gamma) while later work still runs: memory that both see. A serial
// (int32), which is written last; from byte 8 the bytes of one more number, which the host wants to
// read along; from byte 16 a copy of result. dicache/workspace.py makes it.
struct Mailbox {
  void* data;  // null: none
  int32_t serial;
  const void* promise;  // null: no such number
  int64_t promise_bytes;
};
constexpr int64_t kMailboxPromise = 8, kMailboxResult = 16;

struct ProbeArguments {
  Samples samples;
  Tokens x, p, p_prev, x_prev;
  bool with_input;  // delta_minus: x_prev is there (an empty tensor has no data to tell by)
  Window q;
  EntrySums entry_sums;
  Rule rule;
  void *sums, *result;  // [B, 5 or 7] and [B + 1, 2], fp64 if samples.is_wide
  Mailbox mailbox;
};

struct AlignmentArguments {
  Samples samples;
  Tokens x, p;
  Window q;
  EntrySums entry_sums;
  Rule rule;
  void *sums, *result;  // [B, 6] and [B + 1, 2]
  Mailbox mailbox;
};

struct FinishArguments {
  int64_t batch;
  Statistics kind;
  bool is_wide;
  Rule rule;
  const void* sums;
  void* result;
};

struct CombineArguments {
  Samples samples;
  Tokens x;
  Window r;
  Tokens y;
  Weights gamma;  // [B]
  bool fills;     // y is a new tensor: inactive samples become zero instead of staying as they are
};

struct ExtrapolateArguments {
  Samples samples;
  Tokens x, p;
  Window r;  // r_a is the newer entry, r_b the other one
  Tokens r_c;
  Window q;  // q_a is the newer entry; the other one is not read
  Tokens y;
  Weights weights;  // [B, 3]
  bool fills;       // as in CombineArguments
};

struct RecordArguments {
  Samples samples;  // newest is turned when all is read
  Tokens x, p, y;
  Window r, q;
  EntrySums entry_sums;
  bool first;
};

}  // namespace dicache
