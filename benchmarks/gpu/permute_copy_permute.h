// The rival of a fused move: rows are gathered into a buffer in the order in which they travel,
// copied slice by slice to the receivers, and gathered again into the order in which they are used.
// The gathers are the engine's own, so what differs is the number of passes.
#ifndef JAX_FUSCO_BENCHMARKS_GPU_PERMUTE_COPY_PERMUTE_H_
#define JAX_FUSCO_BENCHMARKS_GPU_PERMUTE_COPY_PERMUTE_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "benchmarks/gpu/timing.h"
#include "tests/gpu/gpu_memory.h"
#include "tests/gpu/gpu_shuffle.h"
#include "tests/native/naive_plan.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::bench {

using testing::GpuBytes;
using testing::GpuShuffle;
using testing::Ints;
using testing::PlanArrays;

class PermuteCopyPermute {
 public:
  PermuteCopyPermute(const GpuShuffle& shuffle, const std::vector<PlanArrays>& plans)
      : shuffle_(shuffle), shape_(shuffle.shape()) {
    // Where the slice from s to p begins among all that s sends and all that p receives.
    std::vector<Ints> sent(plans.size(), Ints(plans.size(), 0)), received = sent;
    for (size_t p = 0; p < plans.size(); ++p) {
      for (size_t m = 0; m < plans[p].source.size(); ++m) {
        if (plans[p].source[m] < 0) continue;
        ++sent[static_cast<size_t>(plans[p].source_rank[m])][p];
      }
    }
    sizes_ = sent;
    for (size_t s = 0; s < plans.size(); ++s) {
      int32_t of_sender = 0, of_receiver = 0;
      for (size_t p = 0; p < plans.size(); ++p) {
        sent[s][p] = std::exchange(of_sender, of_sender + sizes_[s][p]);
        received[s][p] = std::exchange(of_receiver, of_receiver + sizes_[p][s]);
      }
    }
    sent_ = sent;
    received_ = received;
    std::vector<Ints> travel, home;  // by sender: what is where in its buffer, and the inverse
    for (size_t s = 0; s < plans.size(); ++s) {
      travel.emplace_back(static_cast<size_t>(shape_.assignments()), kTail);
      home.emplace_back(static_cast<size_t>(shape_.assignments()), -1);
    }
    std::vector<Ints> order, back;  // by receiver: the place of each row, and the inverse
    for (size_t p = 0; p < plans.size(); ++p) {
      order.emplace_back(static_cast<size_t>(shape_.capacity), kTail);
      back.emplace_back(static_cast<size_t>(shape_.capacity), kTail);
      Ints next_sent, next_received = received[p];
      for (size_t s = 0; s < plans.size(); ++s) next_sent.push_back(sent[s][p]);
      for (size_t m = 0; m < plans[p].source.size(); ++m) {
        const int32_t a = plans[p].source[m];
        if (a < 0) continue;
        const auto s = static_cast<size_t>(plans[p].source_rank[m]);
        const int32_t leaves = next_sent[s]++, comes = next_received[s]++;
        travel[s][static_cast<size_t>(leaves)] = a;
        home[s][static_cast<size_t>(a)] = leaves;
        order[p][m] = comes;
        back[p][static_cast<size_t>(comes)] = static_cast<int32_t>(m);
      }
    }
    for (size_t r = 0; r < plans.size(); ++r) {
      ranks_.push_back(std::make_unique<Rank>(shuffle, r, travel[r], home[r], order[r], back[r]));
    }
  }

  // The rows in the experts' order, [C, length], and the sums, [T, length].
  char* rows(size_t r) const { return ranks_[r]->rows.data(); }
  char* out(size_t r) const { return ranks_[r]->out.data(); }

  Contestant Dispatch() const {
    return {"permute, copy, permute",
            {[this](size_t r, cudaStream_t stream) { Pack(r, stream); },
             [this](size_t r, cudaStream_t stream) { CopyTo(r, stream); },
             [this](size_t r, cudaStream_t stream) {
               Gather(ranks_[r]->order, 1, shape_.capacity, ranks_[r]->came_table,
                      ranks_[r]->rows.data(), stream);
             }}};
  }
  Contestant Combine() const {
    return {"permute, copy, sum",
            {[this](size_t r, cudaStream_t stream) {
               Gather(ranks_[r]->back, 1, shape_.capacity, ranks_[r]->rows_table,
                      ranks_[r]->came.data(), stream);
             },
             [this](size_t r, cudaStream_t stream) { CopyBack(r, stream); },
             [this](size_t r, cudaStream_t stream) { Sum(r, stream); }}};
  }
  // The copies alone, and the same exchange as one custom call would do it.
  Contestant Copies() const {
    return {"cudaMemcpyAsync of each slice",
            {[this](size_t r, cudaStream_t stream) { CopyTo(r, stream); }}};
  }
  std::vector<testing::RankCall> Exchange() {
    std::vector<testing::RankCall> calls;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      Ints recv;
      for (size_t s = 0; s < ranks_.size(); ++s) recv.push_back(sizes_[s][r]);
      Ints to;
      for (size_t p = 0; p < ranks_.size(); ++p) to.push_back(received_[p][r]);
      const int32_t* const recv_sizes = Keep(recv);
      cuda::RaggedAllToAllArgs args;
      args.recv_sizes = recv_sizes;
      args.peer_rows = shape_.assignments();
      args.rows = shape_.capacity;
      args.row_bytes = shuffle_.row_bytes();
      args.result = ranks_[r]->came.data();
      calls.push_back(
          {{ranks_[r]->left.data(), Keep(sent_[r]), Keep(sizes_[r]), Keep(to), recv_sizes},
           [args](cuda::Table* table, cuda::Stream stream) {
             return cuda::LaunchRaggedAllToAll(args, table, stream);
           },
           nullptr,
           {}});
    }
    return calls;
  }
  const char* received(size_t r) const { return ranks_[r]->came.data(); }
  void ClearReceived(size_t r) const {
    MUST(cudaMemset(ranks_[r]->came.data(), 0, static_cast<size_t>(ranks_[r]->came.size())));
  }

 private:
  struct Rank {
    GpuBytes travel, home, order, back, zeros;  // int32
    GpuBytes left, came, rows, out;             // rows of what it sends, receives, uses, sums
    cuda::Table *x_table, *came_table, *rows_table, *left_table;
    std::vector<GpuBytes> tables;

    Rank(const GpuShuffle& shuffle, size_t r, const Ints& travel_in, const Ints& home_in,
         const Ints& order_in, const Ints& back_in)
        : travel(4 * static_cast<int64_t>(travel_in.size())),
          home(travel.size()),
          order(4 * static_cast<int64_t>(order_in.size())),
          back(order.size()),
          zeros(std::max(travel.size(), order.size())),
          left(shuffle.shape().assignments() * shuffle.row_bytes()),
          came(shuffle.shape().capacity * shuffle.row_bytes()),
          rows(came.size()),
          out(shuffle.shape().tokens * shuffle.row_bytes()) {
      testing::Upload(travel.data(), travel_in.data(), travel.size());
      testing::Upload(home.data(), home_in.data(), home.size());
      testing::Upload(order.data(), order_in.data(), order.size());
      testing::Upload(back.data(), back_in.data(), back.size());
      for (const GpuBytes* bytes : {&zeros, &left, &came, &rows, &out}) {
        MUST(cudaMemset(bytes->data(), 0, static_cast<size_t>(bytes->size())));
      }
      x_table = LocalTable(shuffle.x(r));
      came_table = LocalTable(came.data());
      rows_table = LocalTable(rows.data());
      left_table = LocalTable(left.data());
    }
    // One rank by itself, whose rows are at `rows`.
    cuda::Table* LocalTable(const void* at) {
      cuda::Table table{};
      table.num_ranks = 1;
      table.operand[0][0] = at;
      tables.emplace_back(static_cast<int64_t>(sizeof(table)));
      testing::Upload(tables.back().data(), &table, sizeof(table));
      return reinterpret_cast<cuda::Table*>(tables.back().data());
    }
  };

  static const int32_t* Numbers(const GpuBytes& bytes) {
    return reinterpret_cast<const int32_t*>(bytes.data());
  }
  const int32_t* Keep(const Ints& values) {
    kept_.emplace_back(4 * static_cast<int64_t>(values.size()));
    testing::Upload(kept_.back().data(), values.data(), kept_.back().size());
    return Numbers(kept_.back());
  }
  // Rows of one rank's own array in another order.
  void Gather(const GpuBytes& source, int64_t fanout, int64_t peer_rows, cuda::Table* table,
              void* out, cudaStream_t stream) const {
    cuda::GatherRowsArgs args;
    args.num_rows = source.size() / 4;
    args.source = Numbers(source);
    args.source_rank = Numbers(ranks_[0]->zeros);
    args.fanout = fanout;
    args.zero_tail = false;
    args.peer_rows = peer_rows;
    args.row_bytes = shuffle_.row_bytes();
    args.out = out;
    MUST(cuda::LaunchGatherRows(args, table, stream));
  }
  void Pack(size_t r, cudaStream_t stream) const {
    Gather(ranks_[r]->travel, shape_.k, shape_.tokens, ranks_[r]->x_table, ranks_[r]->left.data(),
           stream);
  }
  void Copy(void* to, int32_t to_row, const void* from, int32_t from_row, int32_t rows,
            cudaStream_t stream) const {
    const int64_t bytes = shuffle_.row_bytes();
    if (rows == 0) return;
    MUST(cudaMemcpyAsync(static_cast<char*>(to) + to_row * bytes,
                         static_cast<const char*>(from) + from_row * bytes,
                         static_cast<size_t>(rows * bytes), cudaMemcpyDeviceToDevice, stream));
  }
  void CopyTo(size_t p, cudaStream_t stream) const {
    for (size_t s = 0; s < ranks_.size(); ++s) {
      Copy(ranks_[p]->came.data(), received_[p][s], ranks_[s]->left.data(), sent_[s][p],
           sizes_[s][p], stream);
    }
  }
  void CopyBack(size_t s, cudaStream_t stream) const {
    for (size_t p = 0; p < ranks_.size(); ++p) {
      Copy(ranks_[s]->left.data(), sent_[s][p], ranks_[p]->came.data(), received_[p][s],
           sizes_[s][p], stream);
    }
  }
  void Sum(size_t r, cudaStream_t stream) const {
    cuda::ReduceRowsArgs args;
    args.tokens = shape_.tokens;
    args.k = shape_.k;
    args.slot_rank = Numbers(ranks_[r]->zeros);
    args.slot = Numbers(ranks_[r]->home);
    args.peer_rows = shape_.assignments();
    args.length = shuffle_.length();
    args.y_type = args.out_type = Float::kBf16;
    args.weights = shuffle_.weights(r);
    args.out = ranks_[r]->out.data();
    MUST(cuda::LaunchReduceRows(args, ranks_[r]->left_table, stream));
  }

  const GpuShuffle& shuffle_;
  PlanShape shape_;
  std::vector<Ints> sizes_, sent_, received_;  // [s][p], [s][p], [p][s]
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<GpuBytes> kept_;
};

}  // namespace jax_fusco::bench

#endif  // JAX_FUSCO_BENCHMARKS_GPU_PERMUTE_COPY_PERMUTE_H_
