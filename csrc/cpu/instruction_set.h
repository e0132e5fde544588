// Which of the compiled instruction sets is used: the widest one that this processor has, or a
// narrower one named by the environment variable DICACHE_INSTRUCTION_SET, as the tests do.
#pragma once

#include <cstdlib>
#include <cstring>

namespace dicache {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* named = std::getenv("DICACHE_INSTRUCTION_SET");
  const bool any = named == nullptr || std::strcmp(named, "avx512") == 0;
  __builtin_cpu_init();
  if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if ((any || std::strcmp(named, "avx2") == 0) && __builtin_cpu_supports("avx2")) {
    return InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

}  // namespace dicache
