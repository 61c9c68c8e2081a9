#include "xla_ffi/engine/cpu/chunks.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
Status RaggedAllToAllJob::Run(const std::vector<const Job*>& ranks,
                              const Settings& settings) const {
  constexpr const char* kCall = "jax_fusco_ragged_all_to_all";
  const std::vector<const RaggedAllToAllJob*> jobs = As<RaggedAllToAllJob>(ranks);
  struct Block {
    char* to;
    const char* from;
    int64_t bytes;
  };
  std::vector<Block> blocks;
  int64_t bytes = 0;
  for (size_t s = 0; s < jobs.size(); ++s) {
    if (jobs[s]->operand.bytes != operand.bytes || jobs[s]->result.bytes != operand.bytes) {
      return Disagree(kCall, s, "the size of a row");
    }
    if (jobs[s]->slices_per_rank != slices_per_rank) {
      return Disagree(kCall, s, "the number of slices");
    }
  }
  for (size_t s = 0; s < jobs.size(); ++s) {
    const RaggedAllToAllJob& from = *jobs[s];
    for (int64_t i = 0; i < slices_per_rank * static_cast<int64_t>(jobs.size()); ++i) {
      const int64_t p = i / slices_per_rank;
      const RaggedAllToAllJob& to = *jobs[static_cast<size_t>(p)];
      const int64_t size = from.send_sizes[i];
      const int64_t begin = from.input_offsets[i];
      const int64_t target = from.output_offsets[i];
      const int64_t expected =
          to.recv_sizes[static_cast<int64_t>(s) * slices_per_rank + i % slices_per_rank];
      const std::string who =
          Concat(kCall, ": rank ", static_cast<int64_t>(s), " sends ", size, " rows to rank ", p);
      if (size < 0 || (size > 0 && (begin < 0 || begin + size > from.operand.count))) {
        return Status::InvalidArgument(
            Concat(who, " from row ", begin, " of an operand of ", from.operand.count, " rows."));
      }
      if (size > 0 && (target < 0 || target + size > to.result.count)) {
        return Status::InvalidArgument(
            Concat(who, " at row ", target, " of an output of ", to.result.count, " rows."));
      }
      if (expected != size) {
        return Status::InvalidArgument(Concat(who, ", which expects ", expected, " (recv_sizes)."));
      }
      for (int64_t done = 0; done < size * operand.bytes; done += kChunkBytes) {
        blocks.push_back({to.result.At(target) + done, from.operand.At(begin) + done,
                          std::min(kChunkBytes, size * operand.bytes - done)});
      }
      bytes += size * operand.bytes;
    }
  }
  Workers::ParallelFor(ThreadsFor(bytes, settings), static_cast<int64_t>(blocks.size()),
                       [&](int64_t i) {
                         const Block& block = blocks[static_cast<size_t>(i)];
                         std::memmove(block.to, block.from, static_cast<size_t>(block.bytes));
                       });
  return Status::Ok();
}

}  // namespace jax_fusco::cpu
