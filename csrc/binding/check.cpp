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

void Argument::like(const Argument& other) const {
  device_like(other);
  shape(other.tensor.sizes(), other.name);
  if (tensor.scalar_type() != other.tensor.scalar_type()) {
    fail(op, name, "expected dtype ", describe(other.tensor.scalar_type()), ", that of ",
         other.name, ", got ", describe(tensor.scalar_type()));
  }
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

void Argument::boolean() const {
  if (tensor.scalar_type() != ScalarType::Bool)
    fail(op, name, "expected dtype bool, got ", describe(tensor.scalar_type()));
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

namespace {

// Whether two tensors of one rank, with the same element size and no overlap within, provably touch
// no element both. `distance` elements lie from the start of the first to that of the second.
bool disjoint(const Tensor& first, const Tensor& second, int64_t distance) {
  struct Dim {
    int64_t stride, first_reach, second_reach;
  };
  std::vector<Dim> dims;
  for (int64_t i = 0; i < first.dim(); ++i) {
    const int64_t n = first.size(i), m = second.size(i);
    if (n > 1 && m > 1 && first.stride(i) != second.stride(i)) dims.push_back({-1, 0, 0});
    const int64_t stride = n > 1 ? first.stride(i) : second.stride(i);
    if (n > 1 || m > 1) dims.push_back({stride, stride * (n - 1), stride * (m - 1)});
  }
  std::sort(dims.begin(), dims.end(),
            [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  int64_t first_reach = 0, second_reach = 0;
  for (const Dim& dim : dims) {
    first_reach += dim.first_reach;
    second_reach += dim.second_reach;
  }
  if (distance > first_reach) return true;  // one after the other
  if (!dims.empty() && dims[0].stride < 0) return false;
  // Slices of one tensor, as of a fused qkv: the second fits between the first's end and its next
  // repetition, for the dimensions below some stride.
  first_reach = second_reach = 0;
  for (const Dim& dim : dims) {
    if (distance > first_reach && distance + second_reach < dim.stride) return true;
    first_reach += dim.first_reach;
    second_reach += dim.second_reach;
  }
  return false;
}

}  // namespace

int64_t bytes_spanned(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

void Argument::no_overlap_with(const Argument& other) const {
  if (tensor.numel() == 0 || other.tensor.numel() == 0) return;
  const auto mine = reinterpret_cast<intptr_t>(tensor.const_data_ptr());
  const auto theirs = reinterpret_cast<intptr_t>(other.tensor.const_data_ptr());
  const intptr_t bytes = mine - theirs, size = static_cast<intptr_t>(tensor.element_size());
  const bool apart =
      bytes % size == 0 && (bytes >= 0 ? disjoint(other.tensor, tensor, bytes / size)
                                       : disjoint(tensor, other.tensor, -bytes / size));
  if (apart) return;
  fail(op, name, "expected memory of its own, since ", other.name, " and ", name,
       " are written in place, got one that may overlap ", other.name, "; clone it first");
}

void Argument::apart_from(const Argument& other) const {
  if (tensor.numel() == 0 || other.tensor.numel() == 0) return;
  const auto mine = reinterpret_cast<intptr_t>(tensor.const_data_ptr());
  const auto theirs = reinterpret_cast<intptr_t>(other.tensor.const_data_ptr());
  if (mine >= theirs + bytes_spanned(other.tensor) || theirs >= mine + bytes_spanned(tensor))
    return;
  fail(op, name, "expected memory of its own, since ", other.name,
       " is read while it is written, got one that may overlap ", other.name, "; clone it first");
}

}  // namespace vlmops
