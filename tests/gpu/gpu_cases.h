// The cases of the host's tests, moved by the kernels of a GPU.
#ifndef JAX_FUSCO_TESTS_GPU_GPU_CASES_H_
#define JAX_FUSCO_TESTS_GPU_GPU_CASES_H_

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/gpu/gpu_memory.h"
#include "tests/gpu/gpu_ranks.h"
#include "tests/native/check.h"
#include "tests/native/cuda/gather_case.h"
#include "tests/native/cuda/ragged_case.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/cuda/sums_cases.h"
#include "tests/native/naive_plan.h"

namespace jax_fusco::testing {

// Few and small cases, and several ranks come one after another.
inline bool small = false;
// Ranks come one after another: a bad index of one is nothing to the others.
inline bool apart = false;

// Ranks that have met often, in the same places: calls follow calls. By their number.
using Crews = std::map<std::pair<int64_t, bool>, std::unique_ptr<GpuRanks>>;
inline Crews& AllCrews() {
  static Crews crews;
  return crews;
}
inline GpuRanks& Crew(int64_t count) {
  const bool by_hand = apart || (small && count > 1);
  std::unique_ptr<GpuRanks>& crew = AllCrews()[{count, by_hand}];
  if (crew == nullptr) crew = std::make_unique<GpuRanks>(static_cast<size_t>(count), by_hand);
  return *crew;
}
inline std::vector<int64_t> Counts() {
  return small ? std::vector<int64_t>{1, 2, 4} : std::vector<int64_t>{1, 2, 4, 8};
}
inline int64_t Bytes4(int64_t count) { return 4 * count; }

inline void Run(Gather* gather) {
  Mirror gpu(!small);
  std::vector<RankCall> calls;
  for (size_t r = 0; r < gather->ranks.size(); ++r) {
    cuda::GatherRowsArgs args = gather->Args(r);
    const int64_t rows = args.num_rows;
    args.source_rank = gpu.In(args.source_rank, Bytes4(rows));
    args.source = gpu.In(args.source, Bytes4(rows));
    if (args.chain != nullptr) args.chain = gpu.In(args.chain, Bytes4(rows));
    args.out = gpu.Out(static_cast<char*>(args.out), rows * args.row_bytes);
    const char* const in = gpu.In(gather->in[r].at(), args.peer_rows * args.row_bytes);
    calls.push_back({{nullptr, nullptr, nullptr, in},
                     [args](cuda::Table* table, cuda::Stream stream) {
                       return cuda::LaunchGatherRows(args, table, stream);
                     },
                     nullptr,
                     {}});
  }
  Crew(gather->ranks.shape.num_ranks).Call(calls, &gather->ranks.tables);
  gpu.Back();
}

inline void Run(Reduce* reduce) {
  Mirror gpu(!small);
  std::vector<RankCall> calls;
  for (size_t r = 0; r < reduce->ranks.size(); ++r) {
    cuda::ReduceRowsArgs args = reduce->Args(r);
    const int64_t terms = args.tokens * args.k;
    args.slot_rank = gpu.In(args.slot_rank, Bytes4(terms));
    args.slot = gpu.In(args.slot, Bytes4(terms));
    if (args.weights != nullptr) {
      args.weights = gpu.In(reduce->weights[r].at(), terms * SizeOf(args.weights_type));
    }
    const int64_t out_bytes = args.tokens * args.length * SizeOf(args.out_type);
    args.out = gpu.Out(static_cast<char*>(args.out), out_bytes);
    const int64_t y_bytes = args.peer_rows * args.length * SizeOf(args.y_type);
    calls.push_back({{gpu.In(reduce->y[r].at(), y_bytes)},
                     [args](cuda::Table* table, cuda::Stream stream) {
                       return cuda::LaunchReduceRows(args, table, stream);
                     },
                     nullptr,
                     {}});
  }
  Crew(reduce->ranks.shape.num_ranks).Call(calls, &reduce->ranks.tables);
  gpu.Back();
}

inline void Run(Weighted* weighted, bool chained) {
  Mirror gpu(!small);
  std::vector<RankCall> calls;
  for (size_t r = 0; r < weighted->ranks.size(); ++r) {
    cuda::GatherRowsWeightedArgs args = weighted->Args(r, chained);
    const int64_t rows = args.num_rows;
    args.source_rank = gpu.In(args.source_rank, Bytes4(rows));
    args.source = gpu.In(args.source, Bytes4(rows));
    if (chained) args.chain = gpu.In(args.chain, Bytes4(rows));
    const int64_t row_bytes = args.length * SizeOf(args.y_type);
    args.y = gpu.In(weighted->y[r].at(), rows * row_bytes);
    args.dy = gpu.Out(weighted->dy[r].at(), rows * row_bytes);
    args.dots = gpu.Out(weighted->dots[r].at(), rows * SizeOf(SumType(args.y_type)));
    const int64_t g_bytes = args.tokens * args.length * SizeOf(args.g_type);
    const int64_t weights_bytes = args.tokens * args.k * SizeOf(args.weights_type);
    calls.push_back(
        {{gpu.In(weighted->g[r].at(), g_bytes), gpu.In(weighted->weights[r].at(), weights_bytes)},
         [args](cuda::Table* table, cuda::Stream stream) {
           return cuda::LaunchGatherRowsWeighted(args, table, stream);
         },
         nullptr,
         {}});
  }
  Crew(weighted->ranks.shape.num_ranks).Call(calls, &weighted->ranks.tables);
  gpu.Back();
}

inline void Run(Exchange* exchange) {
  Mirror gpu(!small);
  std::vector<RankCall> calls;
  const int64_t slices = exchange->ranks * exchange->per_rank;
  for (size_t r = 0; r < exchange->tables.size(); ++r) {
    cuda::RaggedAllToAllArgs args = exchange->Args(r);
    args.recv_sizes = gpu.In(args.recv_sizes, Bytes4(slices));
    args.result = gpu.Out(static_cast<char*>(args.result), args.rows * args.row_bytes);
    calls.push_back({{gpu.In(exchange->operand[r].at(), kPeerRows * args.row_bytes),
                      gpu.In(exchange->input_offsets[r].data(), Bytes4(slices)),
                      gpu.In(exchange->send_sizes[r].data(), Bytes4(slices)),
                      gpu.In(exchange->output_offsets[r].data(), Bytes4(slices)), args.recv_sizes},
                     [args](cuda::Table* table, cuda::Stream stream) {
                       return cuda::LaunchRaggedAllToAll(args, table, stream);
                     },
                     nullptr,
                     {}});
  }
  Crew(exchange->ranks).Call(calls, &exchange->tables);
  gpu.Back();
}

inline void CheckPlan(const PlanShape& shape, const std::vector<Ints>& ids, bool chained) {
  Mirror gpu(!small);
  std::vector<RankCall> calls;
  std::vector<PlanArrays> results;
  std::vector<Ints> chains, scratch;
  std::vector<cuda::Table> tables(ids.size());
  results.reserve(ids.size());
  for (size_t r = 0; r < ids.size(); ++r) {
    results.emplace_back(shape, -7);
    chains.emplace_back(static_cast<size_t>(shape.capacity), -7);
    scratch.emplace_back(static_cast<size_t>(cuda::PlanScratchBytes(shape) / 4), -7);
    const PlanResults host = results.back().Results();
    const int64_t groups = Bytes4(shape.experts_per_rank());
    const int64_t slots = Bytes4(shape.assignments()), rows = Bytes4(shape.capacity);
    cuda::PlanArgs args;
    args.shape = shape;
    args.expert_ids = gpu.In(ids[r].data(), slots);
    args.results = {gpu.Out(host.group_sizes, groups), gpu.Out(host.expert_counts, groups),
                    gpu.Out(host.slot, slots),         gpu.Out(host.slot_rank, slots),
                    gpu.Out(host.source_rank, rows),   gpu.Out(host.source, rows),
                    gpu.Out(host.num_dropped, 4),      gpu.Out(host.num_invalid, 4)};
    int32_t* const chain = gpu.Out(chains.back().data(), rows);
    args.chain = chained ? chain : nullptr;
    args.scratch = gpu.Out(scratch.back().data(), Bytes4(scratch.back().size()));
    calls.push_back({{args.scratch},
                     [args](cuda::Table* table, cuda::Stream stream) {
                       return cuda::LaunchPlanFinish(args, table, stream);
                     },
                     [args](cuda::Stream stream) { return cuda::LaunchPlanCount(args, stream); },
                     {}});
  }
  Crew(shape.num_ranks).Call(calls, &tables);
  gpu.Back();
  const std::vector<PlanArrays> expected = NaivePlan(shape, ids);
  for (size_t r = 0; r < ids.size(); ++r) {
    CheckSamePlan(results[r], expected[r]);
    const Ints untouched(chains[r].size(), -7);
    CHECK_EQ(chains[r], chained ? NaiveChain(shape, expected[r]) : untouched);
    CHECK_EQ(tables[r].failure, 0);
  }
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_GPU_GPU_CASES_H_
