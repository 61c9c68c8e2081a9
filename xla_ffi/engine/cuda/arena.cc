#include "xla_ffi/engine/cuda/arena.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "xla_ffi/engine/cuda/runtime.h"

namespace jax_fusco::cuda {
namespace {

constexpr int64_t kSlabBytes = int64_t{4} << 20;
constexpr int64_t kPage = 4096;
constexpr int64_t kLine = 128;

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

char* At(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }

// Zeroed host memory that every device may write to. It is the library's own, so that it is there
// as long as a thread looks at it, even while the process exits.
struct HostMemory {
  void* data = nullptr;
  int64_t bytes = 0;

  Status Allocate(int64_t size) {
    bytes = RoundUp(size, kPage);
    data = std::aligned_alloc(static_cast<size_t>(kPage), static_cast<size_t>(bytes));
    if (data == nullptr) return Status::Internal("jax_fusco: the host has no memory left.");
    std::memset(data, 0, static_cast<size_t>(bytes));
    return ShareHostMemory(data, bytes);
  }
  void Release() {
    if (data == nullptr) return;
    UnshareHostMemory(data);
    std::free(data);
    data = nullptr;
  }
};

}  // namespace

struct Arena::Impl {
  // Memory for some call sites: the same offsets on every device.
  struct Slab {
    std::vector<void*> data;  // by device
    HostMemory records;       // [sites, devices]
    std::vector<void*> seen_records;
    int64_t used = 0;
  };

  std::vector<int> ordinals;
  Status reach;
  std::vector<void*> failed_runs;
  HostMemory alarms;
  std::vector<void*> seen_alarms;

  std::mutex mutex;
  std::vector<Slab> slabs;

  std::mutex watch_mutex;
  std::condition_variable wake;
  std::vector<Watched*> watched;
  bool stop = false;
  std::thread watcher;

  int num_devices() const { return static_cast<int>(ordinals.size()); }
  int64_t PointersBytes() const { return RoundUp(num_devices() * int64_t{8}, kLine); }
  int64_t SiteBytes() const {
    return PointersBytes() + RoundUp(BoardBytes(num_devices()), kLine) +
           RoundUp(TableBytes(num_devices()), kLine);
  }
  int64_t SitesPerSlab() const { return std::max<int64_t>(1, kSlabBytes / SiteBytes()); }

  Status Start();
  Status EnablePeers();
  Status AddSlab();
  void Watch();
};

Status Arena::Impl::EnablePeers() {
  for (int from : ordinals) {
    for (int to : ordinals) {
      if (from < 0 || to < 0 || from == to) continue;
      bool possible = false;
      const Status status = EnablePeer(from, to, &possible);
      if (!status.ok()) return status;
      if (!possible && reach.ok()) {
        reach = Status::InvalidArgument(Concat(
            "jax_fusco: GPU ", from, " cannot reach the memory of GPU ", to,
            " (no peer access); use implementation=\"xla\", or give the process GPUs that reach ",
            "each other (CUDA_VISIBLE_DEVICES; `nvidia-smi topo -m` shows them)."));
      }
    }
  }
  return Status::Ok();
}

Status Arena::Impl::Start() {
  if (num_devices() > kMaxRanks) {
    return Status::InvalidArgument(
        Concat("jax_fusco: a process may have at most ", kMaxRanks, " devices."));
  }
  Status status = EnablePeers();
  if (status.ok()) status = alarms.Allocate(num_devices() * kLine);
  failed_runs.assign(ordinals.size(), nullptr);
  seen_alarms.assign(ordinals.size(), nullptr);
  for (size_t d = 0; d < ordinals.size() && status.ok(); ++d) {
    if (ordinals[d] < 0) continue;
    status = AllocateZeroed(ordinals[d], kLine, &failed_runs[d]);
    if (!status.ok()) break;
    status = SeenHostMemory(ordinals[d], At(alarms.data, static_cast<int64_t>(d) * kLine),
                            &seen_alarms[d]);
  }
  if (status.ok()) status = AddSlab();
  if (status.ok()) watcher = std::thread([this] { Watch(); });
  return status;
}

// Each device's part: for every site the pointers to the boards, the board, the table.
Status Arena::Impl::AddSlab() {
  slabs.emplace_back();
  Slab& slab = slabs.back();
  const int64_t sites = SitesPerSlab();
  slab.used = sites;  // unless all goes well
  slab.data.assign(ordinals.size(), nullptr);
  slab.seen_records.assign(ordinals.size(), nullptr);
  Status status =
      slab.records.Allocate(sites * num_devices() * static_cast<int64_t>(sizeof(Record)));
  // Movers may read a whole Table, behind the last one too.
  const int64_t bytes = sites * SiteBytes() + static_cast<int64_t>(sizeof(Table));
  for (size_t d = 0; d < ordinals.size() && status.ok(); ++d) {
    if (ordinals[d] < 0) continue;
    status = AllocateZeroed(ordinals[d], bytes, &slab.data[d]);
    if (!status.ok()) break;
    status = SeenHostMemory(ordinals[d], slab.records.data, &slab.seen_records[d]);
  }
  std::vector<char> pointers(static_cast<size_t>(sites * SiteBytes()));
  for (int64_t site = 0; site < sites && status.ok(); ++site) {
    auto* boards = reinterpret_cast<void**>(pointers.data() + site * SiteBytes());
    for (size_t d = 0; d < ordinals.size(); ++d) {
      if (slab.data[d] == nullptr) continue;
      boards[d] = At(slab.data[d], site * SiteBytes() + PointersBytes());
    }
  }
  for (size_t d = 0; d < ordinals.size() && status.ok(); ++d) {
    if (ordinals[d] < 0) continue;
    status = CopyToDevice(ordinals[d], slab.data[d], pointers.data(),
                          static_cast<int64_t>(pointers.size()));
  }
  if (status.ok()) slab.used = 0;
  return status;
}

void Arena::Impl::Watch() {
  std::unique_lock<std::mutex> lock(watch_mutex);
  while (!stop) {
    wake.wait_for(lock, std::chrono::milliseconds(100));
    bool alarmed = false;
    for (size_t d = 0; d < ordinals.size(); ++d) {
      auto* alarm = reinterpret_cast<uint64_t*>(At(alarms.data, static_cast<int64_t>(d) * kLine));
      if (__atomic_load_n(alarm, __ATOMIC_ACQUIRE) == 0) continue;
      __atomic_store_n(alarm, 0, __ATOMIC_SEQ_CST);  // before the records are read
      alarmed = true;
    }
    if (!alarmed) continue;
    for (Watched* one : watched) one->LogFailures();
  }
}

Arena::Arena() : impl_(std::make_unique<Impl>()) {}

Arena::~Arena() {
  {
    std::lock_guard<std::mutex> lock(impl_->watch_mutex);
    impl_->stop = true;
    impl_->wake.notify_all();
  }
  if (impl_->watcher.joinable()) impl_->watcher.join();
  const auto free = [this](const std::vector<void*>& data) {
    for (size_t d = 0; d < data.size(); ++d) {
      if (data[d] != nullptr) Free(impl_->ordinals[d], data[d]);
    }
  };
  for (Impl::Slab& slab : impl_->slabs) {
    free(slab.data);
    slab.records.Release();
  }
  free(impl_->failed_runs);
  impl_->alarms.Release();
}

Status Arena::Create(const std::vector<int>& ordinals, std::unique_ptr<Arena>* arena) {
  std::unique_ptr<Arena> made(new Arena);
  made->impl_->ordinals = ordinals;
  Status status = made->impl_->Start();
  if (status.ok()) *arena = std::move(made);
  return status;
}

Status Arena::Get(Arena** arena) {
  // Never destroyed: kernels may run to the end of the process. Made again after a failure.
  static std::mutex* mutex = new std::mutex;
  static Arena* the = nullptr;
  std::lock_guard<std::mutex> lock(*mutex);
  if (the == nullptr) {
    std::vector<int> in_use;
    Status status = DevicesInUse(&in_use);
    if (!status.ok()) return status;
    if (in_use.empty()) return Status::Internal("jax_fusco: this process has no GPU in use.");
    std::vector<int> ordinals(static_cast<size_t>(in_use.back()) + 1, -1);
    for (int ordinal : in_use) ordinals[static_cast<size_t>(ordinal)] = ordinal;
    std::unique_ptr<Arena> made;
    status = Create(ordinals, &made);
    if (!status.ok()) return status;
    the = made.release();
  }
  *arena = the;
  return Status::Ok();
}

int Arena::num_devices() const { return impl_->num_devices(); }

int Arena::ordinal(int device) const {
  return device < 0 || device >= num_devices() ? -1 : impl_->ordinals[static_cast<size_t>(device)];
}

const Status& Arena::reach() const { return impl_->reach; }

uint64_t* Arena::failed_run(int device) const {
  return static_cast<uint64_t*>(impl_->failed_runs[static_cast<size_t>(device)]);
}

uint64_t* Arena::seen_alarm(int device) const {
  return static_cast<uint64_t*>(impl_->seen_alarms[static_cast<size_t>(device)]);
}

Status Arena::NewPlaces(std::vector<Place>* places) {
  Impl& impl = *impl_;
  std::lock_guard<std::mutex> lock(impl.mutex);
  if (impl.slabs.back().used == impl.SitesPerSlab()) {
    const Status status = impl.AddSlab();
    if (!status.ok()) return status;
  }
  Impl::Slab& slab = impl.slabs.back();
  const int64_t site = slab.used++;
  places->assign(impl.ordinals.size(), {});
  for (size_t d = 0; d < impl.ordinals.size(); ++d) {
    if (impl.ordinals[d] < 0) continue;
    Place& place = (*places)[d];
    char* base = At(slab.data[d], site * impl.SiteBytes());
    char* board = base + impl.PointersBytes();
    place.boards = reinterpret_cast<Board* const*>(base);
    place.board = reinterpret_cast<Board*>(board);
    place.table = reinterpret_cast<Table*>(board + RoundUp(BoardBytes(impl.num_devices()), kLine));
    const int64_t record = site * impl.num_devices() + static_cast<int64_t>(d);
    place.record = static_cast<Record*>(slab.records.data) + record;
    place.seen_record = static_cast<Record*>(slab.seen_records[d]) + record;
  }
  return Status::Ok();
}

void Arena::Watch(Watched* watched) {
  std::lock_guard<std::mutex> lock(impl_->watch_mutex);
  impl_->watched.push_back(watched);
}

void Arena::Unwatch(Watched* watched) {
  std::lock_guard<std::mutex> lock(impl_->watch_mutex);
  auto& all = impl_->watched;
  all.erase(std::remove(all.begin(), all.end(), watched), all.end());
}

}  // namespace jax_fusco::cuda
