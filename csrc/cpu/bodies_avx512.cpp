// The CPU bodies for AVX-512 as of Skylake-X.
#if defined(__x86_64__)
#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "cpu/bodies.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const dicache::Bodies* dicache::avx512_bodies() { return dicache::kTable; }
#endif
