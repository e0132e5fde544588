// The CUDA kernels of csrc/cuda on CPU tensors: operators of the namespace dicache_emulated.
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/device.cuh"
// Behind device.cuh, which declares what these use.
#include "cuda/alignment.cu"
#include "cuda/combine.cu"
#include "cuda/extrapolate.cu"
#include "cuda/probe.cu"
#include "cuda/record.cu"
#include "torch/operators.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;

ucontext_t scheduler, fibers[kMaxThreads];
bool finished[kMaxThreads];
const std::function<void()>* current_body;

void run_fiber() {
  (*current_body)();
  finished[threadIdx.x] = true;
  swapcontext(&fibers[threadIdx.x], &scheduler);
}

// Every thread runs to its next barrier, again and again until all have ended.
void run_block(int threads) {
  static std::vector<char> stacks(kStackBytes * kMaxThreads);
  for (int index = 0; index < threads; ++index) {
    finished[index] = false;
    getcontext(&fibers[index]);
    fibers[index].uc_stack.ss_sp = stacks.data() + kStackBytes * index;
    fibers[index].uc_stack.ss_size = kStackBytes;
    fibers[index].uc_link = nullptr;
    makecontext(&fibers[index], run_fiber, 0);
  }
  while (!std::all_of(finished, finished + threads, [](bool done) { return done; })) {
    for (int index = 0; index < threads; ++index) {
      if (!finished[index]) {
        threadIdx.x = index;
        swapcontext(&scheduler, &fibers[index]);
      }
    }
  }
}

}  // namespace

void wait_for_all_threads() {
  const unsigned self = threadIdx.x;
  swapcontext(&fibers[self], &scheduler);
  threadIdx.x = self;
}

void run_grid(int64_t blocks, int threads, const std::function<void()>& body) {
  static std::mt19937 random(0);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  current_body = &body;
  gridDim.x = static_cast<unsigned>(blocks);
  for (const int64_t index : order) {
    blockIdx.x = static_cast<unsigned>(index);
    run_block(threads);
  }
}

}  // namespace emulator

namespace dicache {
namespace {

constexpr int kMultiprocessors = 2;  // 8 blocks: enough for the last one to have work

class EmulatedCuda {
 public:
  EmulatedCuda(const Tensor& x, const std::optional<Tensor>& workspace)
      : x_(x), workspace_(workspace) {}

  void probe(const ProbeArguments& arguments) {
    cuda::launch_probe(arguments, reduction(arguments.samples));
  }
  void alignment(const AlignmentArguments& arguments) {
    cuda::launch_alignment(arguments, reduction(arguments.samples));
  }
  void record(const RecordArguments& arguments) {
    cuda::launch_record(arguments, reduction(arguments.samples));
  }
  void combine(const CombineArguments& arguments) { cuda::launch_combine(arguments, nullptr); }
  void extrapolate(const ExtrapolateArguments& arguments) {
    cuda::launch_extrapolate(arguments, nullptr);
  }
  void finish(const FinishArguments& arguments) { cuda::launch_finish(arguments, nullptr); }

 private:
  cuda::Reduction reduction(const Samples& samples) {
    const LaunchPlan plan = plan_reduction(samples.batch, samples.size, kMultiprocessors);
    if (!workspace_) {
      workspace_ = make_empty(x_, {plan.workspace_bytes}, aoti_torch_dtype_uint8());
      std::memset(workspace_->data_ptr(), 0, sizeof(unsigned));
    }
    DICACHE_EXPECT(workspace_->numel() >= plan.workspace_bytes, "workspace is too small");
    return {plan, workspace_->data_ptr(), nullptr};
  }

  const Tensor& x_;
  std::optional<Tensor> workspace_;
};

STABLE_TORCH_LIBRARY_IMPL(dicache_emulated, CPU, m) { Operators<EmulatedCuda>::register_all(m); }

}  // namespace
}  // namespace dicache
