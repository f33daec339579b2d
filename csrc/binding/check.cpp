#include "binding/check.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace vlmops {

std::string describe(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

const char* describe(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string describe(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  const int index = static_cast<int>(device.index());
  const std::string suffix = index < 0 ? "" : ":" + std::to_string(index);
  switch (device.type()) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda" + suffix;
    case DeviceType::Meta:
      return "meta";
    default:
      return "device type " + std::to_string(static_cast<int>(device.type())) + suffix;
  }
}

void Argument::device_like(const Argument& other) const {
  const auto mine = tensor.device(), theirs = other.tensor.device();
  if (mine.type() == theirs.type() && mine.index() == theirs.index()) return;
  fail(op, name, "expected on ", describe(theirs), ", where ", other.name, " is, got ",
       describe(mine));
}

void Argument::shape(IntHeaderOnlyArrayRef expected, const char* meaning) const {
  const auto sizes = tensor.sizes();
  if (sizes.size() == expected.size() && std::equal(sizes.begin(), sizes.end(), expected.begin()))
    return;
  fail(op, name, "expected shape ", describe(expected), ", that is ", meaning, ", got ",
       describe(sizes));
}

DType Argument::floating() const {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, name, "expected dtype float32, bfloat16 or float16, got ",
           describe(tensor.scalar_type()));
  }
}

IntType Argument::integer() const {
  switch (tensor.scalar_type()) {
    case ScalarType::Long:
      return IntType::kInt64;
    case ScalarType::Int:
      return IntType::kInt32;
    case ScalarType::Short:
      return IntType::kInt16;
    case ScalarType::Char:
      return IntType::kInt8;
    case ScalarType::Byte:
      return IntType::kUInt8;
    default:
      fail(op, name, "expected an integer dtype (int64, int32, int16, int8, uint8), got ",
           describe(tensor.scalar_type()));
  }
}

void Argument::no_internal_overlap() const {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // largest offset the dimensions so far can make
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) {
      fail(op, name,
           "expected a tensor whose elements do not share memory, since it is written in place, "
           "got shape ",
           describe(sizes), " with strides ", describe(strides), "; clone it first");
    }
    reach += stride * (size - 1);
  }
}

}  // namespace vlmops
