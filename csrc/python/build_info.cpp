// dicache._build_info: what only C++ knows of a build, and how an operator will be launched.
//
// A pybind11 module without torch: `dicache info` and the tests ask it for facts. The operators
// themselves are in _C and _C_cuda, which know neither Python nor pybind11; what setup.py knows is
// in _build.json. pybind11 has no stable ABI, so this is for one version of Python, and nothing
// that a run needs may stand here.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/instruction_set.h"
#include "dicache/launch_plan.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

const char* name_of(dicache::InstructionSet set) {
  switch (set) {
    case dicache::InstructionSet::kAvx512:
      return "AVX-512";
    case dicache::InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = compiler();
  facts["instruction_set"] = name_of(dicache::instruction_set());
  return facts;
}

py::dict launch_plan(const std::string& name, int64_t batch, int64_t size, int multiprocessors) {
  if (batch < 0 || size < 0 || multiprocessors < 1) {
    throw std::invalid_argument(
        "batch and size are at least 0 and multiprocessors at least 1; got " +
        std::to_string(batch) + ", " + std::to_string(size) + ", " +
        std::to_string(multiprocessors) + ".");
  }
  dicache::LaunchPlan plan{};
  if (name == "combine_residuals" || name == "extrapolate_residuals") {
    plan = dicache::plan_elementwise(batch, size);
  } else if (name == "probe_statistics" || name == "alignment_statistics" ||
             name == "probe_and_combine" || name == "record_residuals") {
    plan = dicache::plan_reduction(batch, size, multiprocessors);
  } else {
    throw std::invalid_argument("There is no launch plan for '" + name +
                                "'. Expected probe_statistics, alignment_statistics, "
                                "probe_and_combine, combine_residuals, extrapolate_residuals or "
                                "record_residuals.");
  }
  py::dict facts;
  facts["launches"] = 1;
  facts["blocks"] = plan.blocks;
  facts["threads"] = plan.threads;
  facts["workspace_bytes"] = plan.workspace_bytes;
  facts["cpu_tasks"] = batch * dicache::cpu_chunks(size);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  module.doc() = "What only C++ knows of a build, and how an operator will be launched.";
  module.def("build_facts", &build_facts,
             "The compiler, and the instruction set that the CPU operators use here.");
  module.def(
      "launch_plan", &launch_plan, py::arg("operator"), py::arg("batch"), py::arg("size"),
      py::arg("multiprocessors"),
      "Launches, blocks, threads and workspace bytes of an operator on a GPU, and tasks on a "
      "CPU, for `batch` samples of `size` elements.");
}
