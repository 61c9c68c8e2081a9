// The plan of a crossing: the ranks of all nodes meet step by step, tables cross in between. Slots
// and sources against the flat plan by literal loops, rails by a literal count.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/meeting.h"
#include "tests/native/naive_plan.h"
#include "xla_ffi/engine/cpu/shuffle.h"

namespace jax_fusco::testing {
namespace {

using cpu::CrossingCountJob;
using cpu::CrossingDeliverJob;
using cpu::CrossingLayOutJob;
using cpu::CrossingPlaceJob;

template <typename J>
using Jobs = std::vector<std::unique_ptr<J>>;

// Everything that one rank of a crossing reads and writes, each array of exactly its size.
struct RankArrays {
  int32_t node;
  Ints ids, num_invalid, wanted, wanted_here, group_sizes, expert_counts, num_dropped, granted,
      granted_here, slot, slot_rank, owner_node, pack_rank, pack_token, rail, rail_row, letters,
      letters_here, deliver_rank, deliver_slot, from_rank, from_assignment, source_rank, source,
      most_rows;

  RankArrays(const CrossingShape& shape, int64_t node, const Ints& ids)
      : node(static_cast<int32_t>(node)), ids(ids) {
    const auto fill = [](std::initializer_list<Ints*> arrays, int64_t size) {
      for (Ints* array : arrays) array->assign(static_cast<size_t>(size), -7);
    };
    const int64_t n = shape.num_nodes, t = shape.tokens, k = shape.k, e = shape.experts_per_rank;
    fill({&num_invalid, &num_dropped, &most_rows}, 1);
    fill({&wanted, &wanted_here}, n * shape.told());
    fill({&granted, &granted_here}, 2 * n * shape.local_ranks * e);
    fill({&group_sizes, &expert_counts}, e);
    fill({&slot, &slot_rank, &owner_node}, t * k);
    fill({&pack_rank, &pack_token, &rail, &rail_row}, n * t);
    fill({&letters, &letters_here}, n * (t + 1) * (k + 1));
    fill({&deliver_rank, &deliver_slot}, n * t * k);
    fill({&from_rank, &from_assignment, &source_rank, &source}, shape.capacity);
  }
};

// All ranks, by node and local index.
using Cluster = std::vector<std::vector<RankArrays>>;

// `to` of rank (n, l) gets block s of `from` of rank (s, l), for every node s in turn.
void Exchange(Cluster* cluster, Ints RankArrays::* from, Ints RankArrays::* to) {
  const size_t nodes = cluster->size();
  for (size_t n = 0; n < nodes; ++n) {
    for (size_t l = 0; l < (*cluster)[n].size(); ++l) {
      Ints& target = (*cluster)[n][l].*to;
      const size_t block = target.size() / nodes;
      for (size_t s = 0; s < nodes; ++s) {
        const Ints& source = (*cluster)[s][l].*from;
        for (size_t i = 0; i < block; ++i) target[s * block + i] = source[n * block + i];
      }
    }
  }
}

// One job for each rank of a node, as `set(job, arrays)` makes it of them.
template <typename J, typename Set>
Status MeetNode(const char* name, const CrossingShape& shape, std::vector<RankArrays>* ranks,
                const Set& set) {
  Jobs<J> jobs;
  for (RankArrays& arrays : *ranks) {
    jobs.push_back(std::make_unique<J>());
    jobs.back()->shape = shape;
    set(jobs.back().get(), &arrays);
  }
  return Meet(std::move(jobs), name);
}

void SetCount(CrossingCountJob* job, RankArrays* a) {
  job->node = &a->node;
  job->expert_ids = a->ids.data();
  job->num_invalid = a->num_invalid.data();
  job->wanted = a->wanted.data();
}

void SetPlace(CrossingPlaceJob* job, RankArrays* a) {
  job->node = &a->node;
  job->expert_ids = a->ids.data();
  job->granted = a->granted_here.data();
  job->slot = a->slot.data();
  job->slot_rank = a->slot_rank.data();
  job->owner_node = a->owner_node.data();
  job->pack_rank = a->pack_rank.data();
  job->pack_token = a->pack_token.data();
  job->rail = a->rail.data();
  job->rail_row = a->rail_row.data();
  job->letters = a->letters.data();
}

void SetDeliver(CrossingDeliverJob* job, RankArrays* a) {
  job->letters = a->letters_here.data();
  job->group_sizes = a->group_sizes.data();
  job->deliver_rank = a->deliver_rank.data();
  job->deliver_slot = a->deliver_slot.data();
  job->from_rank = a->from_rank.data();
  job->from_assignment = a->from_assignment.data();
  job->source_rank = a->source_rank.data();
  job->source = a->source.data();
  job->most_rows = a->most_rows.data();
}

void Count(const CrossingShape& shape, Cluster* cluster) {
  for (auto& node : *cluster) {
    CHECK(MeetNode<CrossingCountJob>("count", shape, &node, SetCount).ok());
  }
  Exchange(cluster, &RankArrays::wanted, &RankArrays::wanted_here);
}

Status LayOut(const CrossingShape& shape, int64_t alignment, RankArrays* a) {
  Jobs<CrossingLayOutJob> job;
  job.push_back(std::make_unique<CrossingLayOutJob>());
  job[0]->shape = shape;
  job[0]->alignment = alignment;
  job[0]->wanted = a->wanted_here.data();
  job[0]->group_sizes = a->group_sizes.data();
  job[0]->expert_counts = a->expert_counts.data();
  job[0]->num_dropped = a->num_dropped.data();
  job[0]->granted = a->granted.data();
  return Meet(std::move(job), "lay_out");
}

void Plan(const CrossingShape& shape, int64_t alignment, Cluster* cluster) {
  Count(shape, cluster);
  for (auto& node : *cluster) {
    for (RankArrays& a : node) CHECK(LayOut(shape, alignment, &a).ok());
  }
  Exchange(cluster, &RankArrays::granted, &RankArrays::granted_here);
  for (auto& node : *cluster) {
    CHECK(MeetNode<CrossingPlaceJob>("place", shape, &node, SetPlace).ok());
  }
  Exchange(cluster, &RankArrays::letters, &RankArrays::letters_here);
  for (auto& node : *cluster) {
    CHECK(MeetNode<CrossingDeliverJob>("deliver", shape, &node, SetDeliver).ok());
  }
}

// Deals rows to rails by hand, and follows each row to its forwarder and on to its slots.
void CheckCrossing(const CrossingShape& shape, const Cluster& cluster) {
  const auto nodes = static_cast<size_t>(shape.num_nodes),
             rails = static_cast<size_t>(shape.local_ranks),
             tokens = static_cast<size_t>(shape.tokens), k = static_cast<size_t>(shape.k);
  int64_t most = 0;
  for (size_t s = 0; s < nodes; ++s) {
    for (size_t n = 0; n < nodes; ++n) {
      size_t row = 0;
      for (size_t owner = 0; owner < rails; ++owner) {
        const RankArrays& from = cluster[s][owner];
        for (size_t t = 0; t < tokens; ++t) {
          bool goes = false;
          for (size_t j = 0; j < k; ++j) goes |= from.owner_node[t * k + j] == static_cast<int>(n);
          const size_t at = t * nodes + n;
          if (!goes || n == s) {
            CHECK_EQ(from.rail[at], -1);
            CHECK_EQ(from.rail_row[at], -1);
          } else {
            const size_t rail = (row + s + n) % rails;
            CHECK_EQ(from.rail[at], static_cast<int>(rail));
            CHECK_EQ(from.rail_row[at], static_cast<int>(row / rails));
            const RankArrays& packed = cluster[s][rail];
            CHECK_EQ(packed.pack_rank[n * tokens + row / rails], static_cast<int>(owner));
            CHECK_EQ(packed.pack_token[n * tokens + row / rails], static_cast<int>(t));
            ++row;
          }
          if (!goes) continue;
          const size_t forwarder = n == s ? owner : static_cast<size_t>(from.rail[at]);
          const size_t place = n == s ? t : static_cast<size_t>(from.rail_row[at]);
          for (size_t j = 0; j < k; ++j) {
            const RankArrays& there = cluster[n][forwarder];
            const size_t a = (s * tokens + place) * k + j;
            const bool mine = from.owner_node[t * k + j] == static_cast<int>(n);
            const int32_t slot = mine ? from.slot[t * k + j] : -1;
            CHECK_EQ(there.deliver_slot[a], slot);
            const int32_t rank = mine ? from.slot_rank[t * k + j] % static_cast<int>(rails) : -1;
            CHECK_EQ(there.deliver_rank[a], rank);
            if (!mine) continue;
            const RankArrays& target = cluster[n][static_cast<size_t>(rank)];
            CHECK_EQ(target.from_rank[static_cast<size_t>(slot)], static_cast<int>(forwarder));
            CHECK_EQ(target.from_assignment[static_cast<size_t>(slot)], static_cast<int>(a));
          }
        }
      }
      // What is left of each rail's block is marked so.
      for (size_t rail = 0; rail < rails; ++rail) {
        const size_t first = (rail + 2 * rails - s % rails - n % rails) % rails;
        const size_t sent = row > first ? (row - first + rails - 1) / rails : 0;
        most = std::max(most, static_cast<int64_t>(sent));
        for (size_t i = sent; i < tokens; ++i) {
          CHECK_EQ(cluster[s][rail].pack_rank[n * tokens + i], -2);
          CHECK_EQ(cluster[s][rail].pack_token[n * tokens + i], -2);
          if (n == s) continue;
          for (size_t j = 0; j < k; ++j) {
            CHECK_EQ(cluster[n][rail].deliver_slot[(s * tokens + i) * k + j], -1);
            CHECK_EQ(cluster[n][rail].deliver_rank[(s * tokens + i) * k + j], -1);
          }
        }
      }
    }
  }
  for (const auto& node : cluster) {
    for (const RankArrays& a : node) {
      CHECK_EQ(static_cast<int64_t>(a.most_rows[0]), most);
      for (size_t m = 0; m < a.source.size(); ++m) {
        if (a.source[m] >= 0) continue;
        CHECK_EQ(a.from_rank[m], a.source[m]);
        CHECK_EQ(a.from_assignment[m], a.source[m]);
      }
    }
  }
}

Cluster MakeCluster(const CrossingShape& shape, const std::vector<Ints>& ids) {
  Cluster cluster;
  for (int64_t n = 0; n < shape.num_nodes; ++n) {
    cluster.emplace_back();
    for (int64_t l = 0; l < shape.local_ranks; ++l) {
      const auto rank = static_cast<size_t>(n * shape.local_ranks + l);
      cluster.back().emplace_back(shape, n, ids[rank]);
    }
  }
  return cluster;
}

CrossingShape ShapeOf(const PlanShape& flat, int64_t nodes) {
  CrossingShape shape;
  shape.num_nodes = nodes;
  shape.local_ranks = flat.num_ranks / nodes;
  shape.tokens = flat.tokens;
  shape.k = flat.k;
  shape.experts_per_rank = flat.experts_per_rank();
  shape.capacity = flat.capacity;
  return shape;
}

void CrossingIsTheLiteralLoop() {
  Random random(11);
  const int64_t sizes[][2] = {{1, 1}, {1, 4}, {2, 1}, {2, 2}, {2, 4}, {3, 2}, {4, 2}};
  for (const auto& [nodes, ranks] : sizes) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      setenv("JAX_FUSCO_THREADS", std::to_string(1 + repeat % 4).c_str(), 1);
      PlanShape flat = RandomShape(random, nodes * ranks);
      if (repeat == 0) flat.tokens = 3000;  // enough for several threads
      const std::vector<Ints> ids = RandomIds(flat, random);
      const CrossingShape shape = ShapeOf(flat, nodes);
      Cluster cluster = MakeCluster(shape, ids);
      Plan(shape, flat.alignment, &cluster);
      const std::vector<PlanArrays> expected = NaivePlan(flat, ids);
      for (size_t r = 0; r < ids.size(); ++r) {
        const size_t per_node = cluster[0].size();
        const RankArrays& a = cluster[r / per_node][r % per_node];
        PlanArrays found(flat);
        found.group_sizes = a.group_sizes;
        found.expert_counts = a.expert_counts;
        found.slot = a.slot;
        found.slot_rank = a.slot_rank;
        found.source_rank = a.source_rank;
        found.source = a.source;
        found.num_dropped = a.num_dropped;
        found.num_invalid = a.num_invalid;
        CheckSamePlan(found, expected[r]);
        for (size_t i = 0; i < a.slot_rank.size(); ++i) {
          const int32_t rank = a.slot_rank[i];
          CHECK_EQ(a.owner_node[i], rank < 0 ? -1 : rank / static_cast<int>(per_node));
        }
      }
      CheckCrossing(shape, cluster);
    }
  }
  unsetenv("JAX_FUSCO_THREADS");
}

// Two nodes of two ranks, four tokens of two experts, four experts, planned as far as it goes well.
Cluster SmallCluster(CrossingShape* shape) {
  PlanShape flat;
  flat.num_ranks = 4;
  flat.tokens = 4;
  flat.k = 2;
  flat.num_experts = 4;
  flat.capacity = 20;
  Random random(3);
  *shape = ShapeOf(flat, 2);
  Cluster cluster = MakeCluster(*shape, RandomIds(flat, random));
  Plan(*shape, 1, &cluster);
  return cluster;
}

void CheckError(const Status& status, const std::string& message) {
  CHECK(status.code == Code::kInvalidArgument);
  CHECK_EQ(status.message, message);
}

void WhatOtherNodesSayIsNotTrusted() {
  CrossingShape shape;
  const Cluster good = SmallCluster(&shape);
  for (int32_t bad : {-1, 21, INT32_MAX, INT32_MIN}) {
    for (size_t at : {size_t{0}, size_t{1}, size_t{7}}) {
      Cluster cluster = good;
      cluster[1][1].granted_here[at] = bad;
      if (bad == -1 && at % 2 == 1 && cluster[1][1].granted_here[at - 1] > 0) continue;
      CheckError(MeetNode<CrossingPlaceJob>("place", shape, &cluster[1], SetPlace),
                 "jax_fusco_crossing_place: a granted row lies outside of its buffer of 20 rows.");
    }
  }
  for (int32_t bad : {40, INT32_MAX}) {
    for (size_t at : {size_t{0}, size_t{1}, size_t{15}}) {
      Cluster cluster = good;
      cluster[0][1].letters_here[at / 2 * 3 + at % 2] = bad;
      CheckError(MeetNode<CrossingDeliverJob>("deliver", shape, &cluster[0], SetDeliver),
                 "jax_fusco_crossing_deliver: a letter names no row of the 2 ranks of this node.");
    }
  }
  for (int32_t bad : {-1, 8, INT32_MAX, INT32_MIN}) {  // senders
    Cluster cluster = good;
    cluster[0][1].letters_here[0] = 0;
    cluster[0][1].letters_here[2] = bad;
    CheckError(MeetNode<CrossingDeliverJob>("deliver", shape, &cluster[0], SetDeliver),
               "jax_fusco_crossing_deliver: a letter names no row of the 2 ranks of this node.");
  }
  for (int32_t bad : {0, -1, 2}) {
    Cluster cluster = good;
    cluster[1][1].node = bad;
    CheckError(MeetNode<CrossingPlaceJob>("place", shape, &cluster[1], SetPlace),
               Concat("jax_fusco_crossing_place: node is ", bad,
                      " of 2, need the same one on all ranks."));
  }
}

void RanksThatDisagree() {
  CrossingShape shape;
  Cluster cluster = SmallCluster(&shape);
  int ranks = 0;
  CheckError(MeetNode<CrossingCountJob>("count", shape, &cluster[0],
                                        [&](CrossingCountJob* job, RankArrays* a) {
                                          SetCount(job, a);
                                          if (ranks++ == 1) job->shape.tokens = 3;
                                        }),
             "jax_fusco_crossing_count: ranks 0 and 1 disagree on nodes, tokens, k, experts or "
             "capacity, all ranks need the same.");
}

// All ranks of all nodes hear of an id that must not be.
void StrictNamesTheRank() {
  CrossingShape shape;
  Cluster cluster = SmallCluster(&shape);
  for (auto& node : cluster) {
    for (RankArrays& a : node) a.ids.assign(a.ids.size(), 0);
  }
  cluster[1][0].ids[5] = 4;
  cluster[1][1].ids[0] = -2;
  setenv("JAX_FUSCO_STRICT", "1", 1);
  Count(shape, &cluster);
  unsetenv("JAX_FUSCO_STRICT");
  for (auto& node : cluster) {
    for (RankArrays& a : node) {
      CheckError(LayOut(shape, 1, &a),
                 "jax_fusco_crossing_count: expert_ids[2, 1] of rank 2 is 4, it must lie in [-1, "
                 "4) (JAX_FUSCO_STRICT is set).");
    }
  }
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"CrossingIsTheLiteralLoop", CrossingIsTheLiteralLoop},
                   {"WhatOtherNodesSayIsNotTrusted", WhatOtherNodesSayIsNotTrusted},
                   {"RanksThatDisagree", RanksThatDisagree},
                   {"StrictNamesTheRank", StrictNamesTheRank}});
}
