// From torch tensors to the operators' plain arguments, with every check on the way.
//
// The rules are those of dicache/checks.py, made here again because a check in C++ costs
// nanoseconds. Beyond them the compiled bodies want the elements of one sample to be contiguous.
// Written against the stable ABI: a library built with one torch loads into any later one.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dicache/arguments.h"

namespace dicache {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError in Python, with these parts as its text and no source file of the build in
// it.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A macro, so that the parts of a message are put together only where it is needed.
#define DICACHE_EXPECT(holds, ...)  \
  do {                              \
    if (!(holds)) [[unlikely]] {    \
      ::dicache::fail(__VA_ARGS__); \
    }                               \
  } while (false)

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
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "that is not supported";
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
      break;
  }
  fail(name, " has dtype ", name_of(tensor.scalar_type()),
       ". Expected bfloat16, float16, float32 or float64.");
}

inline void expect_type(const char* name, const Tensor& tensor, ScalarType expected,
                        const char* why) {
  DICACHE_EXPECT(tensor.scalar_type() == expected, name, " has dtype ",
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
    DICACHE_EXPECT(x.dim() > 0, "x has no dimensions. Expected [B, ...], usually [B, S, D].");
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
    DICACHE_EXPECT(tensor.dim() == 2 && tensor.size(0) == batch_ && tensor.size(1) == kEntrySums &&
                       is_dense(tensor, 0),
                   "entry_sums has shape ", shape_of(tensor), " and strides ",
                   shape_of(tensor, true), ". Expected [", batch_, ", 4] and contiguous.");
    expect_device("entry_sums", tensor);
    return {tensor.data_ptr(), is_wide_sum("entry_sums", tensor)};
  }

  // gamma [B], at any stride: one number may serve all samples.
  Weights gamma(const Tensor& tensor, bool is_wide) const {
    DICACHE_EXPECT(tensor.dim() == 1 && tensor.size(0) == batch_, "gamma has shape ",
                   shape_of(tensor), ". Expected [", batch_, "], one weight a sample.");
    return weights_of("gamma", tensor, is_wide);
  }

  // weights [B, columns], rows at any stride: one may serve all samples.
  Weights weights(const Tensor& tensor, int columns, bool is_wide) const {
    DICACHE_EXPECT(tensor.dim() == 2 && tensor.size(0) == batch_ && tensor.size(1) == columns,
                   "weights has shape ", shape_of(tensor), ". Expected [", batch_, ", ", columns,
                   "], a row a sample.");
    expect_dense("weights", tensor, 1);
    return weights_of("weights", tensor, is_wide);
  }

  // Results that the caller gave, [rows, columns] each.
  void results(const char* name, const Tensor& tensor, int64_t rows, int64_t columns,
               bool is_wide) const {
    DICACHE_EXPECT(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                       is_dense(tensor, 0),
                   name, " has shape ", shape_of(tensor), " and strides ", shape_of(tensor, true),
                   ". Expected [", rows, ", ", columns, "] and contiguous.");
    expect_type(name, tensor, is_wide ? ScalarType::Double : ScalarType::Float,
                "the dtype of the sums, ");
    expect_device(name, tensor);
  }

  // Whether a device may write to it is the backend's to say.
  Mailbox mailbox(const std::optional<Tensor>& tensor, int64_t serial,
                  const std::optional<Tensor>& promise, bool is_wide) const {
    if (!tensor) {
      return {nullptr, 0, nullptr, 0};
    }
    const int64_t num_bytes = kMailboxResult + 2 * (batch_ + 1) * (is_wide ? 8 : 4);
    DICACHE_EXPECT(is_dense(*tensor, 0) && tensor->scalar_type() == ScalarType::Byte &&
                       tensor->numel() >= num_bytes &&
                       reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 == 0,
                   "mailbox has ", tensor->numel(), " elements of ", name_of(tensor->scalar_type()),
                   ". Expected at least ", num_bytes,
                   " contiguous bytes (uint8, aligned to 16), from dicache.ops.make_results.");
    DICACHE_EXPECT(serial > 0 && serial <= INT32_MAX, "serial is ", serial,
                   ". Expected 1 to 2^31 - 1, another one than in the call before.");
    if (!promise) {
      return {tensor->data_ptr(), static_cast<int32_t>(serial), nullptr, 0};
    }
    expect_device("promise", *promise);
    const int64_t bytes = promise->element_size();
    DICACHE_EXPECT(promise->numel() == 1 && bytes <= kMailboxResult - kMailboxPromise,
                   "promise has ", promise->numel(), " elements of ", bytes,
                   " bytes. Expected one number of at most 8 bytes.");
    return {tensor->data_ptr(), static_cast<int32_t>(serial), promise->data_ptr(), bytes};
  }

  static bool is_wide_sum(const char* name, const Tensor& tensor) {
    const DType dtype = dtype_of(name, tensor);
    DICACHE_EXPECT(dtype == DType::kFloat32 || dtype == DType::kFloat64, name, " has dtype ",
                   name_of(tensor.scalar_type()), ". Expected float32 or float64.");
    return dtype == DType::kFloat64;
  }

 private:
  Weights weights_of(const char* name, const Tensor& tensor, bool is_wide) const {
    expect_device(name, tensor);
    const Weights weights{tensor.data_ptr(), tensor.stride(0), is_wide_sum(name, tensor)};
    DICACHE_EXPECT(is_wide || !weights.is_wide, name,
                   " has dtype float64. Expected float32, because none of the tokens and residuals "
                   "is float64.");
    return weights;
  }

  void expect_shape(const char* name, const Tensor& tensor, int64_t leading) const {
    bool same = tensor.dim() == x_.dim() + leading && (leading == 0 || tensor.size(0) == 2);
    for (int64_t dim = 0; same && dim < x_.dim(); ++dim) {
      same = tensor.size(dim + leading) == x_.size(dim);
    }
    DICACHE_EXPECT(
        same, name, " has shape ", shape_of(tensor), " and x ", shape_of(x_),
        leading ? ". Expected two entries of x's shape, [2, B, ...]." : ". Expected x's shape.");
  }

  void expect_device(const char* name, const Tensor& tensor) const {
    DICACHE_EXPECT(
        tensor.is_cuda() == x_.is_cuda() && tensor.get_device_index() == x_.get_device_index(),
        name, " and x are on different devices. Expected one device.");
  }

  static void expect_dense(const char* name, const Tensor& tensor, int64_t first) {
    DICACHE_EXPECT(is_dense(tensor, first), name, " has shape ", shape_of(tensor), " and strides ",
                   shape_of(tensor, true),
                   ". The elements of one sample must be contiguous; only the batch stride is "
                   "free. Call .contiguous(), or use backend='reference'.");
  }

  const void* per_sample(const char* name, const Tensor& tensor, ScalarType type) const {
    DICACHE_EXPECT(tensor.dim() == 1 && tensor.size(0) == batch_ && is_dense(tensor, 0), name,
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
  DICACHE_EXPECT(low <= high, "gamma is clipped to [", low, ", ", high, "]. Expected low <= high.");
  return {low, high, least_squares, relative_to_probe};
}

// A tensor's samples as ranges of bytes, to see what a launch would write twice or read too late.
struct Rows {
  const char* first;
  int64_t stride;  // bytes from sample to sample
  int64_t length;  // bytes of one sample
  int64_t batch;
  DType dtype;

  const char* begin(int64_t sample) const { return first + sample * stride; }
  const char* end() const { return begin(batch - 1) + length; }
};

inline Rows rows_of(const Tokens& tokens, const Samples& samples) {
  const int64_t bytes = bytes_of(tokens.dtype);
  return {static_cast<const char*>(tokens.data), tokens.batch_stride * bytes, samples.size * bytes,
          samples.batch, tokens.dtype};
}

inline Rows rows_of(const Window& window, int entry, const Samples& samples) {
  const int64_t bytes = bytes_of(window.dtype);
  const char* first = static_cast<const char*>(window.data) + entry * window.entry_stride * bytes;
  return {first, window.batch_stride * bytes, samples.size * bytes, samples.batch, window.dtype};
}

// Whether a sample of one lies over a sample of the other, but, if `may_be_same`, for a sample that
// is the other's in the same dtype.
inline bool do_overlap(const Rows& one, const Rows& two, bool may_be_same) {
  if (one.batch == 0 || one.length == 0 || one.end() <= two.first || two.end() <= one.first) {
    return false;
  }
  for (int64_t sample = 0; sample < one.batch; ++sample) {
    for (int64_t other = 0; other < two.batch; ++other) {
      const char *from = one.begin(sample), *to = two.begin(other);
      const bool is_same = from == to && sample == other && one.dtype == two.dtype;
      if (from < to + two.length && to < from + one.length && !(may_be_same && is_same)) {
        return true;
      }
    }
  }
  return false;
}

// Elements are read and then overwritten one by one, so a tensor that is read may be the one that
// is written, sample for sample. Any other overlap would be read after it was written.
inline void expect_apart(const char* read_name, const Rows& read, const char* written_name,
                         const Rows& written) {
  DICACHE_EXPECT(
      !do_overlap(read, written, true), read_name, " overlaps ", written_name,
      ", which is written. Expected the same memory in the same dtype, sample for sample, or "
      "memory of its own.");
}

// What is read once more after the other was written.
inline void expect_kept(const char* read_name, const Rows& read, const char* written_name,
                        const Rows& written) {
  DICACHE_EXPECT(!do_overlap(read, written, false), read_name, " overlaps ", written_name,
                 ", which is written before it is read again. Expected memory of its own.");
}

// What two tensors keep has to lie in two places.
inline void expect_both_kept(const char* name, const Rows& rows, const char* other_name,
                             const Rows& other) {
  DICACHE_EXPECT(!do_overlap(rows, other, false), name, " overlaps ", other_name,
                 ", and both are written. Expected memory of its own for each.");
}

// Two samples of a written tensor must not share memory.
inline void expect_distinct(const char* name, const Rows& rows) {
  DICACHE_EXPECT(rows.batch <= 1 || rows.length == 0 || rows.stride >= rows.length, name,
                 " is written, and its samples overlap (batch stride ", rows.stride,
                 " bytes, samples of ", rows.length,
                 " bytes). Expected samples with memory of their own.");
}

inline void expect_distinct(const char* name, const Window& window, const Samples& samples) {
  const Rows first = rows_of(window, 0, samples), second = rows_of(window, 1, samples);
  expect_distinct(name, first);
  DICACHE_EXPECT(
      !do_overlap(first, second, false), name,
      " is written, and its two entries overlap. Expected entries with memory of their own.");
}

}  // namespace dicache
