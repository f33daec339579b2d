// The only file of pixel shuffle that knows torch: schema, checks, Tensor -> Params, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/numbers.h"
#include "binding/parallel.h"
#include "binding/rms_norm.h"
#include "binding/rows.h"
#include "common/cpu_kernels.h"

namespace vlmops::pixel_shuffle {
namespace {

using OptionalTensor = std::optional<Tensor>;

// From this size on malloc takes fresh pages, and those lie in the cache once the kernel has zeroed
// them: bypassing it helps what only moves bits alone.
constexpr int64_t kFreshBytes = 32 << 20;

struct Options {
  const char* op;
  int64_t factor;
  std::string_view layout;  // of pixels: "auto", "grid", "packed" or "blocks"
  const Sizes& grid_hw;     // height and width of each image
  std::string_view order;
  std::string_view norm, norm_axis;
  double eps, norm_offset;
  std::string_view reduction;
  int64_t skip_prefix;
  bool drop_remainder;
};

// Images of one grid that follow one another.
struct Images {
  int64_t count, height, width;
};

// How images lie in a tensor of pixels [B, N, C], [N, C] or [B, h, w, C].
struct Layout {
  bool packed;  // images of one sequence, else one image, or row of blocks, to a sequence
  bool blocks;  // pixels lie in the order of their blocks: `width` is their number, height 1
  std::vector<Images> images;
  int64_t sequences, tokens;  // B; merged tokens of a sequence
  int64_t channels;           // of a pixel
};

void check_options(const Options& o) {
  if (o.factor < 1 || o.factor > kMaxFactor)
    fail(o.op, "factor", "expected 1 to ", kMaxFactor, ", got ", o.factor);
  if (o.order != "yxc" && o.order != "cyx")
    fail(o.op, "order", "expected 'yxc' or 'cyx', got '", o.order, "'");
  if (o.norm != "none" && o.norm != "layer" && o.norm != "rms")
    fail(o.op, "norm", "expected None, 'layer' or 'rms', got '", o.norm, "'");
  if (o.norm_axis != "merged" && o.norm_axis != "channel")
    fail(o.op, "norm_axis", "expected 'merged' or 'channel', got '", o.norm_axis, "'");
  if (o.reduction != "none" && o.reduction != "mean")
    fail(o.op, "reduction", "expected None or 'mean', got '", o.reduction, "'");
  if (o.reduction == "mean" && o.norm != "none" && o.norm_axis == "channel")
    fail(o.op, "norm_axis",
         "expected 'merged', the norm of what was averaged, with reduction='mean', "
         "got 'channel'");
  const auto eps = static_cast<float>(o.eps);
  if (!(eps > 0.0f && eps <= std::numeric_limits<float>::max()))
    fail(o.op, "eps", "expected a positive, finite float32 number, got ", o.eps);
  if (o.skip_prefix < 0) fail(o.op, "skip_prefix", "expected 0 or more, got ", o.skip_prefix);
}

// Height and width of whole blocks.
void check_grid(const Options& o, int64_t height, int64_t width, const char* name) {
  if (height < 0 || width < 0)
    fail(o.op, "grid_hw", "expected a height and a width of 0 or more, got ", height, " x ", width);
  if (o.drop_remainder || (height % o.factor == 0 && width % o.factor == 0)) return;
  fail(o.op, name, "expected a grid that factor ", o.factor, " divides, got ", height, " x ", width,
       "; drop_remainder=True drops what is left");
}

// How `sizes`, those of pixels, are laid out; checks grids.
Layout layout_of(const Options& o, const char* name, IntHeaderOnlyArrayRef sizes) {
  const int64_t rank = static_cast<int64_t>(sizes.size());
  if (rank < 2 || rank > 4)
    fail(o.op, name, "expected [B, N, C], [N, C] or [B, h, w, C], got shape ", describe(sizes));
  Layout l{};
  l.channels = sizes[rank - 1];
  l.sequences = rank == 2 ? 1 : sizes[0];
  const int64_t f = o.factor;
  if (rank == 4) {
    if (o.skip_prefix != 0)
      fail(o.op, "skip_prefix", "expected 0 with hidden_states of [B, h, w, C], got ",
           o.skip_prefix);
    if (o.layout == "packed" || o.layout == "blocks")
      fail(o.op, "grid_hw", "expected None or the grid of hidden_states ", describe(sizes),
           ", got ", o.layout == "packed" ? "a list of grids" : "'blocks'");
    if (o.layout == "grid" && (o.grid_hw[0] != sizes[1] || o.grid_hw[1] != sizes[2]))
      fail(o.op, "grid_hw", "expected the grid of hidden_states ", describe(sizes), ", got ",
           o.grid_hw[0], " x ", o.grid_hw[1]);
    check_grid(o, sizes[1], sizes[2], name);
    l.images.push_back({l.sequences, sizes[1], sizes[2]});
    l.tokens = (sizes[1] / f) * (sizes[2] / f);
    return l;
  }
  const int64_t tokens = sizes[rank - 2], pixels = tokens - o.skip_prefix;
  if (o.layout == "packed") {
    l.packed = true;
    if (rank == 3 && sizes[0] != 1)
      fail(o.op, name,
           "expected one sequence, [N, C] or [1, N, C], for a list of grids, got shape ",
           describe(sizes));
    int64_t expected = 0;
    for (size_t i = 0; i + 1 < o.grid_hw.size(); i += 2) {
      const int64_t height = o.grid_hw[i], width = o.grid_hw[i + 1];
      check_grid(o, height, width, "grid_hw");
      expected += o.skip_prefix + height * width;
      l.tokens += (height / f) * (width / f);
      if (!l.images.empty() && l.images.back().height == height && l.images.back().width == width) {
        ++l.images.back().count;
      } else {
        l.images.push_back({1, height, width});
      }
    }
    if (expected != tokens)
      fail(o.op, name, "expected the ", expected, " tokens of grid_hw's ", o.grid_hw.size() / 2,
           " images", o.skip_prefix == 0 ? "" : ", prefixes included", ", got shape ",
           describe(sizes));
    return l;
  }
  if (pixels < 0)
    fail(o.op, name, "expected at least the ", o.skip_prefix, " tokens of skip_prefix, got shape ",
         describe(sizes));
  int64_t height = 0, width = 0;
  if (o.layout == "blocks") {
    if (pixels % (f * f) != 0)
      fail(o.op, name, "expected blocks of ", f * f, " tokens, got ", pixels, " in shape ",
           describe(sizes));
    l.blocks = true;
    l.images.push_back({l.sequences, 1, pixels / (f * f)});
    l.tokens = pixels / (f * f);
    return l;
  }
  if (o.layout == "grid") {
    height = o.grid_hw[0];
    width = o.grid_hw[1];
    check_grid(o, height, width, "grid_hw");
    if (height * width != pixels)
      fail(o.op, name, "expected ", o.skip_prefix + height * width, " tokens, that is ",
           o.skip_prefix == 0 ? "" : "skip_prefix and ", height, " x ", width, ", got shape ",
           describe(sizes));
  } else {
    height = width = square_root(pixels);
    if (height * width != pixels)
      fail(o.op, name, "expected a square number of tokens where grid_hw is None, got ", pixels,
           " in shape ", describe(sizes), "; give grid_hw, or skip_prefix");
    check_grid(o, height, width, name);
  }
  l.images.push_back({l.sequences, height, width});
  l.tokens = (height / f) * (width / f);
  return l;
}

Sizes merged_shape(const Options& o, const Layout& l, int64_t rank) {
  const int64_t depth = o.reduction == "mean" ? l.channels : o.factor * o.factor * l.channels;
  Sizes shape = {l.sequences, l.tokens, depth};
  if (rank == 2) shape.erase(shape.begin());
  return shape;
}

// Strides of a tensor of pixels, or of merged tokens.
struct Strides {
  int64_t sequence, row, token, channel;  // row: of the grid, where the tensor has rows

  explicit Strides(const Tensor& t) {
    const int64_t rank = t.dim();
    sequence = rank == 2 ? 0 : t.stride(0);
    row = rank == 4 ? t.stride(1) : 0;
    token = t.stride(rank - 2);
    channel = t.stride(rank - 1);
  }
};

// first: the images' first pixel, counted over a packed sequence.
Pixels pixels_at(const Options& o, const Layout& l, const Images& images, const Strides& s,
                 int64_t rank, int64_t first) {
  const int64_t f = o.factor;
  Pixels at{};
  if (l.blocks) {
    at.block_row = 0;
    at.block_column = f * f * s.token;
    at.y = f * s.token;
  } else {
    at.y = rank == 4 ? s.row : images.width * s.token;
    at.block_row = f * at.y;
    at.block_column = f * s.token;
  }
  at.x = s.token;
  at.offset = (first + o.skip_prefix) * s.token;
  at.image = l.packed ? (o.skip_prefix + images.height * images.width) * s.token : s.sequence;
  return at;
}

DType dtype_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float      ? DType::kFloat32
         : t.scalar_type() == ScalarType::BFloat16 ? DType::kBFloat16
                                                   : DType::kFloat16;
}

// All of Params but what hangs on memory.
Params params_of(const Options& o, const Layout& l) {
  Params p{};
  p.channels = l.channels;
  p.factor = static_cast<int>(o.factor);
  p.order = o.order == "yxc" ? Order::kYxc : Order::kCyx;
  p.mean = o.reduction == "mean";
  p.norm = o.norm == "layer" ? Norm::kLayer : o.norm == "rms" ? Norm::kRms : Norm::kNone;
  p.norm_channels = o.norm_axis == "channel" && p.norm != Norm::kNone;
  p.eps = static_cast<float>(o.eps);
  p.offset = static_cast<float>(o.norm_offset);
  return p;
}

// The vectors of the norm, checked. A GPU's are made to lie side by side: strided ones cost it
// three times what a whole call does.
void set_norm(const Options& o, const Argument& hidden, OptionalTensor& weight,
              OptionalTensor& bias, Params& p) {
  if (p.norm == Norm::kNone && (weight.has_value() || bias.has_value())) {
    fail(o.op, "norm", "expected 'layer' or 'rms', as a ",
         weight.has_value() ? "norm_weight" : "norm_bias", " is given, got None");
  }
  const int64_t expected[] = {p.normed()};
  const char* meaning = p.norm_channels ? "[C], one for each channel of a token"
                        : p.mean        ? "[C], one for each channel"
                                        : "[factor^2 C], one for each channel of a merged token";
  const auto set = [&](const char* name, OptionalTensor& t, NormVector& w) {
    if (!t.has_value()) return;
    const Argument a{o.op, name, *t};
    w.dtype = a.floating();
    a.device_like(hidden);
    a.shape({expected, 1}, meaning);
    if (launchers_for(*t) != nullptr) t = torch::stable::contiguous(*t);
    w.data = t->const_data_ptr();
    w.stride = t->stride(0);
  };
  set("norm_weight", weight, p.weight);
  set("norm_bias", bias, p.bias);
}

// What a call reads and writes; absent tensors are null.
struct Operands {
  const Tensor* pixels;
  const Tensor* merged;
  Tensor* pixels_out;
  Tensor* merged_out;
};

// Params but for its groups, and all groups: more, perhaps, than one Params holds.
struct Work {
  Params p;
  std::vector<Group> groups;
};

// fresh: what is written was just allocated.
Work work_of(const Options& o, const Layout& l, const Params& params, const Operands& t,
             bool fresh) {
  Work work{params, {}};
  Params& p = work.p;
  const Tensor* const tensors[] = {t.pixels, t.merged, t.pixels_out, t.merged_out};
  std::optional<Strides> strides[4];
  for (int i = 0; i < 4; ++i) {
    if (tensors[i] == nullptr) continue;
    strides[i].emplace(*tensors[i]);
    p.dtype = dtype_of(*tensors[i]);
  }
  if (t.pixels != nullptr) {
    p.pixels = t.pixels->const_data_ptr();
    p.pixel_stride = strides[0]->channel;
  }
  if (t.merged != nullptr) {
    p.merged = t.merged->const_data_ptr();
    p.merged_stride = strides[1]->channel;
    p.token_stride = strides[1]->token;
  }
  if (t.pixels_out != nullptr) p.pixels_out = t.pixels_out->mutable_data_ptr();
  if (t.merged_out != nullptr) {
    p.merged_out = t.merged_out->mutable_data_ptr();
    p.token_stride_out = strides[3]->token;
  }

  int64_t pixel = 0, token = 0;  // within the sequence of packed images
  for (const Images& images : l.images) {
    Group g{};
    g.first = p.tokens;
    g.rows = l.blocks ? 1 : images.height / o.factor;
    g.columns = l.blocks ? images.width : images.width / o.factor;
    const int64_t tokens = g.rows * g.columns;
    if (t.pixels != nullptr) g.from = pixels_at(o, l, images, *strides[0], t.pixels->dim(), pixel);
    if (t.pixels_out != nullptr)
      g.to = pixels_at(o, l, images, *strides[2], t.pixels_out->dim(), pixel);
    if (t.merged != nullptr) {
      g.merged = token * p.token_stride;
      g.image = l.packed ? tokens * p.token_stride : strides[1]->sequence;
    }
    if (t.merged_out != nullptr) {
      g.merged_out = token * p.token_stride_out;
      g.image_out = l.packed ? tokens * p.token_stride_out : strides[3]->sequence;
    }
    p.tokens += images.count * tokens;
    pixel += images.count * (o.skip_prefix + images.height * images.width);
    token += images.count * tokens;
    if (images.count * tokens * p.channels != 0) work.groups.push_back(g);
  }
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t size = p.tokens * p.block() * p.channels * bytes;
  const bool faults = fresh && size >= kFreshBytes && p.norm != Norm::kNone;
  p.streams = size >= kStreamBytes && !faults;
  return work;
}

// f(params) for as many of the groups at a time as Params holds.
template <class F>
void each_part(const Work& work, const F& f) {
  const size_t count = work.groups.size();
  for (size_t begin = 0; begin < count; begin += kMaxGroups) {
    const size_t end = std::min<size_t>(begin + kMaxGroups, count);
    Params p = work.p;
    const int64_t first = work.groups[begin].first;
    p.tokens = (end == count ? work.p.tokens : work.groups[end].first) - first;
    p.group_count = static_cast<int>(end - begin);
    for (size_t i = begin; i < end; ++i) {
      p.groups[i - begin] = work.groups[i];
      p.groups[i - begin].first -= first;
    }
    f(p);
  }
}

void allow_all(const Launch& launch, const Operands& t, const OptionalTensor& weight,
               const OptionalTensor& bias) {
  if (t.pixels != nullptr) launch.reads(*t.pixels, "hidden_states");
  if (t.merged != nullptr) launch.reads(*t.merged, "merged tokens");
  launch.reads(weight, "norm_weight");
  launch.reads(bias, "norm_bias");
  if (t.pixels_out != nullptr) launch.writes(*t.pixels_out, "tokens that are written");
  if (t.merged_out != nullptr) launch.writes(*t.merged_out, "merged tokens that are written");
}

void run_cpu(const Work& work, CpuKernel kernel) {
  each_part(work, [&](const Params& p) {
    const int64_t least = grain(p.block() * p.channels);
    const auto run = [&](int64_t begin, int64_t end) {
      const bool moves = p.norm == Norm::kNone && !p.mean;
      std::vector<float> scratch(moves ? 0 : static_cast<size_t>(scratch_floats(p, false)));
      kernel(p, begin, end, scratch.data());
    };
    if (p.tokens <= least) return run(0, p.tokens);
    torch::stable::parallel_for(0, p.tokens, least, run);
  });
}

// The gradients of the norm's weight and bias, [2, normed]. Chunks, and with them the order of
// summation, depend neither on the number of threads nor on what is needed.
std::vector<double> run_norm_backward_cpu(const Work& work, bool needs_sums) {
  const auto normed = static_cast<size_t>(work.p.normed());
  std::vector<double> total(2 * normed);
  each_part(work, [&](const Params& p) {
    const int64_t chunk = std::max(grain(p.block() * p.channels), (p.tokens + 63) / 64);
    const int64_t chunks = (p.tokens + chunk - 1) / chunk;
    std::vector<double> sums(needs_sums ? chunks * total.size() : 0);
    const CpuNormBackward kernel = cpu_kernels().pixel_shuffle_norm_backward;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(scratch_floats(p, true)));
      for (int64_t i = begin; i < end; ++i) {
        kernel(p, i * chunk, std::min(p.tokens, (i + 1) * chunk), scratch.data(),
               needs_sums ? sums.data() + i * total.size() : nullptr);
      }
    });
    for (auto sum = sums.cbegin(); sum != sums.cend();)
      for (double& all : total) all += *sum++;
  });
  return total;
}

// Zeros for the pixels that no block has: prefixes, and what the factor leaves. `pixels` is
// contiguous.
void clear_rest(const Options& o, const Layout& l, Tensor& pixels) {
  const Images& images = l.images.empty() ? Images{0, 0, 0} : l.images[0];
  const int64_t rank = pixels.dim(), f = o.factor, height = images.height, width = images.width;
  bool remainder = false;
  for (const Images& one : l.images)
    remainder = remainder || (!l.blocks && (one.height % f != 0 || one.width % f != 0));
  if (o.skip_prefix == 0 && !remainder) return;
  if (l.packed) {
    torch::stable::zero_(pixels);
    return;
  }
  const auto clear = [](Tensor part) { torch::stable::zero_(part); };
  if (o.skip_prefix != 0) clear(torch::stable::narrow(pixels, rank - 2, 0, o.skip_prefix));
  if (!remainder) return;
  Tensor grid =
      torch::stable::narrow(pixels, rank - 2, o.skip_prefix, rank == 4 ? width : height * width);
  const int64_t shape[] = {l.sequences, height, width, l.channels};
  grid = torch::stable::view(grid, {shape, 4});
  const int64_t bottom = height % f, right = width % f;
  clear(torch::stable::narrow(grid, 1, height - bottom, bottom));
  clear(torch::stable::narrow(grid, 2, width - right, right));
}

// Everything about a forward call that no kernel checks.
struct Checked {
  Layout layout;
  Params params;
  Sizes shape;                  // of the result
  OptionalTensor weight, bias;  // as kernels read them
};

Checked check(const Options& o, const Tensor& hidden_states, const OptionalTensor& weight,
              const OptionalTensor& bias) {
  const Argument hidden{o.op, "hidden_states", hidden_states};
  hidden.floating();
  check_options(o);
  Checked c{layout_of(o, hidden.name, hidden_states.sizes()), {}, {}, weight, bias};
  c.shape = merged_shape(o, c.layout, hidden_states.dim());
  c.params = params_of(o, c.layout);
  set_norm(o, hidden, c.weight, c.bias, c.params);
  return c;
}

// A tensor of merged tokens beside hidden_states.
void check_merged(const Argument& merged, const Argument& hidden, const Checked& c) {
  merged.device_like(hidden);
  merged.shape(c.shape, "that of the result");
  if (merged.tensor.scalar_type() != hidden.tensor.scalar_type()) {
    fail(merged.op, merged.name, "expected dtype ", describe(hidden.tensor.scalar_type()),
         ", that of hidden_states, got ", describe(merged.tensor.scalar_type()));
  }
}

void check_out(const Options& o, const Tensor& given, const Tensor& hidden_states, const Checked& c,
               const OptionalTensor& weight, const OptionalTensor& bias) {
  const Argument out{o.op, "out", given}, hidden{o.op, "hidden_states", hidden_states};
  check_merged(out, hidden, c);
  const int64_t channels = given.size(given.dim() - 1), stride = given.stride(given.dim() - 1);
  if (given.numel() != 0 && channels != 1 && stride != 1) {
    fail(o.op, out.name, "expected channels side by side, got strides ", describe(given.strides()));
  }
  out.no_internal_overlap();
  out.apart_from(hidden);
  if (weight.has_value()) out.apart_from({o.op, "norm_weight", *weight});
  if (bias.has_value()) out.apart_from({o.op, "norm_bias", *bias});
}

// Into `given`, or into a tensor that it makes.
Tensor shuffle(const Options& o, const Tensor& hidden_states, const OptionalTensor& weight,
               const OptionalTensor& bias, const Tensor* given) {
  const Checked c = check(o, hidden_states, weight, bias);
  if (given != nullptr) check_out(o, *given, hidden_states, c, weight, bias);
  Tensor out = given != nullptr ? *given : torch::stable::new_empty(hidden_states, c.shape);
  const Operands operands{&hidden_states, nullptr, nullptr, &out};
  const Work work = work_of(o, c.layout, c.params, operands, given == nullptr);
  const Launch launch(o.op, hidden_states);
  if (launch.kernels != nullptr) {
    allow_all(launch, operands, c.weight, c.bias);
    each_part(work, [&](const Params& p) { launch.run(&CudaKernels::pixel_shuffle, p); });
  } else {
    run_cpu(work, cpu_kernels().pixel_shuffle);
  }
  return out;
}

Tensor forward(const Tensor& hidden_states, const OptionalTensor& norm_weight,
               const OptionalTensor& norm_bias, int64_t factor, const std::string& layout,
               const Sizes& grid_hw, const std::string& order, const std::string& norm,
               const std::string& norm_axis, double eps, double norm_offset,
               const std::string& reduction, int64_t skip_prefix, bool drop_remainder) {
  return shuffle({"pixel_shuffle", factor, layout, grid_hw, order, norm, norm_axis, eps,
                  norm_offset, reduction, skip_prefix, drop_remainder},
                 hidden_states, norm_weight, norm_bias, nullptr);
}

void forward_out(const Tensor& hidden_states, Tensor out, const OptionalTensor& norm_weight,
                 const OptionalTensor& norm_bias, int64_t factor, const std::string& layout,
                 const Sizes& grid_hw, const std::string& order, const std::string& norm,
                 const std::string& norm_axis, double eps, double norm_offset,
                 const std::string& reduction, int64_t skip_prefix, bool drop_remainder) {
  shuffle({"pixel_shuffle", factor, layout, grid_hw, order, norm, norm_axis, eps, norm_offset,
           reduction, skip_prefix, drop_remainder},
          hidden_states, norm_weight, norm_bias, &out);
}

// For kernels that are launched from elsewhere.
void check_all(const Tensor& hidden_states, const OptionalTensor& out, const OptionalTensor& grad,
               const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, int64_t factor,
               const std::string& layout, const Sizes& grid_hw, const std::string& order,
               const std::string& norm, const std::string& norm_axis, double eps,
               double norm_offset, const std::string& reduction, int64_t skip_prefix,
               bool drop_remainder) {
  const Options o{"pixel_shuffle", factor, layout,      grid_hw,   order,       norm,
                  norm_axis,       eps,    norm_offset, reduction, skip_prefix, drop_remainder};
  const Checked c = check(o, hidden_states, norm_weight, norm_bias);
  if (out.has_value()) check_out(o, *out, hidden_states, c, norm_weight, norm_bias);
  if (grad.has_value())
    check_merged({o.op, "grad", *grad}, {o.op, "hidden_states", hidden_states}, c);
}

// Pixels of `shape` from merged tokens; zeros where no token has them.
Tensor unshuffle(const Options& o, const Layout& l, const Params& p, const Tensor& merged,
                 const Sizes& shape) {
  Tensor out = torch::stable::new_empty(merged, shape);
  clear_rest(o, l, out);
  const Operands operands{nullptr, &merged, &out, nullptr};
  const Work work = work_of(o, l, p, operands, true);
  const Launch launch(o.op, merged);
  if (launch.kernels != nullptr) {
    allow_all(launch, operands, {}, {});
    each_part(work, [&](const Params& p) { launch.run(&CudaKernels::pixel_shuffle_inverse, p); });
  } else {
    run_cpu(work, cpu_kernels().pixel_shuffle_inverse);
  }
  return out;
}

Options inverse_options(int64_t factor, const std::string& layout, const Sizes& grid_hw,
                        const std::string& order) {
  return {"pixel_shuffle_inverse",
          factor,
          layout,
          grid_hw,
          order,
          "none",
          "merged",
          1e-5,
          0.0,
          "none",
          0,
          false};
}

// Of the inverse's result; checks everything.
Sizes inverse_shape(const Options& o, const Tensor& hidden_states, Layout& l) {
  const Argument hidden{o.op, "hidden_states", hidden_states};
  hidden.floating();
  check_options(o);
  const int64_t rank = hidden_states.dim(), block = o.factor * o.factor;
  if (rank != 2 && rank != 3) {
    fail(o.op, hidden.name, "expected [B, N, factor^2 C] or [N, factor^2 C], got shape ",
         describe(hidden_states.sizes()));
  }
  const int64_t tokens = hidden_states.size(rank - 2), depth = hidden_states.size(rank - 1);
  if (depth % block != 0) {
    fail(o.op, hidden.name, "expected channels that factor^2 = ", block, " divides, got shape ",
         describe(hidden_states.sizes()));
  }
  if (o.layout == "auto" && square_root(tokens) * square_root(tokens) != tokens) {
    fail(o.op, hidden.name, "expected a square number of tokens where grid_hw is None, got ",
         tokens, " in shape ", describe(hidden_states.sizes()), "; give grid_hw");
  }
  Sizes shape(hidden_states.sizes().begin(), hidden_states.sizes().end());
  shape[rank - 2] = tokens * block;
  shape[rank - 1] = depth / block;
  l = layout_of(o, hidden.name, shape);
  return shape;
}

Tensor inverse(const Tensor& hidden_states, int64_t factor, const std::string& layout,
               const Sizes& grid_hw, const std::string& order) {
  const Options o = inverse_options(factor, layout, grid_hw, order);
  Layout l;
  const Sizes shape = inverse_shape(o, hidden_states, l);
  return unshuffle(o, l, params_of(o, l), hidden_states, shape);
}

// Memory for the inverse's result, once everything was checked.
Tensor inverse_empty(const Tensor& hidden_states, int64_t factor, const std::string& layout,
                     const Sizes& grid_hw, const std::string& order) {
  Layout l;
  const Options o = inverse_options(factor, layout, grid_hw, order);
  return torch::stable::new_empty(hidden_states, inverse_shape(o, hidden_states, l));
}

// Rows of all pieces of the work leave their sums in one tensor, which is added up at the end.
void norm_backward_cuda(const Launch& launch, const Work& work, const Tensor& grad, bool of_weight,
                        bool of_bias, Tensor (&sums)[2]) {
  const int64_t n = work.p.normed();
  const bool wanted = of_weight || of_bias;
  int64_t all = 0, rows = 0;
  each_part(work, [&](const Params& p) {
    all += wanted ? parts_of(p) : 0;
    rows += wanted ? normed_rows(p) : 0;
  });
  Tensor partial = torch::stable::new_empty(grad, Sizes{all, 2, n}, ScalarType::Float);
  Tensor scales = torch::stable::new_empty(grad, Sizes{rows, kScales}, ScalarType::Float);
  launch.writes(partial, "partial sums");
  launch.writes(scales, "statistics of rows");
  auto* const parts = static_cast<float*>(partial.mutable_data_ptr());
  auto* const of_rows = static_cast<float*>(scales.mutable_data_ptr());
  float* to[] = {nullptr, nullptr};
  for (int i = 0; i < 2; ++i) {
    if (!(i == 0 ? of_weight : of_bias)) continue;
    sums[i] = torch::stable::new_empty(grad, Sizes{n}, ScalarType::Float);
    to[i] = static_cast<float*>(sums[i].mutable_data_ptr());
    launch.writes(sums[i], "the gradient of a vector of the norm");
  }
  int64_t part = 0, row = 0;
  each_part(work, [&](const Params& p) {
    launch.run(&CudaKernels::pixel_shuffle_norm_backward, p,
               wanted ? of_rows + row * kScales : nullptr, wanted ? parts + part * 2 * n : nullptr);
    part += parts_of(p);
    row += normed_rows(p);
  });
  if (wanted) launch.run(&CudaKernels::pixel_shuffle_weight_grad, parts, all, n, to[0], to[1]);
}

std::tuple<Tensor, Tensor, Tensor> unshuffle_grad(const Options& o, const Tensor& grad,
                                                  const Tensor& hidden_states,
                                                  const OptionalTensor& norm_weight,
                                                  const OptionalTensor& norm_bias,
                                                  bool needs_hidden_states, bool needs_norm_weight,
                                                  bool needs_norm_bias) {
  const Checked c = check(o, hidden_states, norm_weight, norm_bias);
  check_merged({o.op, "grad", grad}, {o.op, "hidden_states", hidden_states}, c);
  const Layout& l = c.layout;
  const Params& p = c.params;
  const Sizes shape(hidden_states.sizes().begin(), hidden_states.sizes().end()), none = {0};
  const bool of_weight = needs_norm_weight && norm_weight.has_value();
  const bool of_bias = needs_norm_bias && norm_bias.has_value();
  Tensor no_grad = torch::stable::new_empty(grad, none);
  if (p.norm == Norm::kNone)
    return {needs_hidden_states ? unshuffle(o, l, p, grad, shape) : no_grad, no_grad, no_grad};
  Tensor out = torch::stable::new_empty(grad, needs_hidden_states ? shape : none);
  if (needs_hidden_states) clear_rest(o, l, out);
  const int64_t n = p.normed();
  const Launch launch(o.op, grad);
  if (launch.kernels != nullptr) {
    // The order of summation shall not hang on the gradient's strides.
    const Tensor dense = torch::stable::contiguous(grad);
    const Operands operands{&hidden_states, &dense, needs_hidden_states ? &out : nullptr, nullptr};
    Tensor sums[] = {no_grad, no_grad};
    allow_all(launch, operands, c.weight, c.bias);
    norm_backward_cuda(launch, work_of(o, l, p, operands, true), grad, of_weight, of_bias, sums);
    return {out, of_weight ? torch::stable::to(sums[0], norm_weight->scalar_type()) : no_grad,
            of_bias ? torch::stable::to(sums[1], norm_bias->scalar_type()) : no_grad};
  }
  const Operands operands{&hidden_states, &grad, needs_hidden_states ? &out : nullptr, nullptr};
  const std::vector<double> sums =
      run_norm_backward_cpu(work_of(o, l, p, operands, true), of_weight || of_bias);
  return {out, of_weight ? rounded_like(*norm_weight, sums.data()) : no_grad,
          of_bias ? rounded_like(*norm_bias, sums.data() + n) : no_grad};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& hidden_states, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, int64_t factor, const std::string& layout,
    const Sizes& grid_hw, const std::string& order, const std::string& norm,
    const std::string& norm_axis, double eps, double norm_offset, const std::string& reduction,
    int64_t skip_prefix, bool drop_remainder, bool needs_hidden_states, bool needs_norm_weight,
    bool needs_norm_bias) {
  const Options o{"pixel_shuffle_backward",
                  factor,
                  layout,
                  grid_hw,
                  order,
                  norm,
                  norm_axis,
                  eps,
                  norm_offset,
                  reduction,
                  skip_prefix,
                  drop_remainder};
  return unshuffle_grad(o, grad, hidden_states, norm_weight, norm_bias, needs_hidden_states,
                        needs_norm_weight, needs_norm_bias);
}

// A norm alone: blocks of one token.
Options norm_alone(const char* op, double eps) {
  static const Sizes no_grids;
  return {op, 1, "auto", no_grids, "yxc", "rms", "merged", eps, 0.0, "none", 0, false};
}

}  // namespace
}  // namespace vlmops::pixel_shuffle

namespace vlmops {

Tensor rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  using namespace pixel_shuffle;
  return torch::stable::view(shuffle(norm_alone(op, eps), x, weight, {}, nullptr), x.sizes());
}

std::tuple<Tensor, Tensor> rms_norm_backward(const char* op, const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, double eps, bool needs_x,
                                             bool needs_weight) {
  using namespace pixel_shuffle;
  const int64_t merged[] = {x.size(0), x.size(1) * x.size(2), x.size(3)};
  const Tensor of_tokens = torch::stable::view(grad, {merged, 3});
  auto [of_x, of_weight, _] =
      unshuffle_grad(norm_alone(op, eps), of_tokens, x, weight, {}, needs_x, needs_weight, false);
  return {of_x, of_weight};
}

}  // namespace vlmops

#define VLMOPS_PIXEL_SHUFFLE_OPTIONS                                                             \
  "Tensor? norm_weight=None, Tensor? norm_bias=None, int factor=2, str layout=\"auto\", int[] "  \
  "grid_hw=[], str order=\"yxc\", str norm=\"none\", str norm_axis=\"merged\", float eps=1e-5, " \
  "float norm_offset=0.0, str reduction=\"none\", int skip_prefix=0, bool drop_remainder=False"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("pixel_shuffle(Tensor hidden_states, " VLMOPS_PIXEL_SHUFFLE_OPTIONS ") -> Tensor");
  m.def("pixel_shuffle_out(Tensor hidden_states, Tensor(a!) out, " VLMOPS_PIXEL_SHUFFLE_OPTIONS
        ") -> ()");
  m.def(
      "pixel_shuffle_check(Tensor hidden_states, Tensor? out, Tensor? "
      "grad, " VLMOPS_PIXEL_SHUFFLE_OPTIONS ") -> ()");
  // The gradients of hidden_states, norm_weight, norm_bias; those that nobody needs are empty.
  // Without a norm the values of hidden_states are not read.
  m.def("pixel_shuffle_backward(Tensor grad, Tensor hidden_states, " VLMOPS_PIXEL_SHUFFLE_OPTIONS
        ", bool needs_hidden_states=True, bool needs_norm_weight=True, bool needs_norm_bias=True) "
        "-> (Tensor, Tensor, Tensor)");
  m.def(
      "pixel_shuffle_inverse(Tensor hidden_states, int factor=2, str layout=\"auto\", int[] "
      "grid_hw=[], str order=\"yxc\") -> Tensor");
  m.def(
      "pixel_shuffle_inverse_empty(Tensor hidden_states, int factor, str layout, int[] grid_hw, "
      "str order) -> Tensor");
}

#define VLMOPS_PIXEL_SHUFFLE_IMPL(m)                                             \
  m.impl("pixel_shuffle", TORCH_BOX(&vlmops::pixel_shuffle::forward));           \
  m.impl("pixel_shuffle_out", TORCH_BOX(&vlmops::pixel_shuffle::forward_out));   \
  m.impl("pixel_shuffle_check", TORCH_BOX(&vlmops::pixel_shuffle::check_all));   \
  m.impl("pixel_shuffle_backward", TORCH_BOX(&vlmops::pixel_shuffle::backward)); \
  m.impl("pixel_shuffle_inverse", TORCH_BOX(&vlmops::pixel_shuffle::inverse));   \
  m.impl("pixel_shuffle_inverse_empty", TORCH_BOX(&vlmops::pixel_shuffle::inverse_empty))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_PIXEL_SHUFFLE_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_PIXEL_SHUFFLE_IMPL(m); }
