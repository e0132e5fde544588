// The CPU bodies as a table of functions, one table an instruction set.
//
// Every set is compiled from the same lines (bodies.h), and gives the same bits; `bodies()` in
// operators.cpp takes the widest one that this processor has.
#pragma once

#include <cstdint>

#include "dicache/arguments.h"

namespace dicache {

constexpr int kMaxPartials = 5;  // doubles a task leaves

// A body runs the tasks begin .. end; statistics and record leave a row of partials [tasks, 5].
struct Bodies {
  void (*probe)(const ProbeArguments&, int64_t begin, int64_t end, double* partials);
  void (*alignment)(const AlignmentArguments&, int64_t begin, int64_t end, double* partials);
  void (*combine)(const CombineArguments&, int64_t begin, int64_t end);
  void (*extrapolate)(const ExtrapolateArguments&, int64_t begin, int64_t end);
  void (*record)(const RecordArguments&, int64_t begin, int64_t end, double* partials);
};

// Which instantiation: all tensors in one dtype (the value of that DType), or a mixture.
constexpr int kMixed = 4, kMixedWide = 5, kLayouts = 6;

const Bodies* baseline_bodies();
#if defined(__x86_64__)
const Bodies* avx2_bodies();
const Bodies* avx512_bodies();
#endif

}  // namespace dicache
