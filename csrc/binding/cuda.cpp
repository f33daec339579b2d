#include "binding/cuda.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "binding/check.h"

namespace vlmops {
namespace {

using GetStream = int (*)(int32_t device_index, void** stream);  // AOTITorchError

// Set once, when vlmops is imported, and by tests.
const CudaKernels* cuda = nullptr;
GetStream get_stream = nullptr;
std::string missing = "vlmops/_library.py has not looked for it";
std::atomic<const CudaKernels*> emulator{nullptr};

}  // namespace

bool is_on_gpu(const Tensor& tensor) {
  return tensor.device().type() == torch::headeronly::DeviceType::CUDA;
}

const CudaKernels* launchers_for(const Tensor& tensor) {
  if (!is_on_gpu(tensor)) return emulator.load(std::memory_order_relaxed);
  if (cuda == nullptr) throw std::runtime_error("vlmops: no CUDA kernels: " + missing);
  return cuda;
}

void* stream_of(const Tensor& tensor) {
  if (!is_on_gpu(tensor)) return nullptr;
  void* stream = nullptr;
  if (get_stream(static_cast<int32_t>(tensor.device().index()), &stream) != 0)
    throw std::runtime_error("vlmops: torch did not tell its current CUDA stream");
  return stream;
}

void check_launch(const CudaKernels& kernels, const char* op, int status) {
  if (status == 0) return;
  throw std::runtime_error(std::string("vlmops.") + op +
                           ": the kernel did not run: " + kernels.describe_status(status));
}

void allow(const CudaKernels& kernels, const Tensor& tensor, const char* name, bool read_only) {
  if (kernels.register_buffer == nullptr || tensor.numel() == 0) return;
  kernels.register_buffer(tensor.const_data_ptr(), bytes_spanned(tensor), name, read_only);
}

}  // namespace vlmops

// Called by vlmops/_library.py: the table of libvlmops_cuda and torch's own function for streams,
// or why there is none.
extern "C" __attribute__((visibility("default"))) void vlmops_set_cuda(
    const vlmops::CudaKernels* kernels, vlmops::GetStream stream, const char* reason) {
  vlmops::cuda = kernels;
  vlmops::get_stream = stream;
  vlmops::missing = reason;
}

// For tests: CPU tensors are served by an emulated GPU from now on; null for the CPU again.
extern "C" __attribute__((visibility("default"))) void vlmops_set_emulator(
    const vlmops::CudaKernels* kernels) {
  vlmops::emulator = kernels;
}
