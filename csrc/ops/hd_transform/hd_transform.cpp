// The only file of the HD transform that knows torch: schema, checks, Tensor -> Params,
// registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/numbers.h"
#include "binding/parallel.h"
#include "common/cpu_kernels.h"

namespace vlmops::hd_transform {
namespace {

using Sizes = std::vector<int64_t>;

struct Options {
  const char* op;
  const Sizes& crop_grids;  // rows and columns of each picture's crops
  const Sizes& valid_hw;    // rows and columns of tokens that are kept of each picture; empty: all
  int64_t factor;
  const std::string &reduction, &order;
  int64_t skip_prefix;
};

// Params but for pointers and strides, and all images: more, perhaps, than one Params holds.
struct Work {
  Params p;
  std::vector<Image> images;
};

// Tokens on a side of a crop, for features [.., N, C].
int side_of(const Options& o, const Argument& features) {
  const auto sizes = features.tensor.sizes();
  const int64_t rows = sizes[sizes.size() - 2], root = square_root(rows - o.skip_prefix);
  if (rows < o.skip_prefix || root * root != rows - o.skip_prefix) {
    fail(o.op, features.name, "expected crops of skip_prefix + g * g features, skip_prefix ",
         o.skip_prefix, ", got ", rows, " in shape ", describe(sizes));
  }
  if (root % o.factor != 0) {
    fail(o.op, features.name, "expected crops whose side factor ", o.factor, " divides, got ", root,
         " x ", root, " features");
  }
  if (root > std::numeric_limits<int16_t>::max())
    fail(o.op, features.name, "expected crops of at most 32767 features on a side, got ", root);
  return static_cast<int>(root / o.factor);
}

// Checks options and sizes.
Work work_of(const Options& o, const Argument& features) {
  const Tensor& t = features.tensor;
  const int64_t rank = t.dim();
  if (o.factor < 1 || o.factor > kMaxFactor)
    fail(o.op, "factor", "expected 1 to ", kMaxFactor, ", got ", o.factor);
  if (o.reduction != "none" && o.reduction != "mean")
    fail(o.op, "reduction", "expected None or 'mean', got '", o.reduction, "'");
  if (o.order != "sub_glb" && o.order != "glb_sub")
    fail(o.op, "order", "expected 'sub_glb' or 'glb_sub', got '", o.order, "'");
  if (o.skip_prefix < 0) fail(o.op, "skip_prefix", "expected 0 or more, got ", o.skip_prefix);
  if (rank != 3 && rank != 4)
    fail(o.op, features.name, "expected [crops, N, C] or [B, crops, N, C], got shape ",
         describe(t.sizes()));
  Work work{};
  Params& p = work.p;
  p.dtype = features.floating();
  p.channels = t.size(rank - 1);
  p.factor = static_cast<int>(o.factor);
  p.side = side_of(o, features);
  p.prefix = static_cast<int>(o.skip_prefix);
  p.mean = o.reduction == "mean";
  p.scale = 1.0f / static_cast<float>(p.block());
  p.sub_first = o.order == "sub_glb";
  const size_t images = o.crop_grids.size() / 2;
  if (rank == 4 && static_cast<int64_t>(images) != t.size(0))
    fail(o.op, "crop_grids", "expected one for each of the ", t.size(0), " images of ",
         features.name, " ", describe(t.sizes()), ", got ", images);
  if (!o.valid_hw.empty() && o.valid_hw.size() != o.crop_grids.size())
    fail(o.op, "valid_hw", "expected one for each of crop_grids' ", images, " images, got ",
         o.valid_hw.size() / 2);
  int64_t crop = 0;  // of a packed tensor
  for (size_t i = 0; i < images; ++i) {
    const int64_t h = o.crop_grids[2 * i], w = o.crop_grids[2 * i + 1];
    const int64_t most = std::numeric_limits<int16_t>::max();
    if (h < 1 || w < 1 || h > most || w > most)
      fail(o.op, "crop_grids", "expected at least one row and column of crops, got ", h, " x ", w,
           " for image ", i);
    const int64_t slots = rank == 4 ? t.size(1) : 1 + h * w;  // one image's crops, padding too
    if (1 + h * w > slots)
      fail(o.op, "crop_grids", "expected 1 + rows * columns of at most ", slots, " crops, as ",
           features.name, " ", describe(t.sizes()), " has, got ", h, " x ", w, " for image ", i);
    const int64_t full_h = h * p.side, full_w = w * p.side;
    const int64_t height = o.valid_hw.empty() ? full_h : o.valid_hw[2 * i];
    const int64_t width = o.valid_hw.empty() ? full_w : o.valid_hw[2 * i + 1];
    if (height < 0 || height > full_h || width < 0 || width > full_w)
      fail(o.op, "valid_hw", "expected at most the ", full_h, " x ", full_w,
           " tokens of the crops, got ", height, " x ", width, " for image ", i);
    Image image{};
    image.token = p.tokens;
    image.pixel = p.pixels;
    image.offset = rank == 4 ? static_cast<int64_t>(i) * t.stride(0) : crop * t.stride(0);
    image.w_crop = static_cast<int>(w);
    image.crops = static_cast<int>(h * w);
    image.height = static_cast<int>(height);
    image.width = static_cast<int>(width);
    work.images.push_back(image);
    p.tokens += part_tokens(image) + 1 + whole_tokens(p);
    p.pixels += slots * p.rows_of_crop();
    crop += slots;
  }
  if (rank == 3 && crop != t.size(0))
    fail(o.op, features.name, "expected the ", crop, " crops of crop_grids' ", images,
         " images, the whole picture before its parts, got shape ", describe(t.sizes()));
  p.crop_stride = t.stride(rank - 3);
  p.pixel_stride = t.stride(rank - 2);
  p.channel_stride = t.stride(rank - 1);
  return work;
}

// `learned`, one row of K values in any shape, checked.
void check_row(const Argument& learned, const Argument& features, int64_t depth) {
  learned.floating();
  learned.device_like(features);
  const auto sizes = learned.tensor.sizes();
  if (sizes.size() >= 1 && sizes[sizes.size() - 1] == depth && learned.tensor.numel() == depth)
    return;
  fail(learned.op, learned.name, "expected one row of ", depth,
       " values, those of a token, [K] or [1, .., 1, K], got shape ", describe(sizes));
}

// The same, in the dtype of the features and side by side.
Tensor row_of(const Tensor& learned, const Tensor& features) {
  Tensor row = learned;
  if (row.scalar_type() != features.scalar_type())
    row = torch::stable::to(row, std::make_optional(features.scalar_type()));
  return torch::stable::contiguous(row);
}

// f(params) for as many images at a time as Params holds. The pointers of what it is given are
// those of the first image's first row of tokens and of features.
template <class F>
void each_part(const Work& work, const F& f) {
  const size_t count = work.images.size();
  for (size_t begin = 0; begin < count; begin += kMaxImages) {
    const size_t end = std::min<size_t>(begin + kMaxImages, count);
    const Image& first = work.images[begin];
    Params p = work.p;
    p.tokens = (end == count ? work.p.tokens : work.images[end].token) - first.token;
    p.pixels = (end == count ? work.p.pixels : work.images[end].pixel) - first.pixel;
    p.image_count = static_cast<int>(end - begin);
    for (size_t i = begin; i < end; ++i) {
      Image& image = p.images[i - begin];
      image = work.images[i];
      image.token -= first.token;
      image.pixel -= first.pixel;
    }
    f(p, first);
  }
}

char* shifted(void* p, int64_t elements, const Params& params) {
  return static_cast<char*>(p) + elements * (params.dtype == DType::kFloat32 ? 4 : 2);
}
const char* shifted(const void* p, int64_t elements, const Params& params) {
  return shifted(const_cast<void*>(p), elements, params);
}

void run_cpu(CpuKernel kernel, const Params& p, int64_t rows, int64_t elements) {
  torch::stable::parallel_for(0, rows, grain(elements),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Checks everything; unless kMade the result is left empty.
template <bool kMade>
Tensor forward(const Tensor& image_features, const Tensor& newline, const Tensor& separator,
               const Sizes& crop_grids, const Sizes& valid_hw, int64_t factor,
               const std::string& reduction, const std::string& order, int64_t skip_prefix) {
  const Options o{"hd_transform", crop_grids, valid_hw, factor, reduction, order, skip_prefix};
  const Argument features{o.op, "image_features", image_features};
  Work work = work_of(o, features);
  Params& all = work.p;
  const int64_t depth = all.depth();
  check_row({o.op, "newline", newline}, features, depth);
  check_row({o.op, "separator", separator}, features, depth);
  Tensor out = torch::stable::new_empty(image_features, Sizes{all.tokens, depth});
  if (!kMade || out.numel() == 0) return out;
  const Tensor ends = row_of(newline, image_features), between = row_of(separator, image_features);
  all.src = image_features.const_data_ptr();
  all.newline = ends.const_data_ptr();
  all.separator = between.const_data_ptr();
  const Launch launch(o.op, image_features);
  launch.reads(image_features, "image_features");
  launch.reads(ends, "newline");
  launch.reads(between, "separator");
  launch.writes(out, "the result");
  each_part(work, [&](Params& p, const Image& first) {
    p.dst = shifted(out.mutable_data_ptr(), first.token * depth, p);
    if (launch.kernels == nullptr) return run_cpu(cpu_kernels().hd_transform, p, p.tokens, depth);
    launch.run(&CudaKernels::hd_transform, p);
  });
  return out;
}

// The gradients of the learned rows, [2, K].
std::vector<double> sums_on_cpu(const Work& work) {
  const int64_t depth = work.p.depth();
  std::vector<double> sums(2 * static_cast<size_t>(depth));
  each_part(work, [&](Params& p, const Image& first) {
    p.src = shifted(p.src, first.token * p.token_stride, p);
    const auto kernel = cpu_kernels().hd_transform_sums;
    torch::stable::parallel_for(0, depth, grain(p.tokens / std::max(p.side, 1)),
                                [&](int64_t b, int64_t e) { kernel(p, b, e, sums.data()); });
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& image_features,
                                            const Tensor& newline, const Tensor& separator,
                                            const Sizes& crop_grids, const Sizes& valid_hw,
                                            int64_t factor, const std::string& reduction,
                                            const std::string& order, int64_t skip_prefix,
                                            bool needs_features, bool needs_newline,
                                            bool needs_separator) {
  const Options o{
      "hd_transform_backward", crop_grids, valid_hw, factor, reduction, order, skip_prefix};
  const Argument features{o.op, "image_features", image_features}, upstream{o.op, "grad", grad};
  Work work = work_of(o, features);
  Params& all = work.p;
  const int64_t depth = all.depth();
  check_row({o.op, "newline", newline}, features, depth);
  check_row({o.op, "separator", separator}, features, depth);
  upstream.device_like(features);
  upstream.shape(Sizes{all.tokens, depth}, "that of the result");
  if (grad.scalar_type() != image_features.scalar_type()) {
    fail(o.op, upstream.name, "expected dtype ", describe(image_features.scalar_type()),
         ", that of image_features, got ", describe(grad.scalar_type()));
  }
  const Sizes shape(image_features.sizes().begin(), image_features.sizes().end()), none = {0};
  Tensor out = torch::stable::new_empty(grad, needs_features ? shape : none);
  Tensor of_newline = torch::stable::new_empty(newline, none);
  Tensor of_separator = torch::stable::new_empty(separator, none);
  all.src = grad.const_data_ptr();
  all.token_stride = grad.stride(0);
  all.token_channel_stride = grad.stride(1);
  const Launch launch(o.op, grad);
  if (out.numel() != 0) {
    launch.reads(grad, "grad");
    launch.writes(out, "the gradient of image_features");
    each_part(work, [&](Params& p, const Image& first) {
      p.src = shifted(p.src, first.token * p.token_stride, p);
      p.dst = shifted(out.mutable_data_ptr(), first.pixel * p.channels, p);
      if (launch.kernels == nullptr)
        return run_cpu(cpu_kernels().hd_transform_backward, p, p.pixels, p.channels);
      launch.run(&CudaKernels::hd_transform_backward, p);
    });
  }
  if (!needs_newline && !needs_separator) return {out, of_newline, of_separator};
  if (launch.kernels == nullptr) {
    const std::vector<double> sums = sums_on_cpu(work);
    if (needs_newline) of_newline = rounded_like(newline, sums.data());
    if (needs_separator) of_separator = rounded_like(separator, sums.data() + depth);
    return {out, of_newline, of_separator};
  }
  Tensor sums = torch::stable::new_zeros(grad, Sizes{2, depth}, ScalarType::Float);
  launch.reads(grad, "grad");
  launch.writes(sums, "the gradients of newline and separator");
  if (depth != 0) {
    each_part(work, [&](Params& p, const Image& first) {
      p.src = shifted(p.src, first.token * p.token_stride, p);
      launch.run(&CudaKernels::hd_transform_sums, p, static_cast<float*>(sums.mutable_data_ptr()));
    });
  }
  const auto take = [&](const Tensor& learned, int64_t row) {
    const Sizes like(learned.sizes().begin(), learned.sizes().end());
    Tensor one = torch::stable::view(torch::stable::narrow(sums, 0, row, 1), like);
    // A copy: outputs of an op do not share memory.
    return torch::stable::clone(torch::stable::to(one, std::make_optional(learned.scalar_type())));
  };
  if (needs_newline) of_newline = take(newline, 0);
  if (needs_separator) of_separator = take(separator, 1);
  return {out, of_newline, of_separator};
}

}  // namespace
}  // namespace vlmops::hd_transform

#define VLMOPS_HD_TRANSFORM_ARGUMENTS                                                              \
  "Tensor image_features, Tensor newline, Tensor separator, int[] crop_grids, int[] valid_hw=[], " \
  "int factor=2, str reduction=\"none\", str order=\"sub_glb\", int skip_prefix=0"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("hd_transform(" VLMOPS_HD_TRANSFORM_ARGUMENTS ") -> Tensor");
  // Memory for the result, once everything was checked.
  m.def("hd_transform_empty(" VLMOPS_HD_TRANSFORM_ARGUMENTS ") -> Tensor");
  // The gradients of image_features, newline and separator, of which shapes and dtypes alone are
  // read; those that nobody needs are empty.
  m.def("hd_transform_backward(Tensor grad, " VLMOPS_HD_TRANSFORM_ARGUMENTS
        ", bool needs_features=True, bool needs_newline=True, bool needs_separator=True) -> "
        "(Tensor, Tensor, Tensor)");
}

#define VLMOPS_HD_TRANSFORM_IMPL(m)                                               \
  m.impl("hd_transform", TORCH_BOX(&vlmops::hd_transform::forward<true>));        \
  m.impl("hd_transform_empty", TORCH_BOX(&vlmops::hd_transform::forward<false>)); \
  m.impl("hd_transform_backward", TORCH_BOX(&vlmops::hd_transform::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_HD_TRANSFORM_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_HD_TRANSFORM_IMPL(m); }
