// Launches of what joins the two segments of Perceiver attention on NVIDIA GPUs: Params and a
// stream in, an error's number out. No torch.
#include <limits>

#include "ops/perceiver_attention/perceiver_attention.cuh"

namespace vlmops::perceiver_attention {
namespace {

// A thread for each pack of so many elements.
template <class T, class Given>
int run(void (*kernel)(Given), const Given& given, int64_t elements, void* stream) {
  const int64_t blocks = divide_up(elements, kThreads * kPack<T>);
  if (blocks > std::numeric_limits<int>::max()) return kInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, given);
}

}  // namespace

int join_cuda(const Params& p, void* stream) {
  const int64_t count = p.rows * p.heads * p.dim;
  switch (p.dtype) {
    case DType::kBFloat16:
      return run<bfloat16>(perceiver_attention_join_kernel<bfloat16>, p, count, stream);
    case DType::kFloat16:
      return run<float16>(perceiver_attention_join_kernel<float16>, p, count, stream);
    default:
      return run<float>(perceiver_attention_join_kernel<float>, p, count, stream);
  }
}

int add_cuda(const Sum& s, void* stream) {
  switch (s.dtype) {
    case DType::kBFloat16:
      return run<bfloat16>(perceiver_attention_add_kernel<bfloat16>, s, s.count, stream);
    case DType::kFloat16:
      return run<float16>(perceiver_attention_add_kernel<float16>, s, s.count, stream);
    default:
      return run<float>(perceiver_attention_add_kernel<float>, s, s.count, stream);
  }
}

}  // namespace vlmops::perceiver_attention
