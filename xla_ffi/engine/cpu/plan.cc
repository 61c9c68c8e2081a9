#include "xla_ffi/engine/cpu/chunks.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
Status PlanJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  const std::vector<const PlanJob*> jobs = As<PlanJob>(ranks);
  for (size_t r = 1; r < jobs.size(); ++r) {
    if (jobs[r]->shape.tokens != shape.tokens || jobs[r]->shape.k != shape.k ||
        jobs[r]->shape.capacity != shape.capacity) {
      return Disagree("jax_fusco_plan", r, "tokens, k or capacity");
    }
  }
  const auto cells = static_cast<size_t>(shape.num_experts * shape.num_ranks);
  std::vector<int32_t> counts(cells), next(cells), last(cells);
  std::vector<PlanResults> results;
  for (const PlanJob* job : jobs) results.push_back(job->results);
  const int64_t bytes = shape.num_ranks * (shape.assignments() * 12 + shape.capacity * 8);
  const int threads = ThreadsFor(bytes, settings);
  Workers::ParallelFor(threads, shape.num_ranks, [&](int64_t r) {
    const PlanJob& job = *jobs[static_cast<size_t>(r)];
    *job.results.num_invalid = CountAssignments(shape, r, job.expert_ids, counts.data());
  });
  for (size_t r = 0; settings.strict && r < jobs.size(); ++r) {
    if (*results[r].num_invalid == 0) continue;
    const int64_t a = FindBadExpert(jobs[r]->expert_ids, shape.assignments(), shape.num_experts);
    return BadExpert("jax_fusco_plan", a / shape.k, a % shape.k, static_cast<int64_t>(r),
                     jobs[r]->expert_ids[a], shape.num_experts);
  }
  const int64_t block = shape.experts_per_rank() * shape.num_ranks;
  Workers::ParallelFor(threads, shape.num_ranks, [&](int64_t r) {
    LayOutBuffer(shape, counts.data() + r * block, results[static_cast<size_t>(r)],
                 next.data() + r * block, last.data() + r * block);
    MarkEmptyRows(shape, results[static_cast<size_t>(r)]);
  });
  Workers::ParallelFor(threads, shape.num_ranks, [&](int64_t r) {
    PlaceAssignments(shape, r, jobs[static_cast<size_t>(r)]->expert_ids, results.data(),
                     next.data(), last.data());
  });
  return Status::Ok();
}

}  // namespace jax_fusco::cpu
