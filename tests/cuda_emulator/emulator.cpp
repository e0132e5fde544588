// The CUDA kernels of csrc/cuda on CPU tensors: operators of the namespace dicache_emulated.
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/device.cuh"
// Behind device.cuh, which declares what these use.
#include "cuda/alignment.cu"
#include "cuda/combine.cu"
#include "cuda/extrapolate.cu"
#include "cuda/probe.cu"
#include "cuda/probe_and_combine.cu"
#include "cuda/record.cu"
#include "torch/operators.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;

// A block's threads, each a fiber.
struct Block {
  explicit Block(int64_t index, int threads)
      : index(index), stacks(new char[kStackBytes * threads]), fibers(threads), ended(threads) {
    for (int thread = 0; thread < threads; ++thread) {
      getcontext(&fibers[thread]);
      fibers[thread].uc_stack.ss_sp = stacks.get() + kStackBytes * thread;
      fibers[thread].uc_stack.ss_size = kStackBytes;
      fibers[thread].uc_link = nullptr;
      makecontext(&fibers[thread], run_fiber, 0);
    }
  }

  static void run_fiber();

  // Every thread runs to its next barrier, again and again until all have ended, or until one of
  // them waits for another block, and the others for it.
  void run() {
    if (waits) {
      waits = false;
      resume(waiting);
    }
    while (!waits && !has_ended()) {
      for (size_t thread = 0; thread < fibers.size(); ++thread) {
        if (!ended[thread]) {
          resume(thread);
        }
      }
    }
  }

  void resume(size_t thread) {
    blockIdx.x = static_cast<unsigned>(index % gridDim.x);
    blockIdx.y = static_cast<unsigned>(index / gridDim.x % gridDim.y);
    blockIdx.z = static_cast<unsigned>(index / gridDim.x / gridDim.y);
    threadIdx.x = static_cast<unsigned>(thread);
    swapcontext(&scheduler, &fibers[thread]);
  }

  bool has_ended() const {
    return std::all_of(ended.begin(), ended.end(), [](bool each) { return each; });
  }

  int64_t index;
  std::unique_ptr<char[]> stacks;
  std::vector<ucontext_t> fibers;
  std::vector<bool> ended;
  bool waits = false;
  size_t waiting = 0;  // that thread

  static ucontext_t scheduler;
};

ucontext_t Block::scheduler;
Block* current_block;
const std::function<void()>* current_body;

void Block::run_fiber() {
  (*current_body)();
  current_block->ended[threadIdx.x] = true;
  swapcontext(&current_block->fibers[threadIdx.x], &scheduler);
}

std::vector<int64_t> shuffled_order(int64_t blocks) {
  static std::mt19937 random(0);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

}  // namespace

void wait_for_all_threads() { swapcontext(&current_block->fibers[threadIdx.x], &Block::scheduler); }

void wait_for_other_blocks() {
  current_block->waits = true;
  current_block->waiting = threadIdx.x;
  wait_for_all_threads();
}

void run_grid(Index blocks, int threads, const std::function<void()>& body) {
  current_body = &body;
  gridDim = blocks;
  for (const int64_t index : shuffled_order(int64_t{blocks.x} * blocks.y * blocks.z)) {
    Block block(index, threads);
    current_block = &block;
    block.run();
  }
}

// Shared memory is one for all blocks (`static`): none may need what it held before it waited.
void run_resident_grid(int64_t blocks, int threads, const std::function<void()>& body) {
  current_body = &body;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  std::deque<Block> waiting;
  for (const int64_t index : shuffled_order(blocks)) {
    waiting.emplace_back(index, threads);
  }
  while (!waiting.empty()) {
    current_block = &waiting.front();
    current_block->run();
    if (!current_block->has_ended()) {
      waiting.push_back(std::move(waiting.front()));
    }
    waiting.pop_front();
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

  void expect_writable(const std::optional<Tensor>&) const {}
  template <class Arguments>
  void statistics(const Arguments& arguments) {
    cuda::launch_statistics(arguments, reduction(arguments.samples));
  }
  template <class Arguments>
  void probe_and_combine(const Arguments& arguments, const CombineArguments& combination) {
    const cuda::Reduction reduction = this->reduction(arguments.samples);
    const DType dtype = arguments.x.dtype;
    if (arguments.p.dtype == dtype && combination.r.dtype == dtype) {
      cuda::launch_probe_and_combine(arguments, combination, reduction);
    } else {
      cuda::launch_statistics(arguments, reduction);
      cuda::launch_combine(combination, nullptr);
    }
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
