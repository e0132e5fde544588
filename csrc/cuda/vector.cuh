// Reading and writing one sample: sixteen bytes a thread at a time, single elements for the rest.
//
// Where all tensors of a call have one dtype (`Same`) that dtype is known at compile time. Where
// they differ (`Mixed`) it is looked up at every element, a choice that all threads of a launch
// make alike; the caches gather the bytes. A sample that does not begin at a multiple of sixteen
// bytes is read by single elements too, and so are the last few elements of every other.
#pragma once

#include "cuda/pair.cuh"

#include "dicache/elements.h"
#include "dicache/launch_plan.h"

namespace dicache::cuda {

// ---- elements ----

template <class T>
__device__ __forceinline__ T decode(__nv_bfloat16 value) {
  return static_cast<T>(__bfloat162float(value));
}
template <class T>
__device__ __forceinline__ T decode(__half value) {
  return static_cast<T>(__half2float(value));
}
template <class T>
__device__ __forceinline__ T decode(float value) {
  return static_cast<T>(value);
}
template <class T>
__device__ __forceinline__ T decode(double value) {
  return static_cast<T>(value);
}

// fp64 goes to 16 bits by way of fp32, as in PyTorch.
template <class E, class T>
__device__ __forceinline__ E encode(T value) {
  if constexpr (std::is_same_v<E, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<E>(value);
  }
}

// Numbers that are computed with side by side: V is T, or two of them.
template <class V, class T, int kWidth>
__device__ __forceinline__ V get(const T (&values)[kWidth], int i) {
  if constexpr (std::is_same_v<V, T>) {
    return values[i];
  } else {
    return {values[i], kWidth == 1 ? T(0) : values[i + 1]};
  }
}
template <class V, class T, int kWidth>
__device__ __forceinline__ void set(T (&values)[kWidth], int i, V value) {
  if constexpr (std::is_same_v<V, T>) {
    values[i] = value;
  } else {
    values[i] = value.x;
    if constexpr (kWidth > 1) {
      values[i + 1] = value.y;
    }
  }
}

// ---- one sample of a tensor ----

struct Sample {
  void* data;
  DType dtype;
};

__device__ __forceinline__ Sample sample_of(const Tokens& tokens, int64_t sample) {
  const int64_t offset = sample * tokens.batch_stride;
  return {static_cast<char*>(tokens.data) + offset * bytes_of(tokens.dtype), tokens.dtype};
}

__device__ __forceinline__ Sample sample_of(const Window& window, int entry, int64_t sample) {
  const int64_t offset = entry * window.entry_stride + sample * window.batch_stride;
  return {static_cast<char*>(window.data) + offset * bytes_of(window.dtype), window.dtype};
}

// A part of a sample, from element `first` on. A format that knows its dtype saves the look-up, but
// in kernels that loop nvcc 13.0 then spends up to a sixth more instructions on a vector: they take
// `sample_of`.
template <class Format>
__device__ __forceinline__ Sample tile_of(const Tokens& tokens, int64_t sample, int64_t first) {
  const int64_t offset = sample * tokens.batch_stride + first;
  return {static_cast<char*>(tokens.data) + offset * Format::bytes_of(tokens.dtype), tokens.dtype};
}

template <class Format>
__device__ __forceinline__ Sample tile_of(const Window& window, int entry, int64_t sample,
                                          int64_t first) {
  const int64_t offset = entry * window.entry_stride + sample * window.batch_stride + first;
  return {static_cast<char*>(window.data) + offset * Format::bytes_of(window.dtype), window.dtype};
}

template <class... Tensors>
__device__ __forceinline__ bool are_aligned(const Tensors&... samples) {
  return ((reinterpret_cast<uint64_t>(samples.data) | ...) & 15u) == 0;
}

// ---- formats ----

// Every tensor holds elements E; arithmetic in Wide.
template <class E, class Wide>
struct Same {
  using T = Wide;
  using V = std::conditional_t<std::is_same_v<T, float>, Pair, T>;
  static constexpr int kLanes = sizeof(V) / sizeof(T);
  static constexpr int kVector = 16 / sizeof(E);
  static constexpr int kAtOnce = sizeof(E) == 2 ? 2 : 1;
  // A bf16 is the upper half of an fp32. Compilers do not see that one instruction a number is
  // enough to take it out of its word, nor that one puts two back, if both are used again.
  static constexpr bool kInHalves = std::is_same_v<E, __nv_bfloat16>;

  // kWidth neighbouring elements as they lie in memory.
  template <int kWidth>
  struct alignas(kWidth * sizeof(E)) Block {
    E element[kWidth];
  };
  template <int kWidth>
  struct Words {
    uint32_t word[kWidth * sizeof(E) / 4];
  };

  template <int kWidth>
  static __device__ __forceinline__ Block<kWidth> load(const Sample& sample, int64_t index) {
    const E* from = static_cast<const E*>(sample.data) + index;
    if constexpr (kWidth == 1) {
      return {*from};
    } else {
      return __builtin_bit_cast(Block<kWidth>, *reinterpret_cast<const uint4*>(from));
    }
  }
  template <int kWidth>
  static __device__ __forceinline__ void store(const Sample& sample, int64_t index,
                                               const Block<kWidth>& block) {
    E* to = static_cast<E*>(sample.data) + index;
    if constexpr (kWidth == 1) {
      *to = block.element[0];
    } else {
      store_16_bytes(to, __builtin_bit_cast(uint4, block));
    }
  }
  // Element i, and the next one where there is one.
  template <int kWidth>
  static __device__ __forceinline__ V values(const Block<kWidth>& block, int i) {
    T numbers[kWidth];
    decode_all(numbers, block);
    return get<V>(numbers, i);
  }
  template <int kWidth>
  static __device__ __forceinline__ void decode_all(T (&values)[kWidth],
                                                    const Block<kWidth>& block) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (kInHalves && kWidth > 1) {
        const uint32_t word = __builtin_bit_cast(Words<kWidth>, block).word[i / 2];
        values[i] = __builtin_bit_cast(float, i % 2 == 0 ? word << 16 : word & 0xffff0000u);
      } else {
        values[i] = decode<T>(block.element[i]);
      }
    }
  }
  static __device__ __forceinline__ bool is_float16(const Sample&) {
    return std::is_same_v<E, __half>;
  }
  static __device__ __forceinline__ int64_t bytes_of(DType) { return sizeof(E); }
  // Stores, and leaves in `values` what was stored.
  template <int kWidth>
  static __device__ __forceinline__ void round_and_store(const Sample& sample, int64_t index,
                                                         T (&values)[kWidth]) {
    Block<kWidth> block;
    if constexpr (kInHalves && kWidth > 1) {
      Words<kWidth> words;
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        words.word[i / 2] = pack_bfloat16(values[i], values[i + 1]);
      }
      block = __builtin_bit_cast(Block<kWidth>, words);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        block.element[i] = encode<E>(values[i]);
      }
    }
    decode_all(values, block);
    store(sample, index, block);
  }
};

// Tensors hold different elements; arithmetic in Wide.
template <class Wide>
struct Mixed {
  using T = Wide;
  using V = T;
  static constexpr int kLanes = 1;
  static constexpr int kVector = 1;
  static constexpr int kAtOnce = 1;

  template <int kWidth>
  struct Block {
    T element[kWidth];
  };

  template <int kWidth>
  static __device__ __forceinline__ Block<kWidth> load(const Sample& sample, int64_t index) {
    switch (sample.dtype) {
      case DType::kBFloat16:
        return {decode<T>(static_cast<const __nv_bfloat16*>(sample.data)[index])};
      case DType::kFloat16:
        return {decode<T>(static_cast<const __half*>(sample.data)[index])};
      case DType::kFloat32:
        return {decode<T>(static_cast<const float*>(sample.data)[index])};
      default:
        return {decode<T>(static_cast<const double*>(sample.data)[index])};
    }
  }
  template <int kWidth>
  static __device__ __forceinline__ V values(const Block<kWidth>& block, int i) {
    return block.element[i];
  }
  static __device__ __forceinline__ bool is_float16(const Sample& sample) {
    return sample.dtype == DType::kFloat16;
  }
  static __device__ __forceinline__ int64_t bytes_of(DType dtype) {
    return dicache::bytes_of(dtype);
  }
  template <int kWidth>
  static __device__ __forceinline__ void round_and_store(const Sample& sample, int64_t index,
                                                         T (&values)[kWidth]) {
    switch (sample.dtype) {
      case DType::kBFloat16:
        return Same<__nv_bfloat16, T>::round_and_store(sample, index, values);
      case DType::kFloat16:
        return Same<__half, T>::round_and_store(sample, index, values);
      case DType::kFloat32:
        return Same<float, T>::round_and_store(sample, index, values);
      default:
        return Same<double, T>::round_and_store(sample, index, values);
    }
  }
  // For a block that came from a tensor of the same dtype, where rounding changes nothing.
  template <int kWidth>
  static __device__ __forceinline__ void store(const Sample& sample, int64_t index,
                                               const Block<kWidth>& block) {
    T values[kWidth] = {block.element[0]};
    round_and_store(sample, index, values);
  }
};

// Tokens of a step that is filled in.
template <class Format, int kWidth>
__device__ __forceinline__ void store_tokens(const Sample& y, int64_t index,
                                             typename Format::T (&values)[kWidth]) {
  using T = typename Format::T;
  if (Format::is_float16(y)) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = saturated(values[i], T(kLargestFloat16));
    }
  }
  Format::round_and_store(y, index, values);
}

// ---- the walk over a sample ----

// Which part of a sample this block works on.
struct Part {
  int64_t sample, index, count;
};

__device__ __forceinline__ Part part_of(int64_t blocks_per_sample) {
  const unsigned count = static_cast<unsigned>(blocks_per_sample);  // no more than blocks
  return {blockIdx.x / count, blockIdx.x % count, count};
}

// How many elements a call works on, as a type.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// Calls use(width, i, load(width, i)) for all elements: vectors first, single elements after them.
// kAtOnce = 2 loads two vectors of every tensor before it uses the first, which keeps more bytes on
// their way; 64 registers hold that for five tensors of 16-bit elements, not for more.
template <class Format, int kAtOnce, class Load, class Use>
__device__ __forceinline__ void walk(const Part& part, int64_t size, bool aligned, const Load& load,
                                     const Use& use) {
  const int64_t thread = part.index * kGpuThreads + threadIdx.x;
  const int64_t stride = part.count * kGpuThreads;
  int64_t done = 0;
  if constexpr (Format::kVector > 1) {
    if (aligned) {
      constexpr int k = Format::kVector;
      const Width<k> width;
      const int64_t vectors = size / k;
      int64_t vector = thread;
      if constexpr (kAtOnce == 2) {
        for (; vector + stride < vectors; vector += 2 * stride) {
          const int64_t first = vector * k, second = (vector + stride) * k;
          const auto first_loaded = load(width, first);
          const auto second_loaded = load(width, second);
          use(width, first, first_loaded);
          use(width, second, second_loaded);
        }
      }
      for (; vector < vectors; vector += stride) {
        use(width, vector * k, load(width, vector * k));
      }
      done = vectors * k;
    }
  }
  // Unrolling this loop would cost the one above registers.
  const Width<1> single;
#pragma unroll 1
  for (int64_t index = done + thread; index < size; index += stride) {
    use(single, index, load(single, index));
  }
}

// ---- one tile of a sample ----

// Where the grid is as large as the tensor: a block's sample lies on the axes y and z, of which
// neither may be longer than kLongestAxis, its tile on x. No division finds them.
inline Grid grid_of_tiles(const LaunchPlan& plan, int64_t batch) {
  const int64_t layers = ceil_divide(batch, kLongestAxis);
  return {plan.blocks_per_sample, ceil_divide(batch, layers), layers};
}

struct Tile {
  int64_t sample, first;
  int count;  // elements
};

// Empty for the blocks that fill up the last layer.
__device__ __forceinline__ Tile tile_of(const Samples& samples) {
  const int64_t sample = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  const int64_t first = int64_t{blockIdx.x} * kGpuTile;
  const int64_t left = sample < samples.batch ? samples.size - first : 0;
  return {sample, first, static_cast<int>(left < kGpuTile ? left : kGpuTile)};
}

// Calls use(width, i, load(width, i), weights()) for all elements of a tile: two vectors of every
// tensor are asked for, then the weights, and nothing is waited for before that. A thread's two
// vectors lie at a fixed distance, so that one address serves for both.
template <class Format, class Load, class Weigh, class Use>
__device__ __forceinline__ void walk_tile(const Tile& tile, bool aligned, const Load& load,
                                          const Weigh& weigh, const Use& use) {
  int done = 0;
  if constexpr (Format::kVector > 1) {
    constexpr int k = Format::kVector, kStep = kGpuThreads * k;
    const Width<k> width;
    if (aligned && tile.count == kGpuTile) {
#pragma unroll 1
      for (int step = 0; step < kGpuTile; step += 2 * kStep) {
        const int index = step + threadIdx.x * k;
        const auto first = load(width, index);
        const auto second = load(width, index + kStep);
        const auto weights = weigh();
        use(width, index, first, weights);
        use(width, index + kStep, second, weights);
      }
      return;
    }
    if (aligned) {
      done = tile.count / k * k;
      for (int index = threadIdx.x * k; index < done; index += kStep) {
        const auto loaded = load(width, index);
        use(width, index, loaded, weigh());
      }
    }
  }
  const Width<1> single;
#pragma unroll 1
  for (int index = done + threadIdx.x; index < tile.count; index += kGpuThreads) {
    const auto loaded = load(single, index);
    use(single, index, loaded, weigh());
  }
}

// What a new tensor holds where a sample is not active.
template <class Format>
__device__ __forceinline__ void fill_with_zeros(const Tile& tile, const Sample& y) {
#pragma unroll 1
  for (int index = threadIdx.x; index < tile.count; index += kGpuThreads) {
    typename Format::T zero[1] = {};
    Format::round_and_store(y, index, zero);
  }
}

}  // namespace dicache::cuda
