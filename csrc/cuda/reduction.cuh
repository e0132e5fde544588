// Sums over a whole grid in one launch, the same bits in every run.
//
// Every block adds up its part in a fixed tree and stores one row of partial sums in the workspace.
// The same thread then takes a ticket with acquire-release order: its release publishes the row,
// and the block that draws the last ticket has acquired the rows of all others. That block adds
// them in index order. The ticket wraps to zero by itself (atomic increment with a limit), so the
// next launch finds it ready.
#pragma once

#include <initializer_list>

#include "cuda/vector.cuh"

namespace dicache::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kGpuThreads / kWarp;
constexpr int kMaxSums = 5;
static_assert(kMaxSums * sizeof(double) <= kWorkspaceBytesPerBlock);

template <class T>
__device__ __forceinline__ T* partial_row(void* workspace, int64_t block) {
  char* rows = static_cast<char*>(workspace) + kWorkspaceHeaderBytes;
  return reinterpret_cast<T*>(rows + block * kWorkspaceBytesPerBlock);
}

// The block's totals, in thread 0. Lanes by halving distance, then warps in order.
template <int kSums, class T>
__device__ __forceinline__ void add_block(T (&sums)[kSums]) {
  __shared__ T by_warp[kWarps][kSums];
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sums[sum] += __shfl_down_sync(0xffffffffu, sums[sum], distance);
    }
    if (threadIdx.x % kWarp == 0) {
      by_warp[threadIdx.x / kWarp][sum] = sums[sum];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      for (int warp = 1; warp < kWarps; ++warp) {
        sums[sum] += by_warp[warp][sum];
      }
    }
  }
  __syncthreads();  // by_warp may be written again
}

// Stores this block's partial sums. True in every thread of the last block to arrive.
template <int kSums, class T>
__device__ __forceinline__ bool publish(T (&sums)[kSums], void* workspace) {
  static_assert(kSums <= kMaxSums);
  __shared__ bool is_last;
  add_block(sums);
  if (threadIdx.x == 0) {
    T* row = partial_row<T>(workspace, blockIdx.x);
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      row[sum] = sums[sum];
    }
    is_last = take_ticket(workspace, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();  // hands thread 0's acquire on to the other threads
  return is_last;
}

// The totals of one sample, in thread 0 of the last block. __ldcg reads past the L1 cache, which
// knows nothing of other blocks' rows.
template <int kSums, class T>
__device__ __forceinline__ void add_partials(double (&totals)[kSums], void* workspace,
                                             int64_t sample, int64_t blocks_per_sample) {
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    totals[sum] = 0;
  }
  for (int64_t block = threadIdx.x; block < blocks_per_sample; block += kGpuThreads) {
    const T* row = partial_row<T>(workspace, sample * blocks_per_sample + block);
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      totals[sum] += __ldcg(row + sum);
    }
  }
  add_block(totals);
}

// Statistics' last block: partial sums -> rows of sums -> (error, gamma) of each sample and of the
// whole batch. The division and the square root are thread 0's.
template <class Terms, class T, class Arguments>
__device__ __forceinline__ void conclude(const Arguments& arguments, void* workspace,
                                         int64_t blocks_per_sample) {
  T* rows = static_cast<T*>(arguments.sums);
  T* result = static_cast<T*>(arguments.result);
  T batch_row[Terms::kColumns] = {};
  for (int64_t sample = 0; sample < arguments.samples.batch; ++sample) {
    double totals[Terms::kSums];
    add_partials<Terms::kSums, T>(totals, workspace, sample, blocks_per_sample);
    if (threadIdx.x != 0) {
      continue;
    }
    T row[Terms::kColumns] = {};
    if (arguments.samples.is_active(sample)) {
      T sums[Terms::kSums], entry_sums[kEntrySums];
#pragma unroll
      for (int sum = 0; sum < Terms::kSums; ++sum) {
        sums[sum] = static_cast<T>(totals[sum]);
      }
      read_entry_sums(entry_sums, arguments.entry_sums, sample);
      Terms::columns(row, sums, entry_sums);
    }
#pragma unroll
    for (int column = 0; column < Terms::kColumns; ++column) {
      rows[sample * Terms::kColumns + column] = row[column];
      batch_row[column] += row[column];
    }
    finish(result + 2 * sample, row, Terms::kKind, arguments.rule);
  }
  if (threadIdx.x == 0) {
    finish(result + 2 * arguments.samples.batch, batch_row, Terms::kKind, arguments.rule);
  }
  if (arguments.mailbox.data != nullptr) {
    __syncthreads();
    fill_mailbox(arguments.mailbox, result, 2 * (arguments.samples.batch + 1), threadIdx.x,
                 kGpuThreads);
    __syncthreads();
    if (threadIdx.x == 0) {
      store_for_the_host(arguments.mailbox.data, arguments.mailbox.serial);
    }
  }
}

// The second word of a workspace counts the rounds of launches that wait for their whole grid. It
// is never set back: a block only looks for a change.
__device__ __forceinline__ unsigned current_round(const void* workspace) {
  return load_acquire(static_cast<const unsigned*>(workspace) + 1);
}

// Publishes what this block did to all blocks that see the new round.
__device__ __forceinline__ void begin_round(void* workspace, unsigned round) {
  store_release(static_cast<unsigned*>(workspace) + 1, round);
}

// Calls launch(Format{}) for tensors of one dtype.
template <class Launch>
cudaError_t with_one_dtype(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kBFloat16:
      return launch(Same<__nv_bfloat16, float>{});
    case DType::kFloat16:
      return launch(Same<__half, float>{});
    case DType::kFloat32:
      return launch(Same<float, float>{});
    default:
      return launch(Same<double, double>{});
  }
}

// Calls launch(Format{}) for the tensors' dtypes: one of them all, or a mixture.
template <class Launch>
cudaError_t with_format(bool is_wide, std::initializer_list<DType> dtypes, const Launch& launch) {
  for (const DType dtype : dtypes) {
    if (dtype != *dtypes.begin()) {
      return is_wide ? launch(Mixed<double>{}) : launch(Mixed<float>{});
    }
  }
  return with_one_dtype(*dtypes.begin(), launch);
}

}  // namespace dicache::cuda
