// A CPU in the place of a GPU: stands before csrc/cuda/device.cuh in the include path.
//
// Blocks run one after the other, in an order drawn anew for every launch, since a GPU promises
// none; in a cooperative launch, to the end or to where they wait for others. A block's threads are
// fibers that run until all of them wait at the same barrier or shuffle. Not shown here: races
// between barriers, and the memory order between blocks.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not overlap in time

struct uint4 {
  uint32_t x, y, z, w;
};

using __half = _Float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) {
    return {0x7fff};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

namespace emulator {

struct Index {
  unsigned x, y, z;
};

constexpr int kMaxThreads = 256;
inline char shuffled[kMaxThreads][16];
inline Index thread, block, grid;

void wait_for_all_threads();
void wait_for_other_blocks();
void run_grid(Index blocks, int threads, const std::function<void()>& body);
void run_resident_grid(int64_t blocks, int threads, const std::function<void()>& body);

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define gridDim emulator::grid

inline void __syncthreads() { emulator::wait_for_all_threads(); }

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned from = lane + distance < 32 ? threadIdx.x + distance : threadIdx.x;
  std::memcpy(emulator::shuffled[threadIdx.x], &value, sizeof(T));
  emulator::wait_for_all_threads();
  std::memcpy(&value, emulator::shuffled[from], sizeof(T));
  emulator::wait_for_all_threads();
  return value;
}

template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}

namespace dicache::cuda {

constexpr int64_t kLongestAxis = 2;  // so that three samples need two layers

struct Grid : emulator::Index {
  Grid(int64_t x, int64_t y = 1, int64_t z = 1)
      : Index{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)} {}
};

template <class... Parameters>
cudaError_t launch(cudaStream_t, Grid grid, int threads, void (*kernel)(Parameters...),
                   const std::type_identity_t<Parameters>&... arguments) {
  emulator::run_grid(grid, threads, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t launch_cooperative(cudaStream_t, int64_t blocks, int threads,
                               void (*kernel)(Parameters...),
                               const std::type_identity_t<Parameters>&... arguments) {
  emulator::run_resident_grid(blocks, threads, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void wait_for_other_blocks() { emulator::wait_for_other_blocks(); }

inline void store_16_bytes(void* to, uint4 value) { std::memcpy(to, &value, sizeof(value)); }

inline uint32_t pack_bfloat16(float first, float second) {
  return __float2bfloat16_rn(first).bits | uint32_t{__float2bfloat16_rn(second).bits} << 16;
}

inline unsigned take_ticket(void* counter, unsigned last) {
  unsigned* count = static_cast<unsigned*>(counter);
  const unsigned ticket = *count;
  *count = ticket >= last ? 0 : ticket + 1;
  return ticket;
}

inline unsigned load_acquire(const unsigned* from) { return *from; }
inline void store_release(unsigned* to, unsigned value) { *to = value; }
inline void store_for_the_host(void* to, int value) { *static_cast<int*>(to) = value; }

}  // namespace dicache::cuda
