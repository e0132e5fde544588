// The CPU bodies for AVX2.
#if defined(__x86_64__)
#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#include "cpu/bodies.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const dicache::Bodies* dicache::avx2_bodies() { return dicache::kTable; }
#endif
