// Two fp32 numbers that are computed with side by side: from sm_100 on in one instruction, before
// that in two, with the same bits.
#pragma once

#include "cuda/device.cuh"

namespace dicache::cuda {

struct alignas(8) Pair {
  float x, y;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
// The compiler does not use these by itself.
#define DICACHE_PAIRWISE(operation, a, b)                                            \
  uint64_t result;                                                                   \
  asm(operation ".rn.f32x2 %0, %1, %2;"                                              \
      : "=l"(result)                                                                 \
      : "l"(__builtin_bit_cast(uint64_t, a)), "l"(__builtin_bit_cast(uint64_t, b))); \
  return __builtin_bit_cast(Pair, result)

__device__ __forceinline__ Pair operator+(Pair a, Pair b) { DICACHE_PAIRWISE("add", a, b); }
__device__ __forceinline__ Pair operator-(Pair a, Pair b) { DICACHE_PAIRWISE("sub", a, b); }
__device__ __forceinline__ Pair operator*(Pair a, Pair b) { DICACHE_PAIRWISE("mul", a, b); }
#undef DICACHE_PAIRWISE

__device__ __forceinline__ void add_product(Pair& sum, Pair a, Pair b) {
  uint64_t result;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(result)
      : "l"(__builtin_bit_cast(uint64_t, a)), "l"(__builtin_bit_cast(uint64_t, b)),
        "l"(__builtin_bit_cast(uint64_t, sum)));
  sum = __builtin_bit_cast(Pair, result);
}
#else
__device__ __forceinline__ Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
__device__ __forceinline__ Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
__device__ __forceinline__ void add_product(Pair& sum, Pair a, Pair b) {
  sum = {fmaf(a.x, b.x, sum.x), fmaf(a.y, b.y, sum.y)};
}
#endif

__device__ __forceinline__ Pair magnitude(Pair value) { return {fabsf(value.x), fabsf(value.y)}; }

__device__ __forceinline__ float total(Pair value) { return value.x + value.y; }
__device__ __forceinline__ float total(float value) { return value; }
__device__ __forceinline__ double total(double value) { return value; }

template <class V, class T>
__device__ __forceinline__ V broadcast(T value) {
  if constexpr (std::is_same_v<V, T>) {
    return value;
  } else {
    return {value, value};
  }
}

// One by one: what is added here are magnitudes, which such an instruction takes by itself.
__device__ __forceinline__ Pair& operator+=(Pair& sum, Pair value) {
  sum = {sum.x + value.x, sum.y + value.y};
  return sum;
}

}  // namespace dicache::cuda
