// The calls as jobs that meet at a CallSite. docs/architecture.md says what each means.
//
// The integers that say where rows go come from the program and are not trusted: an index that does
// not lie in its buffer is an error that names it, and nothing is read or written there. Results of
// a call that fails are unspecified, as XLA discards them.
#ifndef JAX_FUSCO_ENGINE_CPU_SHUFFLE_H_
#define JAX_FUSCO_ENGINE_CPU_SHUFFLE_H_

#include <vector>

#include "xla_ffi/core/calls.h"
#include "xla_ffi/core/crossing.h"
#include "xla_ffi/engine/cpu/rendezvous.h"

namespace jax_fusco::cpu {

struct PlanJob : Job, PlanCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct GatherRowsJob : Job, GatherRowsCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct GatherRowsWeightedJob : Job, GatherRowsWeightedCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct ReduceRowsJob : Job, ReduceRowsCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct RaggedAllToAllJob : Job, RaggedAllToAllCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

// The plan of a crossing between nodes, whose ranks are those of one node; CrossingLayOutJob is of
// a rank alone.
struct CrossingCountJob : Job, CrossingCountCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct CrossingLayOutJob : Job, CrossingLayOutCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct CrossingPlaceJob : Job, CrossingPlaceCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct CrossingDeliverJob : Job, CrossingDeliverCall {
  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_SHUFFLE_H_
