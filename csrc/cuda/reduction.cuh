// Sums over a whole grid in one launch, the same bits in every run.
//
// Every block adds up its part in a fixed tree and stores one row of partial sums in the workspace.
// The same thread then takes a ticket with acquire-release order: its release publishes the row,
// and the block that draws the last ticket has acquired the rows of all others. That block adds
// them up in a fixed order too, eight samples at once. The ticket wraps to zero by itself (atomic
// increment with a limit), so the next launch finds it ready.
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

// Leaves every warp's totals in shared memory, for whoever reads them behind a barrier. Lanes are
// added by halving distance.
template <int kSums, class T>
__device__ __forceinline__ void add_warps(T (&by_warp)[kWarps][kSums], T (&sums)[kSums]) {
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
}

// Stores this block's partial sums: lanes, then warps in order. True in every thread of the last
// block to arrive.
template <int kSums, class V>
__device__ __forceinline__ bool publish(const V (&lanes)[kSums], void* workspace) {
  using T = decltype(total(lanes[0]));
  T sums[kSums];
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    sums[sum] = total(lanes[sum]);
  }
  static_assert(kSums <= kMaxSums);
  __shared__ T by_warp[kWarps][kSums];
  __shared__ bool is_last;
  add_warps(by_warp, sums);
  __syncthreads();
  if (threadIdx.x == 0) {
    T* row = partial_row<T>(workspace, blockIdx.x);
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      for (int warp = 1; warp < kWarps; ++warp) {
        sums[sum] += by_warp[warp][sum];
      }
      row[sum] = sums[sum];
    }
    is_last = take_ticket(workspace, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();  // hands thread 0's acquire on to the other threads
  return is_last;
}

// How many samples the last block adds up at once, from `first` on. Fewer than it has warps get
// several warps each: one sample all eight, two four each, three two.
__device__ __forceinline__ int samples_at_once(int64_t first, int64_t batch) {
  return static_cast<int>(batch - first < kWarps ? batch - first : kWarps);
}

// The totals of sample `first + i` in thread i < count of the last block. Its threads have to meet
// before they come here again. __ldcg reads past the L1 cache, which knows nothing of other blocks'
// rows.
template <int kSums, class T>
__device__ __forceinline__ void add_partials(double (&totals)[kSums], void* workspace,
                                             int64_t first, int count, int64_t blocks_per_sample) {
  __shared__ double by_warp[kWarps][kSums];
  const int warps = kWarps / count;  // of one sample
  const int thread = threadIdx.x, sample = thread / (warps * kWarp);
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    totals[sum] = 0;
  }
  if (sample < count) {
    const int64_t rows = (first + sample) * blocks_per_sample;
    for (int64_t block = thread % (warps * kWarp); block < blocks_per_sample;
         block += warps * kWarp) {
      const T* row = partial_row<T>(workspace, rows + block);
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        totals[sum] += __ldcg(row + sum);
      }
    }
  }
  add_warps(by_warp, totals);
  __syncthreads();
  if (thread < count) {
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      totals[sum] = by_warp[thread * warps][sum];
    }
    for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        totals[sum] += by_warp[thread * warps + warp][sum];
      }
    }
  }
}

// Statistics' last block: partial sums -> rows of sums -> (error, gamma) of each sample and of the
// whole batch. A sample's division and square root are one thread's, the batch's row is thread 0's,
// which adds up the samples' rows in their order.
template <class Terms, class T, class Arguments>
__device__ __forceinline__ void conclude(const Arguments& arguments, void* workspace,
                                         int64_t blocks_per_sample) {
  __shared__ T rows[kWarps][Terms::kColumns];
  T* result = static_cast<T*>(arguments.result);
  T batch_row[Terms::kColumns] = {};
  const int64_t batch = arguments.samples.batch;
  for (int64_t first = 0; first < batch; first += kWarps) {
    const int count = samples_at_once(first, batch), thread = threadIdx.x;
    double totals[Terms::kSums];
    add_partials<Terms::kSums, T>(totals, workspace, first, count, blocks_per_sample);
    if (thread < count) {
      const int64_t sample = first + thread;
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
        rows[thread][column] = row[column];
        static_cast<T*>(arguments.sums)[sample * Terms::kColumns + column] = row[column];
      }
      finish(result + 2 * sample, row, Terms::kKind, arguments.rule);
    }
    __syncthreads();
    if (thread == 0) {
      for (int other = 0; other < count; ++other) {
#pragma unroll
        for (int column = 0; column < Terms::kColumns; ++column) {
          batch_row[column] += rows[other][column];
        }
      }
    }
  }
  if (threadIdx.x == 0) {
    finish(result + 2 * batch, batch_row, Terms::kKind, arguments.rule);
  }
  if (arguments.mailbox.data != nullptr) {
    __syncthreads();
    fill_mailbox(arguments.mailbox, result, 2 * (batch + 1), threadIdx.x, kGpuThreads);
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
