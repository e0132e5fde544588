// The CPU backend: tasks on torch's threads, partial sums added in index order.
//
// Results are bitwise equal from run to run, for every number of threads and every instruction set.
#include <cstdint>
#include <vector>

#include "cpu/bodies_table.h"
#include "cpu/instruction_set.h"
#include "dicache/elements.h"
#include "dicache/launch_plan.h"
#include "torch/operators.h"

namespace dicache {
namespace {

// Fewer tasks a thread than this cost more to hand out than to run.
constexpr int64_t kTasksPerThread = 4;

const Bodies* select_bodies() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return avx512_bodies();
    case InstructionSet::kAvx2:
      return avx2_bodies();
    default:
      break;
  }
#endif
  return baseline_bodies();
}

// The instantiation for these dtypes: one of them all, or a mixture.
const Bodies& bodies(bool is_wide, std::initializer_list<DType> dtypes) {
  static const Bodies* const table = select_bodies();
  for (const DType dtype : dtypes) {
    if (dtype != *dtypes.begin()) {
      return table[is_wide ? kMixedWide : kMixed];
    }
  }
  return table[static_cast<int>(*dtypes.begin())];
}

// [B, kMaxPartials]: the partial sums of each sample, added in the order of its chunks.
std::vector<double> add_partials(const Samples& samples, const std::vector<double>& partials) {
  std::vector<double> totals(samples.batch * kMaxPartials);
  const int64_t chunks = cpu_chunks(samples.size);
  for (int64_t sample = 0; sample < samples.batch; ++sample) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* partial = partials.data() + (sample * chunks + chunk) * kMaxPartials;
      for (int sum = 0; sum < kMaxPartials; ++sum) {
        totals[sample * kMaxPartials + sum] += partial[sum];
      }
    }
  }
  return totals;
}

// (error, gamma) of every row of sums [B, columns], and of their sum.
template <class T>
void finish_rows(T* result, const T* sums, int64_t batch, Statistics kind, const Rule& rule) {
  const int columns = columns_of(kind);
  T total[kMaxColumns] = {};
  for (int64_t sample = 0; sample < batch; ++sample) {
    finish(result + 2 * sample, sums + sample * columns, kind, rule);
    for (int column = 0; column < columns; ++column) {
      total[column] += sums[sample * columns + column];
    }
  }
  finish(result + 2 * batch, total, kind, rule);
}

// Partial sums -> rows of sums -> (error, gamma).
template <class T, class Terms, class Arguments>
void conclude(const Arguments& arguments, const std::vector<double>& totals) {
  T* rows = static_cast<T*>(arguments.sums);
  for (int64_t sample = 0; sample < arguments.samples.batch; ++sample) {
    T* row = rows + sample * Terms::kColumns;
    if (!arguments.samples.is_active(sample)) {
      for (int column = 0; column < Terms::kColumns; ++column) {
        row[column] = 0;
      }
      continue;
    }
    T sums[kMaxPartials], entry_sums[kEntrySums];
    for (int sum = 0; sum < kMaxPartials; ++sum) {
      sums[sum] = static_cast<T>(totals[sample * kMaxPartials + sum]);
    }
    read_entry_sums(entry_sums, arguments.entry_sums, sample);
    Terms::columns(row, sums, entry_sums);
  }
  T* result = static_cast<T*>(arguments.result);
  finish_rows(result, rows, arguments.samples.batch, Terms::kKind, arguments.rule);
  if (arguments.mailbox.data != nullptr) {
    fill_mailbox(arguments.mailbox, result, 2 * (arguments.samples.batch + 1));
    __atomic_store_n(static_cast<int32_t*>(arguments.mailbox.data), arguments.mailbox.serial,
                     __ATOMIC_RELEASE);
  }
}

template <class Terms, class Arguments>
void conclude(const Arguments& arguments, const std::vector<double>& totals) {
  arguments.samples.is_wide ? conclude<double, Terms>(arguments, totals)
                            : conclude<float, Terms>(arguments, totals);
}

class Cpu {
 public:
  Cpu(const Tensor&, const std::optional<Tensor>&) {}

  void statistics(const ProbeArguments& arguments) const {
    const auto& body = bodies(arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype});
    const auto totals = reduce(body.probe, arguments);
    if (arguments.rule.least_squares) {
      arguments.with_input ? conclude<ProbeTerms<true, true>>(arguments, totals)
                           : conclude<ProbeTerms<true, false>>(arguments, totals);
    } else {
      arguments.with_input ? conclude<ProbeTerms<false, true>>(arguments, totals)
                           : conclude<ProbeTerms<false, false>>(arguments, totals);
    }
  }

  void statistics(const AlignmentArguments& arguments) const {
    const auto& body = bodies(arguments.samples.is_wide, {arguments.x.dtype, arguments.p.dtype});
    conclude<AlignmentTerms>(arguments, reduce(body.alignment, arguments));
  }

  void finish(const FinishArguments& arguments) const {
    arguments.is_wide ? finish_rows(static_cast<double*>(arguments.result),
                                    static_cast<const double*>(arguments.sums), arguments.batch,
                                    arguments.kind, arguments.rule)
                      : finish_rows(static_cast<float*>(arguments.result),
                                    static_cast<const float*>(arguments.sums), arguments.batch,
                                    arguments.kind, arguments.rule);
  }

  void expect_writable(const std::optional<Tensor>& mailbox) const {
    DICACHE_EXPECT(!mailbox || mailbox->is_cpu(),
                   "mailbox is not on the CPU, but x is. Expected memory that x's device writes.");
  }

  template <class Arguments>
  void probe_and_combine(const Arguments& arguments, const CombineArguments& combination) const {
    statistics(arguments);
    combine(combination);
  }

  void combine(const CombineArguments& arguments) const {
    const auto& body = bodies(arguments.samples.is_wide, {arguments.x.dtype, arguments.r.dtype});
    run(arguments.samples,
        [&](int64_t begin, int64_t end) { body.combine(arguments, begin, end); });
  }

  void extrapolate(const ExtrapolateArguments& arguments) const {
    const auto& body = bodies(arguments.samples.is_wide,
                              {arguments.x.dtype, arguments.p.dtype, arguments.r.dtype});
    run(arguments.samples,
        [&](int64_t begin, int64_t end) { body.extrapolate(arguments, begin, end); });
  }

  void record(const RecordArguments& arguments) const {
    const auto& body = bodies(arguments.samples.is_wide,
                              {arguments.x.dtype, arguments.p.dtype, arguments.y.dtype});
    const auto totals = reduce(body.record, arguments);
    for (int64_t sample = 0; sample < arguments.samples.batch; ++sample) {
      if (arguments.samples.is_active(sample)) {
        finish_record(arguments, sample, totals.data() + sample * kMaxPartials);
      }
    }
  }

 private:
  static int64_t tasks(const Samples& samples) { return samples.batch * cpu_chunks(samples.size); }

  template <class Body>
  static void run(const Samples& samples, const Body& body) {
    const int64_t count = tasks(samples);
    if (count <= kTasksPerThread) {  // not even asking for threads
      body(int64_t{0}, count);
    } else {
      torch::stable::parallel_for(0, count, kTasksPerThread, body);
    }
  }

  template <class Arguments>
  static std::vector<double> reduce(void (*body)(const Arguments&, int64_t, int64_t, double*),
                                    const Arguments& arguments) {
    std::vector<double> partials(tasks(arguments.samples) * kMaxPartials);
    run(arguments.samples,
        [&](int64_t begin, int64_t end) { body(arguments, begin, end, partials.data()); });
    return add_partials(arguments.samples, partials);
  }
};

STABLE_TORCH_LIBRARY_IMPL(dicache, CPU, m) { Operators<Cpu>::register_all(m); }

}  // namespace
}  // namespace dicache
