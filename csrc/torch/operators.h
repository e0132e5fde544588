// The operators for torch, once for every device: check, allocate the results, launch.
//
// `Backend` launches the bodies of one device; it is `Cpu` or `Cuda`. Schemas are defined in Python
// (dicache/ops.py); the function signatures below follow them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "dicache/elements.h"
#include "torch/checked.h"

namespace dicache {

// An uninitialised contiguous tensor beside x. The shim costs a third of a call of new_empty, which
// goes through the dispatcher.
inline Tensor make_empty(const Tensor& x, const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (int64_t dim = static_cast<int64_t>(shape.size()) - 2; dim >= 0; --dim) {
    strides[dim] = strides[dim + 1] * (shape[dim + 1] > 1 ? shape[dim + 1] : 1);
  }
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype,
                                                  device, x.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor make_rows(const Tensor& x, int64_t rows, int64_t columns, bool is_wide) {
  const int32_t dtype = is_wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  return make_empty(x, {rows, columns}, dtype);
}

// For y: of x's shape, in the window's dtype.
inline Tensor make_output(const Tensor& x, const Tensor& residual_window) {
  dtype_of("residual_window", residual_window);  // before a tensor of this dtype is made
  std::vector<int64_t> shape(x.dim());
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    shape[dim] = x.size(dim);
  }
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(residual_window.get(), &dtype));
  return make_empty(x, shape, dtype);
}

inline bool is_wide(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->scalar_type() == ScalarType::Double) {
      return true;
    }
  }
  return false;
}

template <class Backend>
struct Operators {
  static std::tuple<Tensor, Tensor> probe_statistics(
      Tensor x, Tensor p, Tensor p_prev, std::optional<Tensor> x_prev, Tensor probe_window,
      Tensor newest, Tensor entry_sums, double low, double high, bool least_squares,
      std::optional<Tensor> active, std::optional<Tensor> workspace) {
    const Results results = make_results(x, p, x_prev ? 7 : 5);
    Backend(x, workspace)
        .statistics(probe_arguments(x, p, p_prev, x_prev, probe_window, newest, entry_sums, low,
                                    high, least_squares, active, results));
    return {results.sums, results.result};
  }

  static void probe_statistics_out(Tensor x, Tensor p, Tensor p_prev, std::optional<Tensor> x_prev,
                                   Tensor probe_window, Tensor newest, Tensor entry_sums,
                                   double low, double high, bool least_squares,
                                   std::optional<Tensor> active, std::optional<Tensor> workspace,
                                   Tensor sums, Tensor result, std::optional<Tensor> mailbox,
                                   int64_t serial, std::optional<Tensor> promise) {
    const Results results{sums, result, mailbox, serial, promise};
    Backend backend(x, workspace);
    backend.expect_writable(mailbox);
    backend.statistics(probe_arguments(x, p, p_prev, x_prev, probe_window, newest, entry_sums, low,
                                       high, least_squares, active, results));
  }

  static std::tuple<Tensor, Tensor> alignment_statistics(Tensor x, Tensor p, Tensor probe_window,
                                                         Tensor newest, Tensor entry_sums,
                                                         double low, double high,
                                                         bool relative_to_probe,
                                                         std::optional<Tensor> active,
                                                         std::optional<Tensor> workspace) {
    const Results results = make_results(x, p, AlignmentTerms::kColumns);
    Backend(x, workspace)
        .statistics(alignment_arguments(x, p, probe_window, newest, entry_sums, low, high,
                                        relative_to_probe, active, results));
    return {results.sums, results.result};
  }

  static void alignment_statistics_out(Tensor x, Tensor p, Tensor probe_window, Tensor newest,
                                       Tensor entry_sums, double low, double high,
                                       bool relative_to_probe, std::optional<Tensor> active,
                                       std::optional<Tensor> workspace, Tensor sums, Tensor result,
                                       std::optional<Tensor> mailbox, int64_t serial,
                                       std::optional<Tensor> promise) {
    const Results results{sums, result, mailbox, serial, promise};
    Backend backend(x, workspace);
    backend.expect_writable(mailbox);
    backend.statistics(alignment_arguments(x, p, probe_window, newest, entry_sums, low, high,
                                           relative_to_probe, active, results));
  }

  static std::tuple<Tensor, Tensor, Tensor> probe_and_combine(
      Tensor x, Tensor p, std::optional<Tensor> p_prev, std::optional<Tensor> x_prev,
      Tensor probe_window, Tensor residual_window, Tensor newest, Tensor entry_sums, double low,
      double high, bool least_squares, bool relative_to_probe, bool by_sample,
      std::optional<Tensor> active, std::optional<Tensor> workspace) {
    const Results results = make_results(x, p, p_prev ? (x_prev ? 7 : 5) : 6);
    Tensor y = probe_and_combine_into(x, p, p_prev, x_prev, probe_window, residual_window, newest,
                                      entry_sums, low, high, least_squares, relative_to_probe,
                                      by_sample, active, Backend(x, workspace), results);
    return {results.sums, results.result, y};
  }

  static Tensor probe_and_combine_out(Tensor x, Tensor p, std::optional<Tensor> p_prev,
                                      std::optional<Tensor> x_prev, Tensor probe_window,
                                      Tensor residual_window, Tensor newest, Tensor entry_sums,
                                      double low, double high, bool least_squares,
                                      bool relative_to_probe, bool by_sample,
                                      std::optional<Tensor> active, std::optional<Tensor> workspace,
                                      Tensor sums, Tensor result, std::optional<Tensor> mailbox,
                                      int64_t serial, std::optional<Tensor> promise) {
    const Results results{sums, result, mailbox, serial, promise};
    Backend backend(x, workspace);
    backend.expect_writable(mailbox);
    return probe_and_combine_into(x, p, p_prev, x_prev, probe_window, residual_window, newest,
                                  entry_sums, low, high, least_squares, relative_to_probe,
                                  by_sample, active, std::move(backend), results);
  }

  static Tensor finish_probe_statistics(Tensor sums, double low, double high) {
    DICACHE_EXPECT(sums.dim() == 2 && (sums.size(1) == 5 || sums.size(1) == 7), "sums has shape ",
                   shape_of(sums), ". Expected [B, 5] or [B, 7].");
    const auto kind = sums.size(1) == 7 ? Statistics::kProbeWithInput : Statistics::kProbe;
    return finish_statistics(sums, rule_of(low, high, false, false), kind);
  }

  static Tensor finish_alignment_statistics(Tensor sums, double low, double high,
                                            bool relative_to_probe) {
    DICACHE_EXPECT(sums.dim() == 2 && sums.size(1) == 6, "sums has shape ", shape_of(sums),
                   ". Expected [B, 6].");
    const Rule rule = rule_of(low, high, true, relative_to_probe);
    return finish_statistics(sums, rule, Statistics::kAlignment);
  }

  static Tensor combine_residuals(Tensor x, Tensor residual_window, Tensor newest, Tensor gamma,
                                  std::optional<Tensor> active) {
    Tensor y = make_output(x, residual_window);
    combine_into(x, residual_window, newest, gamma, active, y, true);
    return y;
  }

  static void combine_residuals_out(Tensor x, Tensor residual_window, Tensor newest, Tensor gamma,
                                    std::optional<Tensor> active, Tensor out) {
    combine_into(x, residual_window, newest, gamma, active, out, false);
  }

  static Tensor extrapolate_residuals(Tensor x, Tensor p, Tensor residual_window, Tensor oldest,
                                      Tensor probe_window, Tensor newest, Tensor weights,
                                      std::optional<Tensor> active) {
    Tensor y = make_output(x, residual_window);
    extrapolate_into(x, p, residual_window, oldest, probe_window, newest, weights, active, y, true);
    return y;
  }

  static void extrapolate_residuals_out(Tensor x, Tensor p, Tensor residual_window, Tensor oldest,
                                        Tensor probe_window, Tensor newest, Tensor weights,
                                        std::optional<Tensor> active, Tensor out) {
    extrapolate_into(x, p, residual_window, oldest, probe_window, newest, weights, active, out,
                     false);
  }

  static void record_residuals(Tensor x, Tensor p, Tensor y, Tensor residual_window,
                               Tensor probe_window, Tensor newest, Tensor entry_sums, bool first,
                               std::optional<Tensor> active, std::optional<Tensor> workspace) {
    const Reader read(x);
    RecordArguments arguments{read.samples(newest, active, is_wide({&x, &p, &y})),
                              read.tokens("x", x),
                              read.tokens("p", p),
                              read.tokens("y", y),
                              read.window("residual_window", residual_window, y),
                              read.window("probe_window", probe_window, p),
                              read.entry_sums(entry_sums),
                              first};
    expect_separate(arguments);
    Backend(x, workspace).record(arguments);
  }

  static void register_all(torch::stable::detail::StableLibrary& library) {
    library.impl("probe_statistics", TORCH_BOX(&probe_statistics));
    library.impl("probe_statistics_out", TORCH_BOX(&probe_statistics_out));
    library.impl("alignment_statistics", TORCH_BOX(&alignment_statistics));
    library.impl("alignment_statistics_out", TORCH_BOX(&alignment_statistics_out));
    library.impl("probe_and_combine", TORCH_BOX(&probe_and_combine));
    library.impl("probe_and_combine_out", TORCH_BOX(&probe_and_combine_out));
    library.impl("finish_probe_statistics", TORCH_BOX(&finish_probe_statistics));
    library.impl("finish_alignment_statistics", TORCH_BOX(&finish_alignment_statistics));
    library.impl("combine_residuals", TORCH_BOX(&combine_residuals));
    library.impl("combine_residuals_out", TORCH_BOX(&combine_residuals_out));
    library.impl("extrapolate_residuals", TORCH_BOX(&extrapolate_residuals));
    library.impl("extrapolate_residuals_out", TORCH_BOX(&extrapolate_residuals_out));
    library.impl("record_residuals", TORCH_BOX(&record_residuals));
  }

 private:
  // What statistics write, made here or given.
  struct Results {
    Tensor sums, result;
    std::optional<Tensor> mailbox;
    int64_t serial;
    std::optional<Tensor> promise;
  };

  static Results make_results(const Tensor& x, const Tensor& p, int64_t columns) {
    const int64_t batch = Reader(x).batch();
    const bool wide = is_wide({&x, &p});
    return {make_rows(x, batch, columns, wide), make_rows(x, batch + 1, 2, wide), std::nullopt, 0,
            std::nullopt};
  }

  static ProbeArguments probe_arguments(const Tensor& x, const Tensor& p, const Tensor& p_prev,
                                        const std::optional<Tensor>& x_prev,
                                        const Tensor& probe_window, const Tensor& newest,
                                        const Tensor& entry_sums, double low, double high,
                                        bool least_squares, const std::optional<Tensor>& active,
                                        const Results& results) {
    const Reader read(x);
    const bool wide = is_wide({&x, &p});
    read.results("sums", results.sums, read.batch(), x_prev ? 7 : 5, wide);
    read.results("result", results.result, read.batch() + 1, 2, wide);
    const ProbeArguments arguments{
        read.samples(newest, active, wide),
        read.tokens("x", x),
        read.tokens("p", p),
        read.tokens("p_prev", p_prev, p),
        read.tokens("x_prev", x_prev, x),
        x_prev.has_value(),
        read.window("probe_window", probe_window, p),
        read.entry_sums(entry_sums),
        rule_of(low, high, least_squares, false),
        results.sums.data_ptr(),
        results.result.data_ptr(),
        read.mailbox(results.mailbox, results.serial, results.promise, wide)};
    expect_separate(arguments);
    return arguments;
  }

  static AlignmentArguments alignment_arguments(const Tensor& x, const Tensor& p,
                                                const Tensor& probe_window, const Tensor& newest,
                                                const Tensor& entry_sums, double low, double high,
                                                bool relative_to_probe,
                                                const std::optional<Tensor>& active,
                                                const Results& results) {
    const Reader read(x);
    const bool wide = is_wide({&x, &p});
    read.results("sums", results.sums, read.batch(), AlignmentTerms::kColumns, wide);
    read.results("result", results.result, read.batch() + 1, 2, wide);
    return {read.samples(newest, active, wide),
            read.tokens("x", x),
            read.tokens("p", p),
            read.window("probe_window", probe_window, p),
            read.entry_sums(entry_sums),
            rule_of(low, high, true, relative_to_probe),
            results.sums.data_ptr(),
            results.result.data_ptr(),
            read.mailbox(results.mailbox, results.serial, results.promise, wide)};
  }

  static Tensor probe_and_combine_into(const Tensor& x, const Tensor& p,
                                       const std::optional<Tensor>& p_prev,
                                       const std::optional<Tensor>& x_prev,
                                       const Tensor& probe_window, const Tensor& residual_window,
                                       const Tensor& newest, const Tensor& entry_sums, double low,
                                       double high, bool least_squares, bool relative_to_probe,
                                       bool by_sample, const std::optional<Tensor>& active,
                                       Backend backend, const Results& results) {
    DICACHE_EXPECT(p_prev || !x_prev, "x_prev is given without p_prev. Expected both, or p_prev.");
    const bool wide = is_wide({&x, &p});
    DICACHE_EXPECT(wide == is_wide({&x, &residual_window}), "p has dtype ",
                   name_of(p.scalar_type()), ", residual_window ",
                   name_of(residual_window.scalar_type()), " and x ", name_of(x.scalar_type()),
                   ". Expected float64 in both or none of (x, p) and (x, residual_window).");
    Tensor y = make_output(x, residual_window);
    const Reader read(x);
    const Samples samples = read.samples(newest, active, wide);
    const CombineArguments combination{
        samples,
        read.tokens("x", x),
        read.window("residual_window", residual_window),
        read.tokens("y", y),
        gamma_in(results.result.data_ptr(), samples, by_sample, wide),
        true};
    if (p_prev) {
      const auto statistics =
          probe_arguments(x, p, *p_prev, x_prev, probe_window, newest, entry_sums, low, high,
                          least_squares, active, results);
      expect_separate(statistics, combination);
      backend.probe_and_combine(statistics, combination);
    } else {
      backend.probe_and_combine(alignment_arguments(x, p, probe_window, newest, entry_sums, low,
                                                    high, relative_to_probe, active, results),
                                combination);
    }
    return y;
  }

  static void combine_into(const Tensor& x, const Tensor& residual_window, const Tensor& newest,
                           const Tensor& gamma, const std::optional<Tensor>& active,
                           const Tensor& out, bool fills) {
    const Reader read(x);
    const bool wide = is_wide({&x, &residual_window});
    CombineArguments arguments{read.samples(newest, active, wide),
                               read.tokens("x", x),
                               read.window("residual_window", residual_window),
                               read.tokens("out", out, residual_window),
                               read.gamma(gamma, wide),
                               fills};
    if (!fills) {
      expect_separate(arguments);
    }
    Backend(x, std::nullopt).combine(arguments);
  }

  static void extrapolate_into(const Tensor& x, const Tensor& p, const Tensor& residual_window,
                               const Tensor& oldest, const Tensor& probe_window,
                               const Tensor& newest, const Tensor& weights,
                               const std::optional<Tensor>& active, const Tensor& out, bool fills) {
    const Reader read(x);
    const bool wide = is_wide({&x, &p, &residual_window});
    ExtrapolateArguments arguments{read.samples(newest, active, wide),
                                   read.tokens("x", x),
                                   read.tokens("p", p),
                                   read.window("residual_window", residual_window),
                                   read.tokens("oldest", oldest, residual_window),
                                   read.window("probe_window", probe_window, p),
                                   read.tokens("out", out, residual_window),
                                   read.weights(weights, kExtrapolationWeights, wide),
                                   fills};
    if (!fills) {
      expect_separate(arguments);
    }
    Backend(x, std::nullopt).extrapolate(arguments);
  }

  static void expect_separate(const ProbeArguments& arguments) {
    const Samples& samples = arguments.samples;
    const Rows x = rows_of(arguments.x, samples), p = rows_of(arguments.p, samples);
    const Rows p_prev = rows_of(arguments.p_prev, samples);
    expect_distinct("p_prev", p_prev);
    expect_apart("p", p, "p_prev", p_prev);
    expect_apart("x", x, "p_prev", p_prev);
    for (const int entry : {0, 1}) {
      expect_apart("probe_window", rows_of(arguments.q, entry, samples), "p_prev", p_prev);
    }
    if (arguments.with_input) {
      const Rows x_prev = rows_of(arguments.x_prev, samples);
      expect_distinct("x_prev", x_prev);
      expect_apart("x", x, "x_prev", x_prev);
      expect_apart("p", p, "x_prev", x_prev);
      expect_both_kept("x_prev", x_prev, "p_prev", p_prev);
      for (const int entry : {0, 1}) {
        expect_apart("probe_window", rows_of(arguments.q, entry, samples), "x_prev", x_prev);
      }
    }
  }

  // What the combination reads must still be there when the statistics are done.
  static void expect_separate(const ProbeArguments& statistics,
                              const CombineArguments& combination) {
    const Samples& samples = statistics.samples;
    std::vector<std::pair<const char*, Rows>> written{
        {"p_prev", rows_of(statistics.p_prev, samples)}};
    if (statistics.with_input) {
      written.emplace_back("x_prev", rows_of(statistics.x_prev, samples));
    }
    for (const auto& [name, rows] : written) {
      expect_kept("x", rows_of(combination.x, samples), name, rows);
      for (const int entry : {0, 1}) {
        expect_kept("residual_window", rows_of(combination.r, entry, samples), name, rows);
      }
    }
  }

  static void expect_separate(const CombineArguments& arguments) {
    const Rows out = rows_of(arguments.y, arguments.samples);
    expect_distinct("out", out);
    expect_apart("x", rows_of(arguments.x, arguments.samples), "out", out);
    for (const int entry : {0, 1}) {
      expect_apart("residual_window", rows_of(arguments.r, entry, arguments.samples), "out", out);
    }
  }

  static void expect_separate(const ExtrapolateArguments& arguments) {
    const Samples& samples = arguments.samples;
    const Rows out = rows_of(arguments.y, samples);
    expect_distinct("out", out);
    expect_apart("x", rows_of(arguments.x, samples), "out", out);
    expect_apart("p", rows_of(arguments.p, samples), "out", out);
    expect_apart("oldest", rows_of(arguments.r_c, samples), "out", out);
    for (const int entry : {0, 1}) {
      expect_apart("residual_window", rows_of(arguments.r, entry, samples), "out", out);
      expect_apart("probe_window", rows_of(arguments.q, entry, samples), "out", out);
    }
  }

  // x and p may be parked in the entries that record overwrites.
  static void expect_separate(const RecordArguments& arguments) {
    const Samples& samples = arguments.samples;
    expect_distinct("residual_window", arguments.r, samples);
    expect_distinct("probe_window", arguments.q, samples);
    for (const int entry : {0, 1}) {
      const Rows r = rows_of(arguments.r, entry, samples), q = rows_of(arguments.q, entry, samples);
      for (const auto& [name, read] : {std::pair{"x", rows_of(arguments.x, samples)},
                                       std::pair{"p", rows_of(arguments.p, samples)},
                                       std::pair{"y", rows_of(arguments.y, samples)}}) {
        expect_apart(name, read, "residual_window", r);
        expect_apart(name, read, "probe_window", q);
      }
      for (const int other : {0, 1}) {
        expect_both_kept("residual_window", r, "probe_window",
                         rows_of(arguments.q, other, samples));
      }
    }
  }

  static Tensor finish_statistics(const Tensor& given, const Rule& rule, Statistics kind) {
    const Tensor sums = is_dense(given, 0) ? given : torch::stable::contiguous(given);
    const bool wide = Reader::is_wide_sum("sums", sums);
    Tensor result = make_rows(sums, sums.size(0) + 1, 2, wide);
    Backend(sums, std::nullopt)
        .finish({sums.size(0), kind, wide, rule, sums.data_ptr(), result.data_ptr()});
    return result;
  }
};

}  // namespace dicache
