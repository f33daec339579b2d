// Argument checks for op bindings. Every message names the op, the argument, what was expected and
// what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/types.h"

namespace vlmops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Streams `parts` into "vlmops.<op>: <argument>: <parts>" and throws; Python sees a RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "vlmops." << op << ": " << argument << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "[2, 17, 128]"
std::string describe(IntHeaderOnlyArrayRef sizes);
// "float32", as torch prints it without "torch."
const char* describe(ScalarType dtype);
// "cpu", "cuda:0"
std::string describe(const torch::stable::Device& device);

// From the first to the last byte of a tensor that is not empty.
int64_t bytes_spanned(const Tensor& tensor);

// What a tensor is called in messages, and the tensor.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  void device_like(const Argument& other) const;
  // Device, shape and dtype.
  void like(const Argument& other) const;
  void shape(IntHeaderOnlyArrayRef expected, const char* meaning) const;
  // The op's element type, or an error that lists the three.
  DType floating() const;
  IntType integer() const;
  void boolean() const;
  // For in-place ops: no two elements may share memory, within a tensor or between two.
  void no_internal_overlap() const;
  void no_overlap_with(const Argument& other) const;
  // For out=: no byte between the first and the last of either may belong to both.
  void apart_from(const Argument& other) const;
};

}  // namespace vlmops
