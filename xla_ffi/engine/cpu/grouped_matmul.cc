#include "xla_ffi/engine/cpu/grouped_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/products.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {
namespace {

// A tile of a result, and how much of the sum over it is made at a time: one block of each operand
// in float32, and of the result, stay in the second cache. Products of ours have their own.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileColumns = 512;
constexpr int64_t kTileDepth = 384;
// What the BLAS reads and writes in place is better cut by the BLAS itself: such tiles are large.
// Those of a kernel's gradient, whose pages are fresh, are better still with whole rows.
constexpr int64_t kLargeTileRows = 512;
constexpr int64_t kLargeTileColumns = 1024;
constexpr int64_t kGradientTileColumns = 1536;
// Floats for products that wait to be summed, that a thread keeps for its next call.
constexpr int64_t kKeptProducts = 4 << 20;
// Products of fewer operations than this end before a helper wakes up.
constexpr double kInlineFlops = 2e6;
// Rows whose distance is a multiple of this compete for the same lines of the first cache.
constexpr int64_t kBadStride = 2048;

std::atomic<Sgemm> the_sgemm{nullptr};

// Memory that nobody has touched.
class Scratch {
 public:
  float* Get(int64_t floats) {
    if (floats > size_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, Bytes(floats))));
      if (data_ == nullptr) throw std::bad_alloc();
      AdviseHugePages(data_.get(), static_cast<int64_t>(Bytes(floats)));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  static size_t Bytes(int64_t floats) { return static_cast<size_t>((floats * 4 + 63) / 64 * 64); }

  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// What a thread needs for its tile. Kept with the thread, so that its pages are there.
struct TileScratch {
  Scratch a, b, c, copies, products;
  std::vector<const void*> rows;
  std::vector<const uint32_t*> words;

  // The rows as rows of words.
  const uint32_t* const* Words() {
    words.clear();
    for (const void* row : rows) words.push_back(static_cast<const uint32_t*>(row));
    return words.data();
  }
};
TileScratch& ThreadScratch() {
  static thread_local TileScratch scratch;
  return scratch;
}

struct Block {
  const float* data;
  int64_t stride;
};

// Rows read through an index, each times a weight; rows of zeros where `index` or `other`, the
// index of what they are multiplied with, is negative.
struct Operand {
  const RowKernels& kernels;
  Float type;
  Rows rows;
  const int32_t* index = nullptr;
  const int32_t* other = nullptr;
  const float* weights = nullptr;

  bool direct() const {
    return type == Float::kF32 && index == nullptr && other == nullptr && weights == nullptr;
  }

  const char* At(int64_t row, int64_t column) const {
    const int64_t from = index == nullptr ? row : index[row];
    return from < 0 || (other != nullptr && other[row] < 0) ? nullptr
                                                            : rows.At(from) + column * SizeOf(type);
  }

  // Rows [r, r + height) and columns [c, c + width) in float32, in place or in `scratch`.
  Block Get(int64_t r, int64_t height, int64_t c, int64_t width, Scratch* scratch) const {
    if (direct()) return {reinterpret_cast<const float*>(At(r, c)), rows.bytes / 4};
    constexpr float kOne = 1;
    const auto copy = kernels.sum_rows[static_cast<size_t>(type)][static_cast<size_t>(Float::kF32)];
    const int64_t stride = (width + 15) / 16 * 16;
    float* const out = scratch->Get(height * stride);
    for (int64_t i = 0; i < height; ++i) {
      float* const to = out + i * stride;
      const void* const from = At(r + i, c);
      if (from == nullptr) {
        std::memset(to, 0, static_cast<size_t>(width) * sizeof(float));
        continue;
      }
      const void* next = i + 1 < height ? At(r + i + 1, c) : from;
      if (next == nullptr) next = from;
      copy(&from, weights == nullptr ? &kOne : weights + r + i, 1, width, to, &next);
    }
    return {out, stride};
  }

  // Pointers to rows [r, r + height) from column c on, as operands of `products`, and to rows of
  // zeros up to a whole number of blocks. They are copies, `width` elements long, where they must
  // be converted or weighted, or would stand in each other's way as `neighbours`.
  void Point(const Products& products, int64_t r, int64_t height, int64_t c, int64_t width,
             bool neighbours, TileScratch* scratch) const {
    static const float kZeros[std::max({kMostDepth, kMostTileRows, kTileColumns})] = {};
    constexpr float kOne = 1;
    const bool copied = type != products.type || weights != nullptr ||
                        (neighbours && products.rows_compete && rows.bytes % kBadStride == 0);
    const int64_t bytes = width * SizeOf(products.type);
    char* copy =
        copied ? reinterpret_cast<char*>(scratch->copies.Get((height * bytes + 3) / 4)) : nullptr;
    const auto write =
        kernels.sum_rows[static_cast<size_t>(type)][static_cast<size_t>(products.type)];
    scratch->rows.clear();
    for (int64_t i = 0; i < height; ++i) {
      const void* row = At(r + i, c);
      if (row == nullptr) {
        row = kZeros;
      } else if (copied) {
        write(&row, weights == nullptr ? &kOne : weights + r + i, 1, width, copy, &row);
        row = copy;
        copy += bytes;
      }
      scratch->rows.push_back(row);
    }
    while (static_cast<int64_t>(scratch->rows.size()) % (products.per_word * products.block) != 0) {
      scratch->rows.push_back(kZeros);
    }
  }
};

// Whether `products` rather than the BLAS is for a group of so many rows. In float32 the BLAS is as
// fast, unless rows need to be collected for it first, or are so few that its own copy of the
// kernel takes long beside the products.
bool Suits(const Products* products, int64_t rows, const Operand& operand) {
  constexpr int64_t kEnough = 32, kFew = 256;
  if (products == nullptr || products->type == Float::kBf16) return products != nullptr;
  return rows >= kEnough && (rows <= kFew || !operand.direct());
}

// c [m, n] += op(a) op(b), or = where it is the first part of the sum.
void Multiply(bool transpose_a, const Block& a, bool transpose_b, const Block& b, int64_t m,
              int64_t n, int64_t k, bool first, float* c, int64_t stride) {
  constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112;
  the_sgemm.load(std::memory_order_relaxed)(
      kRowMajor, transpose_a ? kTransposed : kPlain, transpose_b ? kTransposed : kPlain,
      static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1, a.data,
      static_cast<int>(a.stride), b.data, static_cast<int>(b.stride), first ? 0 : 1, c,
      static_cast<int>(stride));
}

// Equal parts of [0, size), none longer than `most`, all but the last whole panels.
std::vector<int64_t> Cut(int64_t size, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (size + most - 1) / most);
  const int64_t step = RoundUp(std::max<int64_t>(1, (size + parts - 1) / parts), kPanelColumns);
  std::vector<int64_t> cuts;
  for (int64_t at = 0; at < size; at += step) cuts.push_back(at);
  cuts.push_back(size);
  return cuts;
}

// A part of a result: of group `group`, [first, last) and [begin, end).
struct Tile {
  int64_t group;
  int64_t first, last;
  int64_t begin, end;
};

// Tiles of so many rows and columns at most.
void CutTiles(int64_t group, int64_t from, int64_t height, int64_t width, int64_t most_rows,
              int64_t most_columns, std::vector<Tile>* tiles) {
  const std::vector<int64_t> columns = Cut(width, most_columns), rows = Cut(height, most_rows);
  for (size_t j = 0; j + 1 < columns.size(); ++j) {
    for (size_t i = 0; i + 1 < rows.size(); ++i) {
      tiles->push_back({group, from + rows[i], from + rows[i + 1], columns[j], columns[j + 1]});
    }
  }
}

// Where each group begins, and the end of the last.
Status FindGroups(const char* target, const int32_t* sizes, int64_t groups, int64_t assignments,
                  std::vector<int64_t>* begin) {
  begin->assign(1, 0);
  for (int64_t e = 0; e < groups; ++e) {
    if (sizes[e] < 0) {
      return Status::InvalidArgument(Concat(target, ": group_sizes[", e, "] is ", int64_t{sizes[e]},
                                            ", it must be at least 0."));
    }
    begin->push_back(begin->back() + sizes[e]);
  }
  if (begin->back() <= assignments) return Status::Ok();
  return Status::InvalidArgument(Concat(target, ": group_sizes add up to ", begin->back(),
                                        ", there are ", assignments, " assignments."));
}

Status CheckIndex(const char* target, const char* name, const int32_t* index, int64_t total,
                  int64_t rows) {
  for (int64_t a = 0; index != nullptr && a < total; ++a) {
    if (index[a] < rows) continue;
    return Status::InvalidArgument(Concat(target, ": ", name, "[", a, "] is ", int64_t{index[a]},
                                          ", which does not exist (of ", rows, " rows)."));
  }
  return Status::Ok();
}

Status NeedBlas(const char* target) {
  if (the_sgemm.load(std::memory_order_relaxed) != nullptr) return Status::Ok();
  return Status::Internal(Concat(target, ": no BLAS was loaded, call jax_fusco.register() first."));
}

// Calls that run now. Those of several devices share the cores: helpers of a call would only take
// turns with them.
std::atomic<int> running_calls{0};
class RunningCall {
 public:
  RunningCall() { running_calls.fetch_add(1, std::memory_order_relaxed); }
  ~RunningCall() { running_calls.fetch_sub(1, std::memory_order_relaxed); }
  RunningCall(const RunningCall&) = delete;
  RunningCall& operator=(const RunningCall&) = delete;
};

int ThreadsFor(double flops, const Settings& settings) {
  if (flops < kInlineFlops) return 1;
  return std::max(1, settings.threads - running_calls.load(std::memory_order_relaxed) + 1);
}

void Clear(const Rows& rows, int64_t first) {
  const int64_t bytes = (rows.count - first) * rows.bytes;
  if (bytes <= 0) return;
  const int64_t left = ReleaseAsZero(rows.At(first), bytes);
  std::memset(rows.At(first), 0, static_cast<size_t>(left));
}

// One call of GroupedMatmul.
class Product {
 public:
  Product(const GroupedMatmulCall& call, const Settings& settings,
          const Workers::Schedule& schedule)
      : call_(call),
        schedule_(schedule),
        kernels_(RowKernels::For(settings.isa)),
        rows_{kernels_, call.type, call.rows, call.source},
        kernel_{kernels_, call.type, call.kernel},
        depth_(call.transposed ? call.kernel_columns : call.kernel_rows),
        width_(call.transposed ? call.kernel_rows : call.kernel_columns),
        settings_(settings),
        products_(Products::For(depth_ % 2 == 0 ? call.type : Float::kF32, settings.isa)) {}

  Status Run() {
    constexpr char kTarget[] = "jax_fusco_grouped_matmul";
    Status status = NeedBlas(kTarget);
    if (status.ok()) {
      status =
          FindGroups(kTarget, call_.group_sizes, call_.num_groups, call_.num_assignments, &begin_);
    }
    if (!status.ok()) return status;
    total_ = begin_.back();
    const bool merges = call_.merge != nullptr;
    status = CheckIndex(kTarget, "source", call_.source, total_, call_.rows.count);
    if (status.ok()) status = CheckIndex(kTarget, "merge", call_.merge, total_, call_.out.count);
    if (!status.ok()) return status;
    AdviseHugePages(call_.out.data, (merges ? call_.out.count : total_) * call_.out.bytes);
    if (!merges) Clear(call_.out, total_);
    if (width_ > 0) merges ? MergeAll() : WriteAll();
    if (call_.dots != nullptr) SumDots();
    return Status::Ok();
  }

 private:
  int threads() const {
    return ThreadsFor(2.0 * static_cast<double>(total_) * static_cast<double>(depth_) *
                          static_cast<double>(width_),
                      settings_);
  }

  int64_t tile_rows() const { return products_ == nullptr ? kTileRows : products_->tile_rows; }

  // Cuts the results' columns [begin, end) of all groups, each as its own size says: a group has
  // the same bits whatever the others are.
  std::vector<Tile> Tiles(int64_t begin, int64_t end, bool in_place) const {
    std::vector<Tile> tiles;
    for (int64_t e = 0; e < call_.num_groups; ++e) {
      const int64_t size = call_.group_sizes[e];
      const bool large =
          in_place && rows_.direct() && kernel_.direct() && !Suits(products_, size, rows_);
      CutTiles(e, begin_[static_cast<size_t>(e)], size, end - begin,
               large ? kLargeTileRows : tile_rows(), large ? kLargeTileColumns : kTileColumns,
               &tiles);
    }
    for (Tile& tile : tiles) tile.begin += begin, tile.end += begin;
    return tiles;
  }

  // The product of a tile in float32, to `c`.
  void Compute(const Tile& tile, float* c, int64_t stride) const {
    const int64_t height = tile.last - tile.first, columns = tile.end - tile.begin;
    if (depth_ == 0) {
      for (int64_t i = 0; i < height; ++i) std::fill_n(c + i * stride, columns, 0.0f);
      return;
    }
    TileScratch& scratch = ThreadScratch();
    const int64_t row = tile.group * call_.kernel_rows;
    if (Suits(products_, call_.group_sizes[tile.group], rows_)) {
      for (int64_t k = 0; k < depth_; k += products_->depth) {
        const int64_t part = std::min(products_->depth, depth_ - k);
        const int64_t words = part / products_->per_word;
        auto* const packed =
            reinterpret_cast<uint32_t*>(scratch.b.Get(products_->PackedWords(words, columns)));
        if (call_.transposed) {
          kernel_.Point(*products_, row + tile.begin, columns, k, part, false, &scratch);
          products_->pack_columns(scratch.rows.data(), words, columns, packed);
        } else {
          kernel_.Point(*products_, row + k, part, tile.begin, columns, false, &scratch);
          products_->pack_rows(scratch.rows.data(), static_cast<int64_t>(scratch.rows.size()),
                               columns, packed);
        }
        rows_.Point(*products_, tile.first, height, k, part, true, &scratch);
        products_->multiply(scratch.Words(), 1, packed, height, columns, words, k == 0, c, stride);
      }
      return;
    }
    const int64_t step = rows_.direct() && kernel_.direct() ? depth_ : kTileDepth;
    for (int64_t k = 0; k < depth_; k += step) {
      const int64_t part = std::min(step, depth_ - k);
      const Block a = rows_.Get(tile.first, height, k, part, &scratch.a);
      const Block b = call_.transposed
                          ? kernel_.Get(row + tile.begin, columns, k, part, &scratch.b)
                          : kernel_.Get(row + k, part, tile.begin, columns, &scratch.b);
      Multiply(false, a, call_.transposed, b, height, columns, part, k == 0, c, stride);
    }
  }

  // Every product to its own row.
  void WriteAll() {
    const bool in_place =
        call_.type == Float::kF32 && call_.weights == nullptr && call_.dots == nullptr;
    const std::vector<Tile> tiles = Tiles(0, width_, in_place);
    PrepareDots();
    Workers::ParallelFor(
        threads(), static_cast<int64_t>(tiles.size()),
        [&](int64_t i) {
          const Tile& tile = tiles[static_cast<size_t>(i)];
          if (in_place) {
            Compute(tile, reinterpret_cast<float*>(OutAt(tile.first, tile.begin)), width_);
            return;
          }
          const int64_t columns = tile.end - tile.begin;
          float* const c = ThreadScratch().c.Get(kMostTileRows * kTileColumns);
          Compute(tile, c, columns);
          for (int64_t a = tile.first; a < tile.last; ++a) {
            Store(a, c + (a - tile.first) * columns, tile.begin, columns, OutAt(a, tile.begin));
          }
        },
        schedule_);
  }

  // Sums of products, a panel of columns at a time: first the products, then the sums.
  void MergeAll() {
    PrepareDots();
    FindTerms();
    Scratch own;
    // Kept with the thread while it is small.
    Scratch& products =
        total_ * std::min(width_, kTileColumns) <= kKeptProducts ? ThreadScratch().products : own;
    const int64_t most = std::min(width_, kTileColumns);
    float* const y = products.Get(total_ * most);
    const std::vector<int64_t> panels = Cut(width_, kTileColumns);
    const std::vector<int64_t> parts = Cut(call_.out.count, kTileRows);
    for (size_t p = 0; p + 1 < panels.size(); ++p) {
      const int64_t begin = panels[p], columns = panels[p + 1] - begin;
      const std::vector<Tile> tiles = Tiles(begin, begin + columns, false);
      Workers::ParallelFor(
          threads(), static_cast<int64_t>(tiles.size()),
          [&](int64_t i) {
            const Tile& tile = tiles[static_cast<size_t>(i)];
            Compute(tile, y + tile.first * columns, columns);
            if (call_.dots == nullptr) return;
            float* const unused = ThreadScratch().c.Get(kMostTileRows * kTileColumns);
            for (int64_t a = tile.first; a < tile.last; ++a) {
              Store(a, y + a * columns, begin, columns, unused);
            }
          },
          schedule_);
      Workers::ParallelFor(
          threads(), static_cast<int64_t>(parts.size()) - 1,
          [&](int64_t i) {
            MergeRows(parts[static_cast<size_t>(i)], parts[static_cast<size_t>(i) + 1], y, begin,
                      columns);
          },
          schedule_);
    }
  }

  // The assignments of each row of the result, in ascending order.
  void FindTerms() {
    const auto rows = static_cast<size_t>(call_.out.count);
    term_begin_.assign(rows + 1, 0);
    for (int64_t a = 0; a < total_; ++a) {
      if (call_.merge[a] >= 0) ++term_begin_[static_cast<size_t>(call_.merge[a]) + 1];
    }
    for (size_t t = 0; t < rows; ++t) term_begin_[t + 1] += term_begin_[t];
    terms_.resize(static_cast<size_t>(term_begin_[rows]));
    std::vector<int64_t> next(term_begin_.begin(), term_begin_.end() - 1);
    for (int64_t a = 0; a < total_; ++a) {
      if (call_.merge[a] < 0) continue;
      terms_[static_cast<size_t>(next[static_cast<size_t>(call_.merge[a])]++)] = a;
    }
  }

  void MergeRows(int64_t first, int64_t last, const float* y, int64_t begin, int64_t columns) {
    const auto sum =
        kernels_.sum_rows[static_cast<size_t>(Float::kF32)][static_cast<size_t>(call_.type)];
    std::vector<const void*> rows;
    std::vector<float> weights;
    for (int64_t t = first; t < last; ++t) {
      rows.clear();
      weights.clear();
      for (int64_t i = term_begin_[static_cast<size_t>(t)];
           i < term_begin_[static_cast<size_t>(t) + 1]; ++i) {
        const int64_t a = terms_[static_cast<size_t>(i)];
        // An assignment without a source is nothing, whatever its weight.
        if (call_.source != nullptr && call_.source[a] < 0) continue;
        rows.push_back(y + a * columns);
        weights.push_back(call_.weights == nullptr ? 1 : call_.weights[a]);
      }
      sum(rows.data(), weights.data(), static_cast<int64_t>(rows.size()), columns, OutAt(t, begin),
          rows.data());
    }
  }

  // Rounds the product of assignment a, times its weight, to `out`, and notes its part of the dot.
  void Store(int64_t a, const float* product, int64_t begin, int64_t columns, void* out) {
    constexpr float kOne = 1;
    const bool nothing = call_.source != nullptr && call_.source[a] < 0;
    const float* const weight = call_.weights == nullptr || nothing ? &kOne : call_.weights + a;
    const void* const from = product;
    const int64_t other = call_.merge == nullptr ? a : call_.merge[a];
    if (call_.dots == nullptr || other < 0 || nothing) {
      kernels_.sum_rows[static_cast<size_t>(Float::kF32)][static_cast<size_t>(call_.type)](
          &from, weight, 1, columns, out, &from);
      return;
    }
    const auto panel = static_cast<size_t>(begin / panel_columns_);
    kernels_.scale_and_dot[static_cast<size_t>(Float::kF32)][static_cast<size_t>(call_.type)](
        product, call_.partner.At(other) + begin * SizeOf(call_.type), weight, columns, out,
        &parts_[panel * static_cast<size_t>(total_) + static_cast<size_t>(a)], product);
  }

  // Each dot product is made of parts, one for each tile of its row.
  void PrepareDots() {
    const std::vector<int64_t> panels = Cut(width_, kTileColumns);
    panel_columns_ = panels.size() > 1 ? panels[1] : 1;
    num_panels_ = panels.size() - 1;
    if (call_.dots != nullptr) parts_.assign(num_panels_ * static_cast<size_t>(total_), 0);
  }
  void SumDots() {
    std::fill_n(call_.dots, call_.num_assignments, 0.0f);
    for (size_t p = 0; p < num_panels_; ++p) {
      for (int64_t a = 0; a < total_; ++a) {
        call_.dots[a] += parts_[p * static_cast<size_t>(total_) + static_cast<size_t>(a)];
      }
    }
  }

  char* OutAt(int64_t row, int64_t column) const {
    return call_.out.At(row) + column * SizeOf(call_.type);
  }

  const GroupedMatmulCall& call_;
  const Workers::Schedule& schedule_;
  const RowKernels& kernels_;
  const Operand rows_, kernel_;
  const int64_t depth_, width_;
  const Settings& settings_;
  const Products* const products_;
  std::vector<int64_t> begin_;  // of each group
  int64_t total_ = 0;
  std::vector<int64_t> term_begin_, terms_;
  int64_t panel_columns_ = 1;
  size_t num_panels_ = 0;
  std::vector<float> parts_;
};

}  // namespace

void SetSgemm(Sgemm sgemm) { the_sgemm.store(sgemm, std::memory_order_relaxed); }

Status GroupedMatmul(const GroupedMatmulCall& call, const Settings& settings,
                     const Workers::Schedule& schedule) {
  const RunningCall running;
  return Product(call, settings, schedule).Run();
}

Status GroupedOuter(const GroupedOuterCall& call, const Settings& settings,
                    const Workers::Schedule& schedule) {
  constexpr char kTarget[] = "jax_fusco_grouped_outer";
  const RunningCall running;
  std::vector<int64_t> begin;
  Status status = NeedBlas(kTarget);
  if (status.ok()) {
    status = FindGroups(kTarget, call.group_sizes, call.num_groups, call.num_assignments, &begin);
  }
  if (!status.ok()) return status;
  const int64_t total = begin.back();
  status = CheckIndex(kTarget, "source", call.source, total, call.rows.count);
  if (status.ok()) status = CheckIndex(kTarget, "merge", call.merge, total, call.g.count);
  if (!status.ok()) return status;
  const RowKernels& kernels = RowKernels::For(settings.isa);
  const Operand rows{kernels, call.type, call.rows, call.source, call.merge};
  const Operand g{kernels, call.type, call.g, call.merge, call.source, call.weights};
  AdviseHugePages(call.out.data, call.out.count * call.out.bytes);
  const Products* const products = Products::For(call.type, settings.isa);
  const bool direct = rows.direct() && g.direct();
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < call.num_groups; ++e) {
    const bool suited = Suits(products, call.group_sizes[e], rows);
    const bool large = direct && !suited;
    CutTiles(e, 0, call.kernel_rows, call.kernel_columns,
             suited  ? products->tile_rows
             : large ? kLargeTileRows
                     : kTileRows,
             large ? kGradientTileColumns : kTileColumns, &tiles);
  }
  // The longest sums first, so that all threads end together.
  std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) {
    return call.group_sizes[a.group] > call.group_sizes[b.group];
  });
  const bool in_place = call.type == Float::kF32;
  const auto round =
      kernels.sum_rows[static_cast<size_t>(Float::kF32)][static_cast<size_t>(call.type)];
  const double flops = 2.0 * static_cast<double>(total) * static_cast<double>(call.kernel_rows) *
                       static_cast<double>(call.kernel_columns);
  const double bytes = static_cast<double>(call.out.count * call.out.bytes);
  const auto run = [&](int64_t i) {
    const Tile& tile = tiles[static_cast<size_t>(i)];
    const int64_t height = tile.last - tile.first, columns = tile.end - tile.begin;
    const int64_t from = begin[static_cast<size_t>(tile.group)];
    const int64_t size = call.group_sizes[tile.group];
    const auto out = [&](int64_t row) {
      return call.out.At(tile.group * call.kernel_rows + row) + tile.begin * SizeOf(call.type);
    };
    if (size == 0) {
      for (int64_t r = tile.first; r < tile.last; ++r) {
        std::memset(out(r), 0, static_cast<size_t>(columns * SizeOf(call.type)));
      }
      return;
    }
    TileScratch& scratch = ThreadScratch();
    float* const c = in_place ? reinterpret_cast<float*>(out(tile.first))
                              : scratch.c.Get(kMostTileRows * kTileColumns);
    const int64_t stride = in_place ? call.kernel_columns : columns;
    const int64_t step = direct ? size : kTileDepth;
    const bool suited = Suits(products, size, rows);
    for (int64_t k = 0; suited && k < size; k += products->depth) {
      const int64_t part = std::min(products->depth, size - k);
      const int64_t rows_read = RoundUp(part, products->per_word * products->block);
      const int64_t words = rows_read / products->per_word;
      auto* const a =
          reinterpret_cast<uint32_t*>(scratch.a.Get(products->PackedWords(words, height)));
      auto* const b =
          reinterpret_cast<uint32_t*>(scratch.b.Get(products->PackedWords(words, columns)));
      rows.Point(*products, from + k, part, tile.first, height, false, &scratch);
      products->pack_rows(scratch.rows.data(), rows_read, height, a);
      g.Point(*products, from + k, part, tile.begin, columns, false, &scratch);
      products->pack_rows(scratch.rows.data(), rows_read, columns, b);
      scratch.words.clear();
      for (int64_t i = 0; i < height; ++i) {
        const int64_t panel = i / kPanelColumns * kPanelColumns;
        scratch.words.push_back(a + panel * words + i % kPanelColumns);
      }
      products->multiply(scratch.words.data(), kPanelColumns, b, height, columns, words, k == 0, c,
                         stride);
    }
    for (int64_t k = 0; !suited && k < size; k += step) {
      const int64_t part = std::min(step, size - k);
      const Block a = rows.Get(from + k, part, tile.first, height, &scratch.a);
      const Block b = g.Get(from + k, part, tile.begin, columns, &scratch.b);
      Multiply(true, a, false, b, height, columns, part, k == 0, c, stride);
    }
    if (in_place) return;
    for (int64_t r = tile.first; r < tile.last; ++r) {
      constexpr float kOne = 1;
      const void* const sum = c + (r - tile.first) * columns;
      round(&sum, &kOne, 1, columns, out(r), &sum);
    }
  };
  Workers::ParallelFor(ThreadsFor(flops + bytes, settings), static_cast<int64_t>(tiles.size()), run,
                       schedule);
  return Status::Ok();
}

}  // namespace jax_fusco::cpu
