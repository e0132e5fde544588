// From torch tensors to the operators' plain arguments, with every check on the way.
//
// The rules are those of dicache/checks.py, made here again because a check in C++ costs nanoseconds.
// Beyond them the compiled bodies want the elements of one sample to be contiguous. Written against
// the stable ABI: a library built with one torch loads into any later one.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>

#include "dicache/arguments.h"

namespace dicache {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor, bool strides = false) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text << (dim ? ", " : "") << (strides ? tensor.stride(dim) : tensor.size(dim));
  }
  text << ']';
  return text.str();
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", name_of(tensor.scalar_type()),
                      ". Expected bfloat16, float16, float32 or float64.");
  }
}

inline void expect_type(const char* name, const Tensor& tensor, ScalarType expected,
                        const char* why) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " has dtype ",
                  name_of(tensor.scalar_type()), ". Expected ", why, name_of(expected), ".");
}

// Whether dimensions from `first` on are laid out without gaps. Strides of single elements, and of
// empty tensors, mean nothing.
inline bool is_dense(const Tensor& tensor, int64_t first) {
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= first; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) {
      return tensor.numel() == 0;
    }
    expected *= tensor.size(dim);
  }
  return true;
}

// Reads the arguments of one call. `x` sets batch, shape and device for all others.
class Reader {
 public:
  explicit Reader(const Tensor& x) : x_(x) {
    STD_TORCH_CHECK(x.dim() > 0, "x has no dimensions. Expected [B, ...], usually [B, S, D].");
    batch_ = x.size(0);
    size_ = 1;
    for (int64_t dim = 1; dim < x.dim(); ++dim) {
      size_ *= x.size(dim);
    }
  }

  int64_t batch() const { return batch_; }
  int64_t size() const { return size_; }

  Tokens tokens(const char* name, const Tensor& tensor) const {
    expect_shape(name, tensor, 0);
    expect_device(name, tensor);
    expect_dense(name, tensor, 1);
    return {tensor.data_ptr(), tensor.stride(0), dtype_of(name, tensor)};
  }

  // Tokens kept from an earlier step, in the dtype of `like`.
  Tokens tokens(const char* name, const Tensor& tensor, const Tensor& like) const {
    expect_type(name, tensor, like.scalar_type(), "the dtype of what it keeps, ");
    return tokens(name, tensor);
  }

  Tokens tokens(const char* name, const std::optional<Tensor>& tensor, const Tensor& like) const {
    return tensor ? tokens(name, *tensor, like) : Tokens{nullptr, 0, DType::kFloat32};
  }

  Window window(const char* name, const Tensor& tensor) const {
    expect_shape(name, tensor, 1);
    expect_device(name, tensor);
    expect_dense(name, tensor, 2);
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(name, tensor)};
  }

  Window window(const char* name, const Tensor& tensor, const Tensor& like) const {
    expect_type(name, tensor, like.scalar_type(), "the dtype of what it keeps, ");
    return window(name, tensor);
  }

  Samples samples(const Tensor& newest, const std::optional<Tensor>& active, bool is_wide) const {
    const void* flags = nullptr;
    if (active) {
      flags = per_sample("active", *active, ScalarType::Byte);
    }
    return {batch_, size_, is_wide,
            static_cast<const int32_t*>(per_sample("newest", newest, ScalarType::Int)),
            static_cast<const uint8_t*>(flags)};
  }

  EntrySums entry_sums(const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == batch_ && tensor.size(1) == kEntrySums &&
                        is_dense(tensor, 0),
                    "entry_sums has shape ", shape_of(tensor), " and strides ",
                    shape_of(tensor, true), ". Expected [", batch_, ", 4] and contiguous.");
    expect_device("entry_sums", tensor);
    return {tensor.data_ptr(), is_wide_sum("entry_sums", tensor)};
  }

  // gamma [B], at any stride: one number may serve all samples.
  void gamma(const Tensor& tensor, CombineArguments& arguments) const {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == batch_, "gamma has shape ",
                    shape_of(tensor), ". Expected [", batch_, "], one weight a sample.");
    expect_device("gamma", tensor);
    arguments.gamma = tensor.data_ptr();
    arguments.gamma_stride = tensor.stride(0);
    arguments.gamma_is_wide = is_wide_sum("gamma", tensor);
  }

  static bool is_wide_sum(const char* name, const Tensor& tensor) {
    const DType dtype = dtype_of(name, tensor);
    STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64, name, " has dtype ",
                    name_of(tensor.scalar_type()), ". Expected float32 or float64.");
    return dtype == DType::kFloat64;
  }

 private:
  void expect_shape(const char* name, const Tensor& tensor, int64_t leading) const {
    bool same = tensor.dim() == x_.dim() + leading && (leading == 0 || tensor.size(0) == 2);
    for (int64_t dim = 0; same && dim < x_.dim(); ++dim) {
      same = tensor.size(dim + leading) == x_.size(dim);
    }
    STD_TORCH_CHECK(same, name, " has shape ", shape_of(tensor), " and x ", shape_of(x_),
                    leading ? ". Expected two entries of x's shape, [2, B, ...]."
                            : ". Expected x's shape.");
  }

  void expect_device(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(
        tensor.is_cuda() == x_.is_cuda() && tensor.get_device_index() == x_.get_device_index(),
        name, " and x are on different devices. Expected one device.");
  }

  static void expect_dense(const char* name, const Tensor& tensor, int64_t first) {
    STD_TORCH_CHECK(is_dense(tensor, first), name, " has shape ", shape_of(tensor),
                    " and strides ", shape_of(tensor, true),
                    ". The elements of one sample must be contiguous; only the batch stride is "
                    "free. Call .contiguous(), or use backend='reference'.");
  }

  const void* per_sample(const char* name, const Tensor& tensor, ScalarType type) const {
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == batch_ && is_dense(tensor, 0), name,
                    " has shape ", shape_of(tensor), " and strides ", shape_of(tensor, true),
                    ". Expected [", batch_, "] and contiguous.");
    expect_type(name, tensor, type, "");
    expect_device(name, tensor);
    return tensor.data_ptr();
  }

  const Tensor& x_;
  int64_t batch_;
  int64_t size_;
};

inline Rule rule_of(double low, double high, bool least_squares, bool relative_to_probe) {
  STD_TORCH_CHECK(low <= high, "gamma is clipped to [", low, ", ", high,
                  "]. Expected low <= high.");
  return {low, high, least_squares, relative_to_probe};
}

// x and p may be parked in the slots that record overwrites, element by element. Any other overlap
// with a window would be read after it was written.
inline void expect_parked(const char* name, const Tokens& tokens, const Window& window,
                          const Samples& samples, int64_t element_bytes) {
  const char* begin = static_cast<const char*>(tokens.data);
  const char* window_begin = static_cast<const char*>(window.data);
  const int64_t last = samples.batch > 0 ? samples.batch - 1 : 0;
  const char* end = begin + (last * tokens.batch_stride + samples.size) * element_bytes;
  const char* window_end =
      window_begin + (window.entry_stride + last * window.batch_stride + samples.size) *
                         (window.dtype == DType::kFloat64   ? 8
                          : window.dtype == DType::kFloat32 ? 4
                                                            : 2);
  if (end <= window_begin || window_end <= begin) {
    return;
  }
  const bool is_entry = begin == window_begin ||
                        begin == window_begin + window.entry_stride * element_bytes;
  STD_TORCH_CHECK(is_entry && tokens.dtype == window.dtype &&
                      (samples.batch <= 1 || tokens.batch_stride == window.batch_stride),
                  name, " overlaps a window. It may be one whole entry of it, in the same dtype and "
                  "at the same strides, or lie elsewhere.");
}

}  // namespace dicache
