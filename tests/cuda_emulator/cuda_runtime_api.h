// The two names that csrc/cuda/launch.h takes from the CUDA runtime.
#pragma once

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
