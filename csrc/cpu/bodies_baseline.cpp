// The CPU bodies for the compiler's default instruction set (SSE2 on x86-64, NEON on 64-bit Arm).
#include <math.h>

#include <cstdint>
#include <cstring>

#include "cpu/bodies.h"

const dicache::Bodies* dicache::baseline_bodies() { return dicache::kTable; }
