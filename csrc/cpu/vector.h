// SIMD lanes for the CPU bodies: sixteen elements, in GCC's and clang's vector types.
//
// The compiler maps them to whatever registers the instruction set of the including file has, so
// the order of additions, and with it every bit of a result, is the same on every CPU. bf16 and
// fp16 are decoded and rounded (to nearest, ties to even) by integer arithmetic, which needs no
// special instructions and is not affected by flush-to-zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "dicache/arguments.h"

namespace dicache {
namespace {

constexpr int kLanes = 16;

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using F32 = Lanes<float>::type;
using F64 = Lanes<double>::type;
using U16 = Lanes<uint16_t>::type;
using U32 = Lanes<uint32_t>::type;
using I32 = Lanes<int32_t>::type;
using U64 = Lanes<uint64_t>::type;

#define DICACHE_LANES inline __attribute__((always_inline))

template <class To, class From>
DICACHE_LANES To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

DICACHE_LANES F32 magnitude(F32 value) { return bits_of<F32>(bits_of<U32>(value) & 0x7fffffffu); }
DICACHE_LANES F64 magnitude(F64 value) {
  return bits_of<F64>(bits_of<U64>(value) & 0x7fffffffffffffffull);
}

// mask ? left : right, lane by lane; a mask's lanes are all ones or all zeros.
DICACHE_LANES U32 choose(I32 mask, U32 left, U32 right) {
  const U32 bits = bits_of<U32>(mask);
  return (left & bits) | (right & ~bits);
}

DICACHE_LANES F32 decode_bfloat16(U16 value) {
  return bits_of<F32>(__builtin_convertvector(value, U32) << 16);
}

DICACHE_LANES U16 encode_bfloat16(F32 value) {
  const U32 bits = bits_of<U32>(value);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 not_a_number = U32{} + 0x7fc0u;
  return __builtin_convertvector(choose(value != value, not_a_number, rounded), U16);
}

DICACHE_LANES F32 decode_float16(U16 value) {
  const U32 wide = __builtin_convertvector(value, U32);
  const U32 magnitude_bits = wide & 0x7fffu;
  const U32 shifted = magnitude_bits << 13;    // mantissa and exponent in fp32's places
  const U32 normal = shifted + (112u << 23);   // 127 - 15: the difference of the exponents' biases
  const U32 special = shifted + (224u << 23);  // infinity, NaN
  // A subnormal is mantissa x 2^-24: put the mantissa below a 1 of weight 2^-14, take that away.
  const U32 one = U32{} + (113u << 23);
  const U32 subnormal = bits_of<U32>(bits_of<F32>(shifted + one) - bits_of<F32>(one));
  const U32 finite = choose(magnitude_bits < 0x400u, subnormal, normal);
  const U32 result = choose(magnitude_bits < 0x7c00u, finite, special);
  return bits_of<F32>(result | ((wide & 0x8000u) << 16));
}

DICACHE_LANES U16 encode_float16(F32 value) {
  const U32 bits = bits_of<U32>(value);
  const U32 positive = bits & 0x7fffffffu;
  const U32 odd = (positive >> 13) & 1u;
  const U32 normal = (positive - (112u << 23) + 0xfffu + odd) >> 13;
  // Below 2^-14 adding 0.5 lets the adder itself round the mantissa to multiples of 2^-24.
  const U32 half = U32{} + 0x3f000000u;
  const U32 subnormal = bits_of<U32>(bits_of<F32>(positive) + bits_of<F32>(half)) - half;
  const U32 infinity = U32{} + 0x7c00u, not_a_number = U32{} + 0x7e00u;
  U32 result = choose(positive < (113u << 23), subnormal, normal);
  result = choose(positive >= 0x477ff000u, infinity, result);  // 65520 and more round to infinity
  result = choose(positive > 0x7f800000u, not_a_number, result);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), U16);
}

// From one precision of the arithmetic to the other.
template <class V>
struct Convert;

template <>
struct Convert<F32> {
  static DICACHE_LANES F32 from(F32 value) { return value; }
  static DICACHE_LANES F32 from(F64 value) { return __builtin_convertvector(value, F32); }
};

template <>
struct Convert<F64> {
  static DICACHE_LANES F64 from(F32 value) { return __builtin_convertvector(value, F64); }
  static DICACHE_LANES F64 from(F64 value) { return value; }
};

// The same number in every lane. Adding it to zeros would lose the sign of -0.
template <class V>
DICACHE_LANES V repeat(double value) {
  V result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = value;
  }
  return result;
}

// How a dtype lies in memory: kLanes elements, decoded to fp32 or fp64, and rounded once.
template <DType kDType>
struct Storage;

template <>
struct Storage<DType::kBFloat16> {
  using Raw = U16;
  static DICACHE_LANES F32 decode(U16 value) { return decode_bfloat16(value); }
  template <class V>
  static DICACHE_LANES U16 encode(V value) {
    return encode_bfloat16(Convert<F32>::from(value));
  }
};

template <>
struct Storage<DType::kFloat16> {
  using Raw = U16;
  static DICACHE_LANES F32 decode(U16 value) { return decode_float16(value); }
  template <class V>
  static DICACHE_LANES U16 encode(V value) {
    return encode_float16(Convert<F32>::from(value));
  }
};

template <>
struct Storage<DType::kFloat32> {
  using Raw = F32;
  static DICACHE_LANES F32 decode(F32 value) { return value; }
  template <class V>
  static DICACHE_LANES F32 encode(V value) {
    return Convert<F32>::from(value);
  }
};

template <>
struct Storage<DType::kFloat64> {
  using Raw = F64;
  static DICACHE_LANES F64 decode(F64 value) { return value; }
  template <class V>
  static DICACHE_LANES F64 encode(V value) {
    return Convert<F64>::from(value);
  }
};

}  // namespace
}  // namespace dicache
