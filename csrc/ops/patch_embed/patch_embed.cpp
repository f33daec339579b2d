// The only file of patch embedding that knows torch: schemas, checks, Tensor -> Params,
// registration. The op is put together in Python (vlmops/ops/patch_embed_panels.py), since its
// products are torch's; here is what comes before and after them, and what one kernel does alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/parallel.h"
#include "common/cpu_kernels.h"

namespace vlmops::patch_embed {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr const char* kOp = "patch_embed";

// Pixels and what says how to read them.
struct Pixels {
  const std::vector<Tensor>& values;
  const Tensor& weight;
  const OptionalTensor& map;
  bool listed;  // images of any size, not one tensor of all
  bool channels_last;
  const Sizes& image_sizes;
};

// One Params for each run of images of one size, and what all have in common.
struct Groups {
  std::vector<Params> all;
  bool packed;        // one sequence of all images
  int64_t sequences;  // S
  int64_t patches;    // of a sequence
  int64_t tokens;     // of a sequence
  int64_t rows;       // patches of all sequences
};

Pixel pixel_type(const Argument& a) {
  switch (a.tensor.scalar_type()) {
    case ScalarType::Float:
      return Pixel::kFloat32;
    case ScalarType::BFloat16:
      return Pixel::kBFloat16;
    case ScalarType::Half:
      return Pixel::kFloat16;
    case ScalarType::Byte:
      return Pixel::kUInt8;
    default:
      fail(a.op, a.name, "expected dtype float32, bfloat16, float16 or uint8, got ",
           describe(a.tensor.scalar_type()));
  }
}

std::string as_read(const Pixels& x) {
  const auto shape = x.weight.sizes();
  const char* one = x.weight.dim() == 5 ? (x.channels_last ? "T, H, W, C]" : "C, T, H, W]")
                                        : (x.channels_last ? "H, W, C]" : "C, H, W]");
  const std::string images = std::string(x.listed ? "[" : "[B, ") + one;
  const std::string meaning = " for a weight of shape " + describe(shape);
  if (x.listed) return "images " + images + meaning;
  return (x.weight.dim() == 2 ? "" : images + ", ") + "[N, K] or [B, N, K]" + meaning;
}

// Flattened patches [N, K] or [B, N, K].
Params flattened(const Pixels& x, const Argument& pixels) {
  const Tensor& t = pixels.tensor;
  const int64_t rank = t.dim(), depth = t.size(rank - 1);
  Params p{};
  p.depth = x.weight.size(0) == 0 ? depth : x.weight.numel() / x.weight.size(0);
  if (depth != p.depth) {
    fail(kOp, pixels.name, "expected patches of ", p.depth, " values, as weight ",
         describe(x.weight.sizes()), " has, got shape ", describe(t.sizes()));
  }
  p.images = rank == 3 ? t.size(0) : 1;
  p.image_stride = rank == 3 ? t.stride(0) : 0;
  p.grid[0] = p.grid[1] = 1;
  p.grid[2] = t.size(rank - 2);
  p.grid_stride[2] = t.stride(rank - 2);
  const bool whole = !x.map.has_value();  // else the channel of each value matters
  p.size[0] = whole ? 1 : x.weight.size(1);
  p.size[1] = p.size[2] = 1;
  p.size[3] = p.depth / std::max<int64_t>(p.size[0], 1);
  p.size_stride[3] = t.stride(rank - 1);
  p.size_stride[0] = p.size[3] * p.size_stride[3];
  return p;
}

// Images of one size, [C, (T,) H, W] each; `batched` has a B in front. height and width are read of
// it, or everything if they are negative.
Params images_of(const Pixels& x, const Argument& pixels, bool batched, int64_t height,
                 int64_t width) {
  const Tensor& t = pixels.tensor;
  const int64_t dims = x.weight.dim() - 2, first = batched ? 1 : 0;  // T, H, W
  // Where channels, frames, rows and columns are.
  const int64_t channel = x.channels_last ? first + dims : first;
  const int64_t column = x.channels_last ? first + dims - 1 : first + dims;
  const int64_t place[3] = {dims == 3 ? column - 2 : -1, column - 1, column};
  Params p{};
  p.images = batched ? t.size(0) : 1;
  p.image_stride = batched ? t.stride(0) : 0;
  p.size[0] = x.weight.size(1);
  p.size_stride[0] = t.stride(channel);
  if (t.size(channel) != p.size[0]) {
    fail(kOp, pixels.name, "expected ", p.size[0], " channels, as weight ",
         describe(x.weight.sizes()), " has, got ", t.size(channel), " in shape ",
         describe(t.sizes()), x.channels_last ? " with channels_last" : "");
  }
  p.size[1] = dims == 3 ? x.weight.size(2) : 1;
  p.size[2] = x.weight.size(x.weight.dim() - 2);
  p.size[3] = x.weight.size(x.weight.dim() - 1);
  p.depth = p.size[0] * p.size[1] * p.size[2] * p.size[3];
  if (p.depth == 0)
    fail(kOp, "weight", "expected patches that are not empty, got shape ",
         describe(x.weight.sizes()));
  const int64_t shown[3] = {dims == 3 ? t.size(place[0]) : 1,
                            height < 0 ? t.size(place[1]) : height,
                            width < 0 ? t.size(place[2]) : width};
  for (int i = 0; i < 3; ++i) {
    const int64_t stride = place[i] < 0 ? 0 : t.stride(place[i]);
    p.grid[i] = shown[i] / p.size[i + 1];  // what remains is dropped
    p.grid_stride[i] = p.size[i + 1] * stride;
    p.size_stride[i + 1] = stride;
    if (p.grid[i] == 0) {
      fail(kOp, pixels.name, "expected images of at least one patch, ", p.size[1], " x ", p.size[2],
           " x ", p.size[3], " (frames, rows, columns), got ", shown[0], " x ", shown[1], " x ",
           shown[2]);
    }
  }
  return p;
}

void set_map(const Pixels& x, Groups& groups) {
  const Argument map{kOp, "pixel_map", *x.map};
  map.device_like({kOp, "weight", x.weight});
  if (x.weight.dim() == 2) {
    fail(kOp, map.name,
         "expected a weight that names the channels of a patch, [D, C, P, P] or [D, C, T, P, P], "
         "got ",
         describe(x.weight.sizes()));
  }
  for (Params& p : groups.all) {
    const int64_t expected[] = {p.size[0], p.pixel == Pixel::kUInt8 ? 256 : 2};
    map.shape({expected, 2}, "[C, 256] for uint8 pixels, [C, 2] for others");
    if (map.tensor.scalar_type() != ScalarType::Float || map.tensor.stride(1) != 1 ||
        map.tensor.stride(0) != expected[1])
      fail(kOp, map.name, "expected a contiguous float32 tensor");
    p.map = static_cast<const float*>(map.tensor.const_data_ptr());
    p.map_columns = expected[1];
  }
}

Groups groups_of(const Pixels& x) {
  const Argument weight{kOp, "weight", x.weight};
  const int64_t weight_rank = x.weight.dim();
  if (weight_rank != 2 && weight_rank != 4 && weight_rank != 5) {
    fail(kOp, weight.name, "expected shape [D, C, P, P], [D, C, T, P, P] or [D, K], got ",
         describe(x.weight.sizes()));
  }
  const DType dtype = weight.floating();
  const bool sized = !x.image_sizes.empty();
  Groups groups{};
  groups.packed = x.listed || sized;
  if (!x.listed && x.values.size() != 1)
    fail(kOp, "pixel_values", "expected one tensor unless listed, got ", x.values.size());
  for (const Tensor& values : x.values) {
    const Argument pixels{kOp, "pixel_values", values};
    pixels.device_like(weight);
    const int64_t rank = values.dim(), bytes = values.element_size();
    const auto add = [&](Params p, int64_t image) {
      p.pixels = static_cast<const char*>(values.const_data_ptr()) + image * p.image_stride * bytes;
      p.pixel = pixel_type(pixels);
      p.dtype = dtype;
      p.channels = x.weight.size(0);
      groups.rows += p.images * p.patches();
      groups.all.push_back(p);
    };
    if (!x.listed && !sized && (rank == 2 || rank == 3)) {
      groups.packed = rank == 2;
      add(flattened(x, pixels), 0);
    } else if (weight_rank == 2 || rank != weight_rank - (x.listed ? 1 : 0)) {
      fail(kOp, pixels.name, "expected ", as_read(x), ", got shape ", describe(values.sizes()));
    } else if (!sized) {
      add(images_of(x, pixels, !x.listed, -1, -1), 0);
    } else {
      const int64_t images = values.size(0), column = x.channels_last ? rank - 2 : rank - 1;
      if (x.listed || static_cast<int64_t>(x.image_sizes.size()) != 2 * images) {
        fail(kOp, "image_sizes", "expected a height and a width for each image of a batch, got ",
             x.image_sizes.size() / 2, " for pixel_values ", describe(values.sizes()));
      }
      for (int64_t b = 0; b < images; ++b) {
        const int64_t height = x.image_sizes[2 * b], width = x.image_sizes[2 * b + 1];
        if (height < 0 || width < 0 || height > values.size(column - 1) ||
            width > values.size(column)) {
          fail(kOp, "image_sizes", "expected sizes within pixel_values ", describe(values.sizes()),
               ", got ", height, " x ", width, " for image ", b);
        }
        Params p = images_of(x, pixels, true, height, width);
        p.images = 1;
        add(p, b);
      }
    }
  }
  if (x.map.has_value()) set_map(x, groups);
  return groups;
}

// Contiguous copies, where there had to be some, live as long as the Params that point to them.
struct Kept {
  std::vector<Tensor> tensors;
  const void* contiguous(const Tensor& t) {
    tensors.push_back(torch::stable::contiguous(t));
    return tensors.back().const_data_ptr();
  }
};

// [D], next to the weight.
Row row_of(const Argument& a, const Argument& weight, Kept& kept) {
  a.device_like(weight);
  const int64_t expected[] = {weight.tensor.size(0)};
  a.shape({expected, 1}, "[D], one for each channel of the weight");
  const DType dtype = a.floating();
  return {kept.contiguous(a.tensor), dtype};
}

// Strides of a tensor as of [S, tokens, taps], to which it is broadcast from the right.
void broadcast(const Argument& a, const int64_t (&expected)[3], int64_t* stride) {
  const int64_t rank = a.tensor.dim();
  bool fits = rank <= 3;
  for (int64_t i = 0; fits && i < 3; ++i) {
    const int64_t dim = rank - 3 + i;
    const int64_t size = dim < 0 ? 1 : a.tensor.size(dim);
    fits = size == 1 || size == expected[i];
    stride[i] = size == 1 || dim < 0 ? 0 : a.tensor.stride(dim);
  }
  if (!fits) {
    fail(a.op, a.name, "expected a shape that fits [", expected[0], ", ", expected[1], ", ",
         expected[2], "] (sequences, tokens, taps), got ", describe(a.tensor.sizes()));
  }
}

void check_rows(const Position& q, const Argument& index, const int64_t (&size)[3]) {
  if (is_on_gpu(index.tensor)) return;  // that would take a synchronisation: the kernel clamps
  const auto steps = [&](int i) {
    return q.index_stride[i] == 0 ? std::min<int64_t>(size[i], 1) : size[i];
  };
  for (int64_t s = 0; s < steps(0); ++s) {
    for (int64_t n = 0; n < steps(1); ++n) {
      for (int64_t t = 0; t < steps(2); ++t) {
        const int64_t row =
            load_int(q.index, q.index_type,
                     s * q.index_stride[0] + n * q.index_stride[1] + t * q.index_stride[2]);
        if (row < 0 || row >= q.rows)
          fail(index.op, index.name, "expected rows of the table in [0, ", q.rows, "), got ", row,
               " at [", s, ", ", n, ", ", t, "]");
      }
    }
  }
}

enum Kind : int64_t { kIndex = 1, kWeight = 2, kPatchesOnly = 4 };

// Everything that is added to a product.
struct Surroundings {
  const Tensor& weight;
  const OptionalTensor& bias;
  const std::string& norm;
  const OptionalTensor &norm_weight, &norm_bias;
  double norm_eps;
  const OptionalTensor& prefix;
  bool prefix_last;
  const std::vector<Tensor>& positions;
  const Sizes& position_kinds;
  std::optional<ScalarType> dtype;
};

Position position_of(const Surroundings& o, size_t& next, int64_t kind, const Groups& groups,
                     bool look, Kept& kept) {
  const Argument weight{kOp, "weight", o.weight};
  const auto take = [&](const char* name) {
    if (next >= o.positions.size())
      fail(kOp, "positions", "expected a table, an index and a weight as position_kinds says, got ",
           o.positions.size(), " tensors");
    const Argument a{kOp, name, o.positions[next++]};
    a.device_like(weight);
    return a;
  };
  Position q{};
  q.patches_only = kind & kPatchesOnly;
  const int64_t tokens = q.patches_only ? groups.patches : groups.tokens;
  const Argument table = take("positions.table");
  if (table.tensor.dim() != 2 || table.tensor.size(1) != o.weight.size(0)) {
    fail(kOp, table.name, "expected shape [R, ", o.weight.size(0), "] as weight ",
         describe(o.weight.sizes()), " has, got ", describe(table.tensor.sizes()));
  }
  q.dtype = table.floating();
  q.rows = table.tensor.size(0);
  const bool side_by_side = table.tensor.stride(1) == 1 || table.tensor.size(1) <= 1;
  q.table = side_by_side ? table.tensor.const_data_ptr() : kept.contiguous(table.tensor);
  q.row_stride = side_by_side ? table.tensor.stride(0) : table.tensor.size(1);
  q.taps = 1;
  if (kind & kIndex) {
    const Argument index = take("positions.index");
    const int64_t rank = index.tensor.dim();
    if (rank < 1 || rank > 3)
      fail(kOp, index.name, "expected shape [t], [N, t] or [B, N, t], got ",
           describe(index.tensor.sizes()));
    q.taps = index.tensor.size(rank - 1);
    const int64_t expected[3] = {groups.sequences, tokens, q.taps};
    q.index_type = index.integer();
    broadcast(index, expected, q.index_stride);
    q.index = index.tensor.const_data_ptr();
    if (look) check_rows(q, index, expected);
  } else if (q.rows < tokens) {
    fail(kOp, table.name, "expected a row for each of the ", tokens, " ",
         q.patches_only ? "patches" : "tokens", ", prefix included unless patches_only, got shape ",
         describe(table.tensor.sizes()));
  }
  if (kind & kWeight) {
    const Argument factor = take("positions.weight");
    const int64_t expected[3] = {groups.sequences, tokens, q.taps};
    q.weight_dtype = factor.floating();
    broadcast(factor, expected, q.weight_stride);
    q.weight = factor.tensor.const_data_ptr();
  }
  return q;
}

DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(kOp, name, "expected float32, bfloat16 or float16, got ", describe(type));
  }
}

// Checks, and fills the rest of Params but out. `look`: at each index too.
void surround(const Surroundings& o, Groups& groups, bool look, Kept& kept) {
  const Argument weight{kOp, "weight", o.weight};
  Params p{};
  p.weight = kept.contiguous(o.weight);
  if (o.bias.has_value()) {
    const Argument bias{kOp, "bias", *o.bias};
    const Row row = row_of(bias, weight, kept);
    if (o.bias->scalar_type() != o.weight.scalar_type())
      fail(kOp, "bias", "expected dtype ", describe(o.weight.scalar_type()),
           ", that of weight, got ", describe(o.bias->scalar_type()));
    p.bias = row.data;
  }
  if (o.norm != "none" && o.norm != "layer" && o.norm != "rms")
    fail(kOp, "norm", "expected 'none', 'layer' or 'rms', got '", o.norm, "'");
  p.norm = o.norm == "layer" ? Norm::kLayer : o.norm == "rms" ? Norm::kRms : Norm::kNone;
  p.norm_eps = static_cast<float>(o.norm_eps);
  if (!(p.norm_eps > 0.0f && p.norm_eps <= std::numeric_limits<float>::max()))
    fail(kOp, "norm_eps", "expected a positive, finite float32 number, got ", o.norm_eps);
  if (p.norm == Norm::kNone && (o.norm_weight.has_value() || o.norm_bias.has_value()))
    fail(kOp, "norm", "expected 'layer' or 'rms', as a norm_weight or norm_bias is given");
  if (o.norm_weight.has_value())
    p.norm_weight = row_of({kOp, "norm_weight", *o.norm_weight}, weight, kept);
  if (o.norm_bias.has_value()) p.norm_bias = row_of({kOp, "norm_bias", *o.norm_bias}, weight, kept);
  if (o.prefix.has_value()) {
    const Argument prefix{kOp, "prefix", *o.prefix};
    prefix.device_like(weight);
    if (prefix.tensor.dim() != 2 || prefix.tensor.size(1) != o.weight.size(0))
      fail(kOp, "prefix", "expected shape [M, ", o.weight.size(0), "] as weight ",
           describe(o.weight.sizes()), " has, got ", describe(prefix.tensor.sizes()));
    p.prefix = {nullptr, prefix.floating()};
    p.prefix.data = kept.contiguous(prefix.tensor);
    p.prefix_tokens = prefix.tensor.size(0);
  }
  p.prefix_last = o.prefix_last;
  p.out_dtype = dtype_of(o.dtype.value_or(o.weight.scalar_type()), "dtype");

  int64_t images = 0;
  for (const Params& g : groups.all) images += g.images;
  groups.sequences = groups.packed ? 1 : groups.all[0].images;  // a list may be empty
  groups.patches = groups.packed ? groups.rows : groups.all[0].patches();
  groups.tokens = groups.patches + p.prefix_tokens * (groups.packed ? images : 1);

  if (o.position_kinds.size() > static_cast<size_t>(kMaxPositions))
    fail(kOp, "positions", "expected at most ", kMaxPositions, ", got ", o.position_kinds.size());
  size_t next = 0;
  for (const int64_t kind : o.position_kinds)
    p.positions[p.position_count++] = position_of(o, next, kind, groups, look, kept);
  if (next != o.positions.size())
    fail(kOp, "positions", "expected the tensors that position_kinds names, got ",
         o.positions.size() - next, " more");

  int64_t patch = 0, token = 0;
  for (Params& g : groups.all) {
    Params whole = p;
    static_cast<Images&>(whole) = g;
    whole.first_patch = patch, whole.first_token = token;
    if (groups.packed) {
      patch += g.images * g.patches();
      token += g.images * whole.tokens();
    }
    g = whole;
  }
}

Tensor result_of(const Groups& groups, const Surroundings& o) {
  Sizes shape = {groups.sequences, groups.tokens, o.weight.size(0)};
  if (groups.packed) shape.erase(shape.begin());
  return torch::stable::new_empty(o.weight, shape, o.dtype.value_or(o.weight.scalar_type()));
}

// out: whole and contiguous.
void point_to(Groups& groups, Tensor& out) {
  const int64_t bytes = out.element_size();
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (Params& p : groups.all) p.out = to + p.first_token * p.channels * bytes;
}

// f(params, begin, end, rows before) for the parts of groups that hold patches [begin, end) of all.
template <class F>
void each_part(const Groups& groups, int64_t begin, int64_t end, const F& f) {
  int64_t start = 0;
  for (const Params& p : groups.all) {
    const int64_t rows = p.images * p.patches();
    const int64_t from = std::max(begin, start), to = std::min(end, start + rows);
    if (from < to) f(p, from - start, to - start, from - begin);
    start += rows;
  }
}

void allow_pixels(const Launch& on, const Pixels& x) {
  for (const Tensor& t : x.values) on.reads(t, "pixel_values");
  on.reads(x.map, "pixel_map");
}

void allow_everything(const Launch& on, const Pixels& x, const Surroundings& o, const Kept& kept,
                      Tensor& out) {
  allow_pixels(on, x);
  for (const Tensor& t : kept.tensors) on.reads(t, "weight, bias, prefix or norm");
  for (const Tensor& t : o.positions) on.reads(t, "positions");
  on.writes(out, "the result");
}

// The whole op on a GPU, or on the emulated one.
Tensor launch(const Pixels& x, const Surroundings& o) {
  Groups groups = groups_of(x);
  Kept kept;
  surround(o, groups, true, kept);
  Tensor out = result_of(groups, o);
  point_to(groups, out);
  const Launch on(kOp, o.weight);
  if (on.kernels == nullptr)
    fail(kOp, "weight", "expected on a GPU, got ", describe(o.weight.device()));
  allow_everything(on, x, o, kept, out);
  for (const Params& p : groups.all) on.run(&CudaKernels::patch_embed, p);
  return out;
}

// An empty result, once everything was checked.
Tensor empty(const Pixels& x, const Surroundings& o) {
  Groups groups = groups_of(x);
  Kept kept;
  surround(o, groups, true, kept);
  return result_of(groups, o);
}

template <Tensor (*run)(const Pixels&, const Surroundings&)>
Tensor unpacked(const std::vector<Tensor>& pixel_values, const Tensor& weight,
                const std::vector<Tensor>& positions, const Sizes& position_kinds,
                const OptionalTensor& bias, const OptionalTensor& pixel_map, bool listed,
                bool channels_last, const Sizes& image_sizes, const std::string& norm,
                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                const OptionalTensor& prefix, bool prefix_last, std::optional<ScalarType> dtype) {
  return run({pixel_values, weight, pixel_map, listed, channels_last, image_sizes},
             {weight, bias, norm, norm_weight, norm_bias, norm_eps, prefix, prefix_last, positions,
              position_kinds, dtype});
}

// Patches [begin, end) of all, [end - begin, pitch >= K], zeros behind K; pitch is a GPU's.
Tensor pack(const std::vector<Tensor>& pixel_values, const Tensor& weight,
            const OptionalTensor& pixel_map, bool listed, bool channels_last,
            const Sizes& image_sizes, int64_t begin, int64_t end, ScalarType dtype, int64_t pitch) {
  const Pixels x{pixel_values, weight, pixel_map, listed, channels_last, image_sizes};
  const Groups groups = groups_of(x);
  if (begin < 0 || end < begin || end > groups.rows)
    fail("patch_embed_pack", "begin, end", "expected a part of ", groups.rows, " patches, got ",
         begin, ", ", end);
  const int64_t depth = groups.all.empty() ? 0 : groups.all[0].depth;
  const DType to = dtype_of(dtype, "dtype");
  const Launch on("patch_embed_pack", weight);
  const int64_t columns = on.kernels == nullptr ? depth : std::max(pitch, depth);
  Tensor panel = torch::stable::new_empty(weight, Sizes{end - begin, columns}, dtype);
  auto* data = static_cast<char*>(panel.mutable_data_ptr());
  const int64_t row_bytes = columns * panel.element_size();
  if (on.kernels != nullptr) {
    allow_pixels(on, x);
    on.writes(panel, "the panel");
    each_part(groups, begin, end, [&](const Params& p, int64_t from, int64_t until, int64_t done) {
      on.run(&CudaKernels::patch_embed_pack, p, from, until, data + done * row_bytes, columns, to);
    });
    return panel;
  }
  const auto kernel = cpu_kernels().patch_embed_pack;
  each_part(groups, begin, end, [&](const Params& p, int64_t from, int64_t until, int64_t done) {
    torch::stable::parallel_for(from, until, grain(depth), [&](int64_t first, int64_t last) {
      kernel(p, first, last, data + (done + first - from) * row_bytes, to);
    });
  });
  return panel;
}

// Writes the tokens of patches [begin, begin + rows of the product), and the prefix if begin is 0.
// product [rows, D], bias included; on the CPU its rows may be one, and it may be `out`.
void finish(Tensor out, const Tensor& product, int64_t begin,
            const std::vector<Tensor>& pixel_values, const Tensor& weight,
            const std::vector<Tensor>& positions, const Sizes& position_kinds,
            const OptionalTensor& bias, const OptionalTensor& pixel_map, bool listed,
            bool channels_last, const Sizes& image_sizes, const std::string& norm,
            const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
            const OptionalTensor& prefix, bool prefix_last, std::optional<ScalarType> dtype) {
  Groups groups = groups_of({pixel_values, weight, pixel_map, listed, channels_last, image_sizes});
  Kept kept;
  surround({weight, bias, norm, norm_weight, norm_bias, norm_eps, prefix, prefix_last, positions,
            position_kinds, dtype},
           groups, false, kept);
  point_to(groups, out);
  const DType type = dtype_of(product.scalar_type(), "product");
  const auto* data = static_cast<const char*>(product.const_data_ptr());
  const int64_t channels = weight.size(0), stride = product.stride(0);
  const int64_t row_bytes = stride * product.element_size();
  const Launch on(kOp, weight);
  if (on.kernels != nullptr) {
    const Pixels x{pixel_values, weight, pixel_map, listed, channels_last, image_sizes};
    const Surroundings o{weight, bias,        norm,      norm_weight,    norm_bias, norm_eps,
                         prefix, prefix_last, positions, position_kinds, dtype};
    allow_everything(on, x, o, kept, out);
    on.reads(product, "the product");
    int64_t start = 0;
    const int64_t end = begin + product.size(0);
    for (const Params& p : groups.all) {
      const int64_t rows = p.images * p.patches();
      const int64_t from = std::max(begin, start), to = std::min(end, start + rows);
      // The first part of each group brings its prefix.
      if (from < to || (rows == 0 && begin == 0)) {
        on.run(&CudaKernels::patch_embed_finish, p, from - start, to - start,
               data + (from - begin) * row_bytes, type);
      }
      start += rows;
    }
    return;
  }
  const CpuKernels& kernels = cpu_kernels();
  each_part(groups, begin, begin + product.size(0),
            [&](const Params& p, int64_t from, int64_t until, int64_t done) {
              torch::stable::parallel_for(
                  from, until, grain(channels), [&](int64_t first, int64_t last) {
                    kernels.patch_embed_finish(
                        p, first, last, data + (done + first - from) * row_bytes, stride, type);
                  });
            });
  if (begin != 0 || !prefix.has_value()) return;
  for (const Params& p : groups.all) kernels.patch_embed_prefix(p, 0, p.images);
}

// The gradients of patches [begin, begin + rows of the panel), [rows, K], to where their pixels
// are. On the CPU.
void unpack(const std::vector<Tensor>& pixel_grads, const Tensor& panel, int64_t begin,
            const Tensor& weight, const OptionalTensor& pixel_map, bool listed, bool channels_last,
            const Sizes& image_sizes) {
  const Groups groups =
      groups_of({pixel_grads, weight, pixel_map, listed, channels_last, image_sizes});
  const int64_t end = begin + panel.size(0), stride = panel.stride(0);
  if (begin < 0 || end > groups.rows)
    fail("patch_embed_unpack", "panel", "expected a part of ", groups.rows, " patches, got ", begin,
         ", ", end);
  const DType dtype = Argument{"patch_embed_unpack", "panel", panel}.floating();
  const auto* data = static_cast<const char*>(panel.const_data_ptr());
  const int64_t row_bytes = stride * panel.element_size();
  const auto kernel = cpu_kernels().patch_embed_unpack;
  each_part(groups, begin, end, [&](const Params& p, int64_t from, int64_t until, int64_t done) {
    torch::stable::parallel_for(from, until, grain(p.depth), [&](int64_t first, int64_t last) {
      kernel(p, first, last, data + (done + first - from) * row_bytes, stride, dtype);
    });
  });
}

// rows [N, D], channels side by side; float32 [D]. On the CPU.
Tensor column_sums(const Tensor& rows) {
  const Argument matrix{"patch_embed_column_sums", "rows", rows};
  const DType dtype = matrix.floating();
  if (rows.dim() != 2 || rows.stride(1) != 1)
    fail(matrix.op, matrix.name, "expected [N, D], channels side by side, got shape ",
         describe(rows.sizes()));
  Tensor sums = torch::stable::new_empty(rows, Sizes{rows.size(1)}, ScalarType::Float);
  auto* to = static_cast<float*>(sums.mutable_data_ptr());
  const void* from = rows.const_data_ptr();
  const auto kernel = cpu_kernels().patch_embed_column_sums;
  torch::stable::parallel_for(0, rows.size(1), grain(rows.size(0)), [&](int64_t b, int64_t e) {
    kernel(from, dtype, rows.size(0), rows.stride(0), b, e, to);
  });
  return sums;
}

}  // namespace
}  // namespace vlmops::patch_embed

#define VLMOPS_PATCH_EMBED_ARGUMENTS                                                            \
  "Tensor[] pixel_values, Tensor weight, Tensor[] positions, int[] position_kinds, Tensor? "    \
  "bias=None, Tensor? pixel_map=None, bool listed=False, bool channels_last=False, int[] "      \
  "image_sizes=[], str norm=\"none\", Tensor? norm_weight=None, Tensor? norm_bias=None, float " \
  "norm_eps=1e-6, Tensor? prefix=None, bool prefix_last=False, ScalarType? dtype=None"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("patch_embed(" VLMOPS_PATCH_EMBED_ARGUMENTS ") -> Tensor");
  // Of `pixel_values`, `weight` and `bias`, the norm's weight and bias, `prefix`, and of each table
  // and weight of `positions`, in this order; empty where `needs` says so.
  m.def("patch_embed_backward(Tensor grad, bool[] needs, " VLMOPS_PATCH_EMBED_ARGUMENTS
        ") -> Tensor[]");
  // The parts of the op on the CPU; `empty` and `pack` on a GPU too.
  m.def("patch_embed_launch(" VLMOPS_PATCH_EMBED_ARGUMENTS ") -> Tensor");
  m.def("patch_embed_empty(" VLMOPS_PATCH_EMBED_ARGUMENTS ") -> Tensor");
  m.def(
      "patch_embed_pack(Tensor[] pixel_values, Tensor weight, Tensor? pixel_map, bool listed, bool "
      "channels_last, int[] image_sizes, int begin, int end, ScalarType dtype, int pitch=0) -> "
      "Tensor");
  m.def(
      "patch_embed_finish(Tensor(a!) out, Tensor product, int begin, " VLMOPS_PATCH_EMBED_ARGUMENTS
      ") -> ()");
  m.def(
      "patch_embed_unpack(Tensor(a!)[] pixel_grads, Tensor panel, int begin, Tensor weight, "
      "Tensor? "
      "pixel_map, bool listed, bool channels_last, int[] image_sizes) -> ()");
  m.def("patch_embed_column_sums(Tensor rows) -> Tensor");
}

#define VLMOPS_PATCH_EMBED_IMPL(m)                                                \
  m.impl("patch_embed_launch",                                                    \
         TORCH_BOX(&vlmops::patch_embed::unpacked<vlmops::patch_embed::launch>)); \
  m.impl("patch_embed_empty",                                                     \
         TORCH_BOX(&vlmops::patch_embed::unpacked<vlmops::patch_embed::empty>));  \
  m.impl("patch_embed_pack", TORCH_BOX(&vlmops::patch_embed::pack));              \
  m.impl("patch_embed_finish", TORCH_BOX(&vlmops::patch_embed::finish))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) {
  VLMOPS_PATCH_EMBED_IMPL(m);
  m.impl("patch_embed_unpack", TORCH_BOX(&vlmops::patch_embed::unpack));
  m.impl("patch_embed_column_sums", TORCH_BOX(&vlmops::patch_embed::column_sums));
}
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_PATCH_EMBED_IMPL(m); }
