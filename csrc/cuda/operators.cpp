// The CUDA backend: the current stream, the workspace, one launch an operator.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "torch/operators.h"

namespace dicache {
namespace {

void expect_launched(cudaError_t error) {
  DICACHE_EXPECT(error == cudaSuccess, "The launch failed: ", cudaGetErrorString(error), ".");
}

int multiprocessors_of(int device) {
  constexpr int kMaxDevices = 64;
  static int known[kMaxDevices] = {};  // a race writes the same number twice
  int count = device < kMaxDevices ? known[device] : 0;
  if (count == 0) {
    const cudaError_t error =
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    DICACHE_EXPECT(error == cudaSuccess, cudaGetErrorString(error));
    if (device < kMaxDevices) {
      known[device] = count;
    }
  }
  return count;
}

// Launches on the current stream of x's device.
class Cuda {
 public:
  Cuda(const Tensor& x, const std::optional<Tensor>& workspace)
      : x_(x), workspace_(workspace), device_(device_of(x)), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // A GPU writes to its own memory and to host memory that is mapped for it: pinned.
  void expect_writable(const std::optional<Tensor>& mailbox) const {
    if (!mailbox || (mailbox->is_cuda() && mailbox->get_device_index() == device_)) {
      return;
    }
    cudaPointerAttributes attributes{};
    const cudaError_t error = cudaPointerGetAttributes(&attributes, mailbox->data_ptr());
    DICACHE_EXPECT(error == cudaSuccess && attributes.type == cudaMemoryTypeHost,
                   "mailbox is in memory that x's device cannot write. Expected pinned host "
                   "memory, from dicache.ops.make_results.");
  }

  template <class Arguments>
  void statistics(const Arguments& arguments) {
    expect_launched(cuda::launch_statistics(arguments, reduction(arguments.samples)));
  }

  // One launch, or two where not all blocks can be resident.
  template <class Arguments>
  void probe_and_combine(const Arguments& arguments, const CombineArguments& combination) {
    const cuda::Reduction reduction = this->reduction(arguments.samples);
    if (!is_launched_as_one(arguments, combination, reduction)) {
      expect_launched(cuda::launch_statistics(arguments, reduction));
      expect_launched(cuda::launch_combine(combination, stream_));
    }
  }

  void record(const RecordArguments& arguments) {
    if (arguments.samples.batch > 0) {
      expect_launched(cuda::launch_record(arguments, reduction(arguments.samples)));
    }
  }

  void combine(const CombineArguments& arguments) {
    expect_launched(cuda::launch_combine(arguments, stream_));
  }

  void extrapolate(const ExtrapolateArguments& arguments) {
    expect_launched(cuda::launch_extrapolate(arguments, stream_));
  }

  void finish(const FinishArguments& arguments) {
    expect_launched(cuda::launch_finish(arguments, stream_));
  }

 private:
  template <class Arguments>
  bool is_launched_as_one(const Arguments& arguments, const CombineArguments& combination,
                          const cuda::Reduction& reduction) const {
    const DType dtype = arguments.x.dtype;
    const int64_t room = int64_t{kBlocksPerMultiprocessor} * multiprocessors_of(device_);
    if (arguments.p.dtype != dtype || combination.r.dtype != dtype ||
        reduction.plan.blocks > room) {
      return false;
    }
    const cudaError_t error = cuda::launch_probe_and_combine(arguments, combination, reduction);
    if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
      cudaGetLastError();  // a part of the GPU, under MPS or a green context: no error of anybody
      return false;
    }
    expect_launched(error);
    return true;
  }

  // The dispatcher may come here for a CPU x if another argument lies on a GPU.
  static int device_of(const Tensor& x) {
    DICACHE_EXPECT(x.is_cuda(),
                   "x is not on a CUDA device, but another argument is. Expected one device.");
    return x.get_device_index();
  }

  cuda::Reduction reduction(const Samples& samples) {
    const LaunchPlan plan =
        plan_reduction(samples.batch, samples.size, multiprocessors_of(device_));
    if (workspace_) {
      DICACHE_EXPECT(
          workspace_->is_cuda() && workspace_->get_device_index() == device_ &&
              is_dense(*workspace_, 0) && workspace_->scalar_type() == ScalarType::Byte &&
              workspace_->numel() >= plan.workspace_bytes &&
              reinterpret_cast<uintptr_t>(workspace_->data_ptr()) % 16 == 0,
          "workspace has ", workspace_->numel(), " elements of ",
          name_of(workspace_->scalar_type()), ". Expected at least ", plan.workspace_bytes,
          " contiguous bytes (uint8, aligned to 16) on x's device, from "
          "dicache.ops.make_workspace(x).");
    } else {
      workspace_ = make_empty(x_, {plan.workspace_bytes}, aoti_torch_dtype_uint8());
      expect_launched(cudaMemsetAsync(workspace_->data_ptr(), 0, sizeof(unsigned), stream_));
    }
    return {plan, workspace_->data_ptr(), stream_};
  }

  const Tensor& x_;
  std::optional<Tensor> workspace_;
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

STABLE_TORCH_LIBRARY_IMPL(dicache, CUDA, m) { Operators<Cuda>::register_all(m); }

}  // namespace
}  // namespace dicache
