// What only a GPU does: the launch and the ticket. tests/cuda_emulator/ has the same names for a
// CPU, so that the kernels can be tested, indices, tails, aliases and all, where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dicache::cuda {

template <class... Parameters>
cudaError_t launch(cudaStream_t stream, int64_t blocks, int threads, void (*kernel)(Parameters...),
                   const std::type_identity_t<Parameters>&... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// One 16-byte store. The compiler takes a plain one apart where the parts come from fp64 registers.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
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

}  // namespace dicache::cuda
