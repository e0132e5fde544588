// How an operator is cut into pieces: grid, chunks, workspace. A function of the sizes and the
// device alone, so that sums are added in the same order in every run.
#pragma once

#include <cstdint>

namespace dicache {

// Elements a GPU thread takes in one step: of 16 bits, one 16-byte load.
constexpr int kGpuVector = 8;
constexpr int kGpuThreads = 256;
// Elements of a block where the grid is as large as the tensor.
constexpr int kGpuTile = 2 * kGpuThreads * kGpuVector;
// 4 x 256 threads leave 64 registers each, enough to keep two vectors of five streams in flight.
constexpr int kBlocksPerMultiprocessor = 4;

// Workspace of a launch that adds up: a ticket, then a row of partial sums a block.
constexpr int64_t kWorkspaceHeaderBytes = 128;
constexpr int64_t kWorkspaceBytesPerBlock = 64;

// Elements that one CPU task adds up in fp32 lanes before it goes on in fp64.
constexpr int64_t kCpuChunk = 8192;

struct LaunchPlan {
  int64_t blocks_per_sample;
  int64_t blocks;
  int threads;
  int64_t workspace_bytes;
};

inline int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Statistics and record: a resident grid whose blocks stride over one sample each. More samples
// than resident blocks get one block each.
inline LaunchPlan plan_reduction(int64_t batch, int64_t size, int multiprocessors) {
  const int64_t resident = int64_t{kBlocksPerMultiprocessor} * multiprocessors;
  const int64_t useful = ceil_divide(size, int64_t{kGpuThreads} * kGpuVector);
  const int64_t share = batch > 0 ? resident / batch : 1;
  const int64_t capped = useful < share ? useful : share;
  const int64_t per_sample = capped > 1 ? capped : 1;
  const int64_t blocks = batch > 0 ? per_sample * batch : 1;  // someone has to write the result
  return {per_sample, blocks, kGpuThreads,
          kWorkspaceHeaderBytes + kWorkspaceBytesPerBlock * blocks};
}

// Combine and extrapolate: a thread takes sixteen elements (two vectors of bf16, four of fp32) and
// ends, so the grid is as large as the tensor.
inline LaunchPlan plan_elementwise(int64_t batch, int64_t size) {
  const int64_t per_sample = ceil_divide(size, int64_t{kGpuTile});
  return {per_sample, per_sample * batch, kGpuThreads, 0};
}

inline int64_t cpu_chunks(int64_t size) { return ceil_divide(size, kCpuChunk); }

}  // namespace dicache
