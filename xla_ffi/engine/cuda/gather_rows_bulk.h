// gather_rows by bulk copies through shared memory, for long rows on machines that have them. A row
// of a peer is read once and written to all rows of its chain; no byte goes through a register.
#ifndef JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_BULK_H_
#define JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_BULK_H_

#include "xla_ffi/engine/cuda/gather_rows.h"
#include "xla_ffi/engine/cuda/sources.h"
#include "xla_ffi/engine/cuda/team.h"
#include "xla_ffi/engine/cuda/words.h"

namespace jax_fusco::cuda {

// How shared memory is cut: each of `lanes` lanes of a warp copies a piece of a row at a time
// through a ring of stages of its own.
struct BulkShape {
  static constexpr int kStages = 4;
  static constexpr int kAhead = 2;  // pieces under way behind the one that is written
  static constexpr int64_t kMaxPiece = 2048;
  static constexpr int64_t kWarpBytes = 48 << 10;  // of stages

  int64_t pieces;  // of a row
  int32_t piece;   // bytes, a multiple of 16; the last one of a row may be shorter
  int32_t lanes;   // of a warp that copy
};
inline BulkShape ShapeBulk(int64_t row_bytes, int lanes_of_warp, int64_t warp_bytes) {
  BulkShape shape;
  shape.pieces = (row_bytes + BulkShape::kMaxPiece - 1) / BulkShape::kMaxPiece;
  shape.piece =
      static_cast<int32_t>(((row_bytes + shape.pieces - 1) / shape.pieces + 15) / 16 * 16);
  const int64_t lanes = warp_bytes / (BulkShape::kStages * shape.piece);
  shape.lanes = static_cast<int32_t>(lanes < lanes_of_warp ? lanes : lanes_of_warp);
  return shape;
}
// A barrier for each stage of each lane, zeros to write, the stages.
inline int64_t BulkSharedBytes(const BulkShape& shape, int warps) {
  const int64_t stages = int64_t{warps} * shape.lanes * BulkShape::kStages;
  return (stages * 8 + 127) / 128 * 128 + shape.piece + stages * shape.piece;
}
// At most, for any rows.
constexpr int64_t BulkMaxSharedBytes(int warps, int lanes_of_warp) {
  return int64_t{warps} * lanes_of_warp * BulkShape::kStages * 8 + 127 + BulkShape::kMaxPiece +
         warps * BulkShape::kWarpBytes;
}

// A piece on its way.
struct Piece {
  bool exists = false;
  Order order;
  const char* from = nullptr;  // not null: on its way to the stage
  int64_t row = 0;
  int64_t offset = 0;
  int32_t bytes = 0;
  int stage = 0;
};

// What one lane does. Bulk is the lane's copy engine: Init(stage), Load(stage, to, from, bytes) and
// Await(stage), which may be used for a stage once Stored() says that what was stored from it has
// been read; Store(to, from, bytes), Commit(), Stored<n>(): all but the last n commits have been
// read; Finish(): all has been written.
template <typename Bulk, typename Team>
class BulkLane {
 public:
  JAX_FUSCO_PROGRAM BulkLane(const Team& team, const GatherRowsArgs& args, Table* table,
                             const BulkShape& shape, char* zeros, char* stages, Bulk* bulk)
      : team_(team),
        args_(args),
        table_(table),
        shape_(shape),
        sources_(SourcesOf(args)),
        zeros_(zeros),
        stages_(stages),
        bulk_(bulk) {}

  // Copies the pieces. Their entries are read kBatch at a time, one batch ahead: a lane that waited
  // for each entry would begin no copy meanwhile, and of a chain all rows but one move nothing.
  JAX_FUSCO_PROGRAM void Run(Parts pieces) {
    Parts ahead = pieces;
    Entry now[kBatch] = {}, later[kBatch] = {};
    Read(&ahead, later);
    while (pieces.any()) {
      JAX_FUSCO_UNROLL
      for (int i = 0; i < kBatch; ++i) now[i] = later[i];
      Read(&ahead, later);
      int left = kBatch;
      for (Piece piece; Find(&pieces, now, &left, &piece);) {
        Start(&piece);
        FinishOldest(piece);
      }
    }
    for (int i = 0; i < BulkShape::kAhead; ++i) FinishOldest({});
    bulk_->Finish();
  }

 private:
  static constexpr int kBatch = 8;

  JAX_FUSCO_PROGRAM void Read(Parts* pieces, Entry* entries) const {
    JAX_FUSCO_UNROLL
    for (int i = 0; i < kBatch && pieces->any(); ++i, pieces->Next()) {
      entries[i] = EntryOf(sources_, pieces->row());
    }
  }

  // The next piece that moves something, of the `left` whose entries these are; `entries` shift,
  // because registers have no index. The other pieces take no stage: where there are many of them,
  // too few pieces would be under way.
  JAX_FUSCO_PROGRAM bool Find(Parts* pieces, Entry* entries, int* left, Piece* piece) const {
    for (piece->exists = false; !piece->exists && *left > 0 && pieces->any(); pieces->Next()) {
      piece->row = pieces->row();
      piece->offset = pieces->part() * shape_.piece;
      piece->order = OrderOf(team_, sources_, table_, piece->row, entries[0], args_.zero_tail);
      piece->exists = piece->order.task != Task::kNone;
      JAX_FUSCO_UNROLL
      for (int i = 1; i < kBatch; ++i) entries[i - 1] = entries[i];
      --*left;
    }
    return piece->exists;
  }

  JAX_FUSCO_PROGRAM void Start(Piece* piece) {
    // The stage was last stored from kStages - kAhead commits ago.
    bulk_->template Stored<BulkShape::kStages - BulkShape::kAhead - 1>();
    piece->stage = stage_;
    stage_ = (stage_ + 1) % BulkShape::kStages;
    const int64_t left = args_.row_bytes - piece->offset;
    piece->bytes = static_cast<int32_t>(left < shape_.piece ? left : shape_.piece);
    piece->from = RowOf(args_, table_, piece->order);
    if (piece->from == nullptr) return;
    piece->from += piece->offset;
    if (IsAligned<Word16>(piece->from)) {
      bulk_->Load(piece->stage, Stage(piece->stage), piece->from, piece->bytes);
    }
  }

  // Of those that were started before this one, kAhead at most.
  JAX_FUSCO_PROGRAM void FinishOldest(const Piece& newest) {
    Write(started_[0]);
    bulk_->Commit();
    JAX_FUSCO_UNROLL
    for (int i = 1; i < BulkShape::kAhead; ++i) started_[i - 1] = started_[i];
    started_[BulkShape::kAhead - 1] = newest;
  }

  JAX_FUSCO_PROGRAM void Write(const Piece& piece) {
    if (!piece.exists) return;
    const char* from = zeros_;
    if (piece.from != nullptr) {
      from = IsAligned<Word16>(piece.from) ? Stage(piece.stage) : nullptr;
      if (from != nullptr) bulk_->Await(piece.stage);
    }
    char* const out = static_cast<char*>(args_.out) + piece.offset;
    int64_t next = piece.order.next;
    for (int64_t row = piece.row;;) {
      char* const to = out + row * args_.row_bytes;
      if (from != nullptr) {
        bulk_->Store(to, from, piece.bytes);
      } else {
        for (int32_t b = 0; b < piece.bytes; ++b) to[b] = piece.from[b];
      }
      if (next >= args_.num_rows) return;
      row = next;
      next = FollowChain(team_, sources_, table_, row);
    }
  }

  JAX_FUSCO_PROGRAM char* Stage(int stage) const { return stages_ + stage * shape_.piece; }

  const Team& team_;
  const GatherRowsArgs& args_;
  Table* const table_;
  const BulkShape& shape_;
  const Sources sources_;
  char* const zeros_;
  char* const stages_;
  Bulk* const bulk_;
  Piece started_[BulkShape::kAhead];
  int stage_ = 0;  // of the next
};

// row_bytes and `out` are multiples of 16.
template <typename Bulk, typename Team>
JAX_FUSCO_PROGRAM void GatherRowsInBulk(const Team& team, const GatherRowsArgs& args, Table* table,
                                        const BulkShape& shape) {
  if (!HasPeers(team, table)) return;
  constexpr int kStages = BulkShape::kStages;
  const int64_t stages = int64_t{team.num_warps()} * shape.lanes * kStages;
  auto* const barriers = reinterpret_cast<uint64_t*>(team.shared());
  char* const zeros = team.shared() + (stages * 8 + 127) / 128 * 128;
  char* const rings = zeros + shape.piece;
  for (int64_t i = team.thread(); i * 16 < shape.piece; i += team.num_threads()) {
    *reinterpret_cast<Word16*>(zeros + i * 16) = Word16{};
  }
  const int64_t lane = int64_t{team.warp()} * shape.lanes + team.lane();  // of those that copy
  Bulk bulk(barriers + lane * kStages);
  if (team.lane() < shape.lanes) {
    for (int s = 0; s < kStages; ++s) bulk.Init(s);
  }
  bulk.FenceShared();
  team.Sync();
  if (team.lane() >= shape.lanes) return;
  BulkLane<Bulk, Team>(team, args, table, shape, zeros, rings + lane * kStages * shape.piece, &bulk)
      .Run(Parts(args.num_rows, shape.pieces, FirstRow(args.num_rows, table),
                 int64_t{team.block()} * team.num_warps() * shape.lanes + lane,
                 WarpsOfGrid(team) * shape.lanes));
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_BULK_H_
