// What only a GPU does: launches, and memory that several blocks, or the host, look at.
// tests/cuda_emulator/ has the same names for a CPU, so that the kernels can be tested, indices,
// tails, aliases and all, where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dicache::cuda {

constexpr int64_t kLongestAxis = 65535;  // of y and z

struct Grid {
  Grid(int64_t x, int64_t y = 1, int64_t z = 1)
      : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)), z(static_cast<unsigned>(z)) {}
  unsigned x, y, z;
};

template <class... Parameters>
cudaError_t launch(cudaStream_t stream, Grid grid, int threads, void (*kernel)(Parameters...),
                   const std::type_identity_t<Parameters>&... arguments) {
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// All blocks are resident at once, so that they may wait for each other; refused where they cannot
// be.
template <class... Parameters>
cudaError_t launch_cooperative(cudaStream_t stream, int64_t blocks, int threads,
                               void (*kernel)(Parameters...),
                               const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// One 16-byte store. The compiler takes a plain one apart where the parts come from fp64 registers.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Two numbers rounded to bf16, the first in the lower half of the word.
__device__ __forceinline__ uint32_t pack_bfloat16(float first, float second) {
  const __nv_bfloat162_raw both = __floats2bfloat162_rn(first, second);
  return __builtin_bit_cast(uint32_t, both);
}

// The counter's old value; it counts up to `last` and then starts at zero again. Acquire and
// release for the whole device: what this thread stored before is visible to whoever draws a later
// ticket.
__device__ __forceinline__ unsigned take_ticket(void* counter, unsigned last) {
  unsigned ticket;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(ticket)
               : "l"(counter), "r"(last)
               : "memory");
  return ticket;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
}

// The host that sees this value sees what the block stored before, too.
__device__ __forceinline__ void store_for_the_host(void* to, int value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
}

// In a loop that waits for another block.
__device__ __forceinline__ void wait_for_other_blocks() {}

}  // namespace dicache::cuda
