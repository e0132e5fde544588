// The CUDA bodies as functions of plain arguments, a stream and, where they add up, a workspace.
//
// A workspace begins with a zeroed ticket; every launch leaves it zeroed. Launches that may run at
// the same time must not share one. None of these functions waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "dicache/arguments.h"
#include "dicache/launch_plan.h"

namespace dicache::cuda {

struct Reduction {
  LaunchPlan plan;
  void* workspace;
  cudaStream_t stream;
};

cudaError_t launch_statistics(const ProbeArguments& arguments, const Reduction& reduction);
cudaError_t launch_statistics(const AlignmentArguments& arguments, const Reduction& reduction);
cudaError_t launch_record(const RecordArguments& arguments, const Reduction& reduction);
cudaError_t launch_combine(const CombineArguments& arguments, cudaStream_t stream);
cudaError_t launch_extrapolate(const ExtrapolateArguments& arguments, cudaStream_t stream);
// x, p and the residuals have one dtype. Refused where not all blocks can be resident.
cudaError_t launch_probe_and_combine(const ProbeArguments& arguments,
                                     const CombineArguments& combination,
                                     const Reduction& reduction);
cudaError_t launch_probe_and_combine(const AlignmentArguments& arguments,
                                     const CombineArguments& combination,
                                     const Reduction& reduction);
cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream);

}  // namespace dicache::cuda
