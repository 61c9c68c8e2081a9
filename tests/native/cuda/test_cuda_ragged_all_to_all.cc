// ragged_all_to_all and fill_if_failed on host teams against literal loops.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/host_team.h"
#include "tests/native/cuda/rank_cases.h"
#include "xla_ffi/engine/cuda/fill_if_failed.h"
#include "xla_ffi/engine/cuda/ragged_all_to_all.h"

namespace jax_fusco::testing {
namespace {

using cuda::RaggedAllToAllArgs;
using cuda::Table;

constexpr int64_t kPeerRows = 37;

// Slices of random sizes, one after the other in the senders' operands (which they share) and in
// the receivers' results, with rows between them that nobody writes.
struct Exchange {
  int64_t ranks;
  int64_t per_rank;
  int64_t row_bytes;
  int64_t rows = 0;  // of a result
  std::vector<Ints> input_offsets, send_sizes, output_offsets, recv_sizes;
  std::vector<Memory> operand, result;
  std::vector<Table> tables;

  Exchange(int64_t ranks_in, int64_t per_rank_in, int64_t row_bytes_in, int64_t offset,
           Random& random)
      : ranks(ranks_in), per_rank(per_rank_in), row_bytes(row_bytes_in) {
    const Ints none(static_cast<size_t>(ranks * per_rank), 0);
    input_offsets = send_sizes = output_offsets = recv_sizes =
        std::vector<Ints>(static_cast<size_t>(ranks), none);
    const bool skewed = random.OneIn(3), silent = random.OneIn(6);
    for (size_t p = 0; p < none.size() / static_cast<size_t>(per_rank); ++p) {
      int64_t at = random.Int(0, 2);
      for (size_t s = 0; s < static_cast<size_t>(ranks); ++s) {
        for (int64_t q = 0; q < per_rank; ++q) {
          const int64_t most = silent ? 0 : skewed && random.OneIn(4) ? kPeerRows : 3;
          const int64_t size = random.Int(0, most);
          const auto i = p * static_cast<size_t>(per_rank) + static_cast<size_t>(q);
          send_sizes[s][i] = static_cast<int32_t>(size);
          input_offsets[s][i] = static_cast<int32_t>(size == 0 ? random.Of({-5, 0, INT32_MAX})
                                                               : random.Int(0, kPeerRows - size));
          output_offsets[s][i] =
              static_cast<int32_t>(size == 0 ? random.Of({INT32_MIN, 0, 99}) : at);
          recv_sizes[p][s * static_cast<size_t>(per_rank) + static_cast<size_t>(q)] =
              static_cast<int32_t>(size);
          at += size + random.Int(0, 1);
        }
      }
      rows = std::max(rows, at);
    }
    for (int64_t r = 0; r < ranks; ++r) {
      operand.emplace_back(kPeerRows * row_bytes, r == 0 ? offset : 0, random);
      result.emplace_back(rows * row_bytes, r == 1 ? offset : 0);
    }
    for (int64_t r = 0; r < ranks; ++r) {
      tables.push_back({});
      tables.back().rank = static_cast<int32_t>(r);
      tables.back().num_ranks = static_cast<int32_t>(ranks);
      for (size_t p = 0; p < static_cast<size_t>(ranks); ++p) {
        const void** const of = tables.back().operand[p];
        of[0] = operand[p].at();
        of[1] = input_offsets[p].data();
        of[2] = send_sizes[p].data();
        of[3] = output_offsets[p].data();
        of[4] = recv_sizes[p].data();
      }
    }
  }

  void Run() {
    AllRanks(ranks, [&](int64_t rank) {
      const auto r = static_cast<size_t>(rank);
      RaggedAllToAllArgs args;
      args.slices_per_rank = per_rank;
      args.recv_sizes = recv_sizes[r].data();
      args.peer_rows = kPeerRows;
      args.rows = rows;
      args.row_bytes = row_bytes;
      args.result = result[r].at();
      cuda::WithWord(row_bytes, args.result, [&](auto word) {
        Launch({3, 8, cuda::RaggedSharedBytes(8)}, [&](const HostTeam& team) {
          cuda::RaggedAllToAll<decltype(word)>(team, args, &tables[r]);
        });
      });
    });
  }
  std::vector<char> Expected(size_t p) const {
    std::vector<char> expected(result[p].Copy().size(), 'x');
    for (size_t s = 0; s < static_cast<size_t>(ranks); ++s) {
      for (size_t q = 0; q < static_cast<size_t>(per_rank); ++q) {
        const size_t i = p * static_cast<size_t>(per_rank) + q;
        if (send_sizes[s][i] == 0) continue;
        std::memcpy(expected.data() + output_offsets[s][i] * row_bytes,
                    operand[s].at(input_offsets[s][i] * row_bytes),
                    static_cast<size_t>(send_sizes[s][i] * row_bytes));
      }
    }
    return expected;
  }
};

void RaggedIsTheLiteralLoop() {
  Random random(1);
  for (int64_t row_bytes : {1, 2, 6, 8, 16, 48, 100, 1040}) {
    for (int64_t ranks : {1, 2, 4, 8}) {
      for (int64_t per_rank : {1, 3}) {
        Exchange exchange(ranks, per_rank, row_bytes, random.Of<int64_t>({0, 0, 1, 8}), random);
        exchange.Run();
        for (size_t r = 0; r < exchange.tables.size(); ++r) {
          CHECK_EQ(exchange.result[r].Copy(), exchange.Expected(r));
          CHECK_EQ(exchange.tables[r].failure, 0);
        }
      }
    }
  }
}

// A slice that does not fit moves nothing to its receiver, and to nobody else less.
void BadSlices() {
  Random random(2);
  const struct {
    int32_t from, size, to, expected, detail;
  } bad[] = {{-1, 2, 0, 2, -1},
             {36, 2, 0, 2, 36},
             {INT32_MAX, 2, 0, 2, INT32_MAX},
             {0, -1, 0, -1, -1},
             {0, INT32_MIN, 0, INT32_MIN, INT32_MIN},
             {0, 2, -1, 2, -1},
             {0, 2, INT32_MAX, 2, INT32_MAX},
             {0, INT32_MAX, 0, INT32_MAX, 0},
             {0, 2, 0, 3, 2}};
  for (const auto& entry : bad) {
    Exchange exchange(4, 2, 24, 0, random);
    const size_t sent = 2 * 2 + 1;  // the second slice from rank 3 to rank 2
    exchange.input_offsets[3][sent] = entry.from;
    exchange.send_sizes[3][sent] = entry.size;
    exchange.output_offsets[3][sent] = entry.to;
    exchange.recv_sizes[2][3 * 2 + 1] = entry.expected;
    exchange.Run();
    CheckBadIndex(exchange.tables[2], 3, 2, entry.detail);
    const std::vector<char> untouched(exchange.result[2].Copy().size(), 'x');
    CHECK_EQ(exchange.result[2].Copy(), untouched);
    for (size_t r : {0, 1, 3}) {
      CHECK_EQ(exchange.tables[r].failure, 0);
      CHECK_EQ(exchange.result[r].Copy(), exchange.Expected(r));
    }
  }
}

void FillsWhatFailed() {
  for (int64_t offset : {0, 1, 15}) {
    for (bool failed : {false, true}) {
      std::vector<Memory> memory;
      cuda::Outputs outputs{};
      for (int64_t bytes : {0, 1, 14, 16, 17, 100}) {
        memory.emplace_back(bytes, offset);
        outputs.output[outputs.count++] = {memory.back().at(), bytes};
      }
      Table table{};
      table.failure = static_cast<int32_t>(failed ? cuda::Failure::kTimeout : cuda::Failure::kNone);
      Launch({2, 4, 0}, [&](const HostTeam& team) { FillIfFailed(team, outputs, &table); });
      for (const Memory& output : memory) {
        const std::vector<char> expected(output.Copy().size(), failed ? '\xff' : 'x');
        CHECK_EQ(output.Copy(), expected);
      }
    }
  }
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"RaggedIsTheLiteralLoop", RaggedIsTheLiteralLoop},
                   {"BadSlices", BadSlices},
                   {"FillsWhatFailed", FillsWhatFailed}});
}
