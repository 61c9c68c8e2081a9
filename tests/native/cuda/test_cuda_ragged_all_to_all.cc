// ragged_all_to_all and fill_if_failed on host teams against literal loops.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/host_team.h"
#include "tests/native/cuda/ragged_case.h"
#include "tests/native/cuda/rank_cases.h"
#include "xla_ffi/engine/cuda/fill_if_failed.h"
#include "xla_ffi/engine/cuda/ragged_all_to_all.h"

namespace jax_fusco::testing {
namespace {

using cuda::RaggedAllToAllArgs;
using cuda::Table;

void Run(Exchange* exchange) {
  AllRanks(exchange->ranks, [&](int64_t rank) {
    const auto r = static_cast<size_t>(rank);
    const RaggedAllToAllArgs args = exchange->Args(r);
    cuda::WithWord(args.row_bytes, args.result, [&](auto word) {
      Launch({3, 8, cuda::RaggedSharedBytes(8)}, [&](const HostTeam& team) {
        cuda::RaggedAllToAll<decltype(word)>(team, args, &exchange->tables[r]);
      });
    });
  });
}

void RaggedIsTheLiteralLoop() {
  Random random(1);
  for (int64_t row_bytes : {1, 2, 6, 8, 16, 48, 100, 1040}) {
    for (int64_t ranks : {1, 2, 4, 8}) {
      for (int64_t per_rank : {1, 3}) {
        Exchange exchange(ranks, per_rank, row_bytes, random.Of<int64_t>({0, 0, 1, 8}), random);
        Run(&exchange);
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
    Run(&exchange);
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
