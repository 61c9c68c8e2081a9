// How rows cross between nodes: the arithmetic of a plan of two levels.
//
// N nodes of L ranks plan in four steps, and a table crosses the nodes after each but the last:
// ranks count their assignments; owners of experts lay out their buffers and say where each rank's
// rows begin; ranks place their assignments and deal their tokens to rails; forwarders, who learn
// the slots of what they will receive, tell them the owners of the slots. rank = node * L + local.
// jax_fusco/two_level_plan.py says what each array means.
#ifndef JAX_FUSCO_CORE_CROSSING_H_
#define JAX_FUSCO_CORE_CROSSING_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "xla_ffi/core/plan.h"

namespace jax_fusco {

struct CrossingShape {
  int64_t num_nodes = 1;         // N
  int64_t local_ranks = 1;       // L
  int64_t tokens = 0;            // T, of one rank
  int64_t k = 1;                 // experts of a token
  int64_t experts_per_rank = 1;  // E_local
  int64_t capacity = 0;          // C, rows of a receive buffer

  int64_t num_experts() const { return num_nodes * local_ranks * experts_per_rank; }
  int64_t letter() const { return k + 1; }  // integers for each row that crosses
  // Integers that a rank tells each node of its assignments: counts, and a complaint.
  int64_t told() const { return local_ranks * experts_per_rank + kComplaint; }

  // What a node complains of: (local, token, j, id) of an id that must not be, or -1 in all.
  static constexpr int64_t kComplaint = 4;
};

struct CrossingCountCall {
  CrossingShape shape;
  const int32_t* node = nullptr;        // [], this one
  const int32_t* expert_ids = nullptr;  // [T, k]
  int32_t* num_invalid = nullptr;       // []
  // [N, L * E_local + 4]: assignments of each rank here to the experts of this rank's peer on each
  // node, then the complaint of this node. All ranks of all nodes fail together, or none: one that
  // fails alone leaves the others waiting in an exchange between nodes.
  int32_t* wanted = nullptr;
};

struct CrossingLayOutCall {
  CrossingShape shape;
  int64_t alignment = 1;
  const int32_t* wanted = nullptr;   // [N, L * E_local + 4], from each node
  int32_t* group_sizes = nullptr;    // [E_local]
  int32_t* expert_counts = nullptr;  // [E_local]
  int32_t* num_dropped = nullptr;    // []
  int32_t* granted = nullptr;  // [N, L, 2, E_local]: where each rank's rows begin, and how many
};

struct CrossingPlaceCall {
  CrossingShape shape;
  const int32_t* node = nullptr;        // [], this one
  const int32_t* expert_ids = nullptr;  // [T, k]
  // [N, L, 2, E_local]: what this rank's peer on each node grants each rank here.
  const int32_t* granted = nullptr;
  int32_t* slot = nullptr;        // [T, k]
  int32_t* slot_rank = nullptr;   // [T, k]
  int32_t* owner_node = nullptr;  // [T, k]
  int32_t* pack_rank = nullptr;   // [N, T]
  int32_t* pack_token = nullptr;  // [N, T]
  int32_t* rail = nullptr;        // [T, N]
  int32_t* rail_row = nullptr;    // [T, N]
  // [N, T + 1, k + 1], to each forwarder: for each row and j `local * C + slot`, or -1; then the
  // sender, `owner * T + token`, or -1. The last letter of a node repeats the most rows that a rail
  // here sends to another node.
  int32_t* letters = nullptr;
};

struct CrossingDeliverCall {
  CrossingShape shape;
  const int32_t* letters = nullptr;      // [N, T + 1, k + 1], from each node
  const int32_t* group_sizes = nullptr;  // [E_local]
  int32_t* deliver_rank = nullptr;       // [N, T, k]
  int32_t* deliver_slot = nullptr;       // [N, T, k]
  int32_t* from_rank = nullptr;          // [C]
  int32_t* from_assignment = nullptr;    // [C]
  int32_t* source_rank = nullptr;        // [C]
  int32_t* source = nullptr;             // [C]
  int32_t* most_rows = nullptr;          // []
};

// Step 1, for one rank: its assignments to each expert, `counts` [E]; returns the invalid ids.
inline int32_t CountForCrossing(const CrossingCountCall& call, int32_t* counts) {
  PlanShape alone;
  alone.tokens = call.shape.tokens;
  alone.k = call.shape.k;
  alone.num_experts = call.shape.num_experts();
  return CountAssignments(alone, 0, call.expert_ids, counts);
}

// Step 1, then: the table of the rank `local`, from the `counts` [L, E] of the node.
inline void TellWanted(const CrossingCountCall& call, int64_t local, const int32_t* counts,
                       const int32_t* complaint) {
  const CrossingShape& shape = call.shape;
  int32_t* to = call.wanted;
  for (int64_t n = 0; n < shape.num_nodes; ++n) {
    const int64_t first = (n * shape.local_ranks + local) * shape.experts_per_rank;
    for (int64_t l = 0; l < shape.local_ranks; ++l) {
      const int32_t* from = counts + l * shape.num_experts() + first;
      to = std::copy(from, from + shape.experts_per_rank, to);
    }
    to = std::copy(complaint, complaint + CrossingShape::kComplaint, to);
  }
}

// Step 2: the rank's own view of the first node that complains, or null.
inline const int32_t* FindComplaint(const CrossingLayOutCall& call, int64_t* node) {
  const int64_t told = call.shape.told();
  for (*node = 0; *node < call.shape.num_nodes; ++*node) {
    const int32_t* complaint = call.wanted + (*node + 1) * told - CrossingShape::kComplaint;
    if (complaint[0] >= 0) return complaint;
  }
  return nullptr;
}

// Step 2, for one rank, where nobody complains.
inline void LayOutForCrossing(const CrossingLayOutCall& call) {
  const int64_t experts = call.shape.experts_per_rank;
  const int64_t ranks = call.shape.num_nodes * call.shape.local_ranks;
  std::vector<int32_t> cells(static_cast<size_t>(experts * ranks)), first(cells), last(cells);
  for (int64_t s = 0; s < ranks; ++s) {
    const int32_t* from = call.wanted + s * experts;
    from += s / call.shape.local_ranks * CrossingShape::kComplaint;
    for (int64_t e = 0; e < experts; ++e) cells[static_cast<size_t>(e * ranks + s)] = from[e];
  }
  PlanShape flat;
  flat.num_ranks = ranks;
  flat.num_experts = call.shape.num_experts();
  flat.capacity = call.shape.capacity;
  flat.alignment = call.alignment;
  PlanResults results;
  results.group_sizes = call.group_sizes;
  results.expert_counts = call.expert_counts;
  results.num_dropped = call.num_dropped;
  LayOutBuffer(flat, cells.data(), results, first.data(), last.data());
  int32_t* to = call.granted;
  for (int64_t s = 0; s < ranks; ++s) {
    for (int64_t e = 0; e < experts; ++e) *to++ = first[static_cast<size_t>(e * ranks + s)];
    for (int64_t e = 0; e < experts; ++e) {
      const auto cell = static_cast<size_t>(e * ranks + s);
      *to++ = last[cell] - first[cell];
    }
  }
}

// Step 3, for the rank `local`: the slots of its assignments, and how many of its tokens go to each
// other node, `visits` [N]. False where a granted row lies outside of its buffer.
inline bool PlaceForCrossing(const std::vector<const CrossingPlaceCall*>& ranks, int64_t local,
                             int32_t* visits) {
  const CrossingPlaceCall& call = *ranks[static_cast<size_t>(local)];
  const CrossingShape& shape = call.shape;
  const int64_t experts = shape.experts_per_rank, rows = shape.local_ranks * 2 * experts;
  std::vector<int32_t> next, last;
  for (int64_t n = 0; n < shape.num_nodes; ++n) {
    for (const CrossingPlaceCall* owner : ranks) {
      const int32_t* begin = owner->granted + n * rows + local * 2 * experts;
      for (int64_t e = 0; e < experts; ++e) {
        const int64_t end = static_cast<int64_t>(begin[e]) + begin[experts + e];
        if (begin[e] < 0 || end < begin[e] || end > shape.capacity) return false;
        next.push_back(begin[e]);
        last.push_back(static_cast<int32_t>(end));
      }
    }
  }
  std::fill(call.pack_rank, call.pack_rank + shape.num_nodes * shape.tokens, kTail);
  std::fill(call.pack_token, call.pack_token + shape.num_nodes * shape.tokens, kTail);
  std::fill(call.rail, call.rail + shape.tokens * shape.num_nodes, -1);
  std::fill(call.rail_row, call.rail_row + shape.tokens * shape.num_nodes, -1);
  std::fill(call.letters, call.letters + shape.num_nodes * (shape.tokens + 1) * shape.letter(), -1);
  std::fill(visits, visits + shape.num_nodes, 0);
  std::vector<int64_t> seen(static_cast<size_t>(shape.num_nodes), -1);
  const auto num_experts = static_cast<uint32_t>(shape.num_experts());
  const auto per_rank = static_cast<uint32_t>(experts);
  const auto per_node = static_cast<uint32_t>(experts * shape.local_ranks);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    for (int64_t a = t * shape.k; a < (t + 1) * shape.k; ++a) {
      const auto expert = static_cast<uint32_t>(call.expert_ids[a]);  // negative: very large
      if (expert >= num_experts || next[expert] >= last[expert]) {
        call.slot[a] = call.slot_rank[a] = call.owner_node[a] = -1;
        continue;
      }
      const uint32_t node = expert / per_node;
      call.slot[a] = next[expert]++;
      call.slot_rank[a] = static_cast<int32_t>(expert / per_rank);
      call.owner_node[a] = static_cast<int32_t>(node);
      if (static_cast<int32_t>(node) == *call.node || seen[node] == t) continue;
      seen[node] = t;
      ++visits[node];
    }
  }
  return true;
}

// Step 3, then, for the rank `local`: deals its tokens to rails, and writes the letters of their
// rows. `visits` [L, N] is what PlaceForCrossing counted. Ranks write to different rows.
inline void DealToRails(const std::vector<const CrossingPlaceCall*>& ranks, int64_t local,
                        const int32_t* visits) {
  const CrossingPlaceCall& call = *ranks[static_cast<size_t>(local)];
  const CrossingShape& shape = call.shape;
  const int64_t here = *call.node, nodes = shape.num_nodes, rails = shape.local_ranks;
  std::vector<int64_t> position(static_cast<size_t>(nodes));  // of the next row for each node
  int64_t most = 0;
  for (int64_t n = 0; n < nodes; ++n) {
    int64_t all = 0;
    for (int64_t l = 0; l < rails; ++l) {
      if (l == local) position[static_cast<size_t>(n)] = all;
      all += visits[l * nodes + n];
    }
    most = std::max(most, (all + rails - 1) / rails);
  }
  std::vector<int64_t> seen(static_cast<size_t>(nodes), -1);
  std::vector<int32_t*> letter(static_cast<size_t>(nodes));  // of this token's row for each node
  const int64_t block = (shape.tokens + 1) * shape.letter();
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const auto sender = static_cast<int32_t>(local * shape.tokens + t);
    letter[static_cast<size_t>(here)] = call.letters + here * block + t * shape.letter();
    letter[static_cast<size_t>(here)][shape.k] = sender;
    seen[static_cast<size_t>(here)] = t;
    for (int64_t j = 0; j < shape.k; ++j) {
      const int64_t a = t * shape.k + j;
      if (call.slot[a] < 0) continue;
      const auto node = static_cast<size_t>(call.owner_node[a]);
      if (seen[node] != t) {
        seen[node] = t;
        const auto n = static_cast<int64_t>(node);
        const int64_t i = position[node]++;
        const int64_t rail = (i + here + n) % rails, row = i / rails;
        const CrossingPlaceCall& peer = *ranks[static_cast<size_t>(rail)];
        call.rail[t * nodes + n] = static_cast<int32_t>(rail);
        call.rail_row[t * nodes + n] = static_cast<int32_t>(row);
        peer.pack_rank[n * shape.tokens + row] = static_cast<int32_t>(local);
        peer.pack_token[n * shape.tokens + row] = static_cast<int32_t>(t);
        letter[node] = peer.letters + n * block + row * shape.letter();
        letter[node][shape.k] = sender;
      }
      const int64_t owner = call.slot_rank[a] - static_cast<int64_t>(node) * rails;
      letter[node][j] = static_cast<int32_t>(owner * shape.capacity + call.slot[a]);
    }
  }
  for (int64_t n = 0; n < nodes; ++n) {
    int32_t* last = call.letters + n * block + shape.tokens * shape.letter();
    std::fill(last, last + shape.letter(), static_cast<int32_t>(most));
  }
}

// Step 4, for one rank: marks the rows of its buffer, all as empty.
inline void MarkForCrossing(const CrossingDeliverCall& call) {
  int64_t groups = 0;
  for (int64_t e = 0; e < call.shape.experts_per_rank; ++e) groups += call.group_sizes[e];
  groups = std::clamp<int64_t>(groups, 0, call.shape.capacity);
  for (int32_t* rows : {call.from_rank, call.from_assignment, call.source_rank, call.source}) {
    std::fill(rows, rows + groups, kPadding);
    std::fill(rows + groups, rows + call.shape.capacity, kTail);
  }
}

// Step 4, then, for the forwarder `local`: reads its letters. Ranks write to different rows. False
// where a letter names no row of the node.
inline bool ReadLetters(const std::vector<const CrossingDeliverCall*>& ranks, int64_t local) {
  const CrossingDeliverCall& call = *ranks[static_cast<size_t>(local)];
  const CrossingShape& shape = call.shape;
  const int64_t targets = shape.local_ranks * shape.capacity;
  const int64_t senders = shape.local_ranks * shape.tokens;
  const int32_t* letter = call.letters;
  *call.most_rows = 0;
  for (int64_t n = 0; n < shape.num_nodes; ++n) {
    for (int64_t t = 0; t < shape.tokens; ++t, letter += shape.letter()) {
      const int64_t sender = letter[shape.k];
      for (int64_t j = 0; j < shape.k; ++j) {
        const int64_t a = (n * shape.tokens + t) * shape.k + j, target = letter[j];
        call.deliver_rank[a] = call.deliver_slot[a] = -1;
        if (target < 0) continue;
        if (target >= targets || sender < 0 || sender >= senders) return false;
        const auto rank = static_cast<uint32_t>(target) / static_cast<uint32_t>(shape.capacity);
        const int64_t slot = target - rank * shape.capacity;
        call.deliver_rank[a] = static_cast<int32_t>(rank);
        call.deliver_slot[a] = static_cast<int32_t>(slot);
        const CrossingDeliverCall& owner = *ranks[rank];
        owner.from_rank[slot] = static_cast<int32_t>(local);
        owner.from_assignment[slot] = static_cast<int32_t>(a);
        const auto from = static_cast<uint32_t>(sender) / static_cast<uint32_t>(shape.tokens);
        owner.source_rank[slot] = static_cast<int32_t>(n * shape.local_ranks + from);
        owner.source[slot] = static_cast<int32_t>((sender - from * shape.tokens) * shape.k + j);
      }
    }
    *call.most_rows = std::max(*call.most_rows, letter[0]);
    letter += shape.letter();
  }
  return true;
}

}  // namespace jax_fusco

#endif  // JAX_FUSCO_CORE_CROSSING_H_
