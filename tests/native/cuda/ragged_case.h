// A random ragged exchange of all ranks, and what it must give: a literal loop.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_RAGGED_CASE_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_RAGGED_CASE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/rank_cases.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::testing {

inline constexpr int64_t kPeerRows = 37;

// Slices of random sizes, one after the other in the senders' operands (which they share) and in
// the receivers' results, with rows between them that nobody writes.
struct Exchange {
  int64_t ranks;
  int64_t per_rank;
  int64_t row_bytes;
  int64_t rows = 0;  // of a result
  std::vector<Ints> input_offsets, send_sizes, output_offsets, recv_sizes;
  std::vector<Memory> operand, result;
  std::vector<cuda::Table> tables;

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

  cuda::RaggedAllToAllArgs Args(size_t r) const {
    cuda::RaggedAllToAllArgs args;
    args.slices_per_rank = per_rank;
    args.recv_sizes = recv_sizes[r].data();
    args.peer_rows = kPeerRows;
    args.rows = rows;
    args.row_bytes = row_bytes;
    args.result = result[r].at();
    return args;
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

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_RAGGED_CASE_H_
