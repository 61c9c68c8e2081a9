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
    Seen data;
    HostMemory records;  // [sites, devices of this process]
    std::vector<void*> seen_records;
    int64_t used = 0;
  };
  // Memory for operands, behind the pointers to that of all devices.
  struct Stage {
    Seen data;
    int64_t bytes = 0;
  };

  std::vector<int> ordinals;
  std::unique_ptr<Processes> processes;
  std::unique_ptr<SharedMemory> memory;
  Status reach;
  Stage news;  // a line for each device
  std::vector<void*> failed_runs;
  HostMemory alarms;
  std::vector<void*> seen_alarms;

  std::mutex mutex;
  std::vector<Slab> slabs;
  std::vector<Stage> stages;

  std::mutex watch_mutex;
  std::condition_variable wake;
  std::vector<Watched*> watched;
  bool stop = false;
  std::thread watcher;

  int num_local() const { return static_cast<int>(ordinals.size()); }
  int num_devices() const { return processes ? processes->num_devices() : num_local(); }
  size_t DeviceOf(size_t local) const {
    return local + static_cast<size_t>(processes ? processes->self().first_device : 0);
  }
  void* Own(const Seen& seen, size_t local) const { return seen[local][DeviceOf(local)]; }
  int64_t PointersBytes() const { return RoundUp(num_devices() * int64_t{8}, kLine); }
  int64_t SiteBytes() const {
    return PointersBytes() + RoundUp(BoardBytes(num_devices()), kLine) +
           RoundUp(TableBytes(num_devices()), kLine);
  }
  // In a slab: first the pointers of all sites, then the boards and tables.
  int64_t BoardOf(int64_t site) const {
    return SitesPerSlab() * PointersBytes() + site * (SiteBytes() - PointersBytes());
  }
  int64_t SitesPerSlab() const { return std::max<int64_t>(1, kSlabBytes / SiteBytes()); }

  Status Start();
  Status EnablePeers();
  Status AddSlab();
  Status AddStage(int64_t bytes, Stage* stage);
  const Stage* FindStage(int64_t bytes) const;
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
    return Status::InvalidArgument(Concat("jax_fusco: there are ", num_devices(),
                                          " GPUs here that reach each other, at most ", kMaxRanks,
                                          " can meet; use implementation=\"xla\"."));
  }
  Status status = EnablePeers();
  if (status.ok()) status = SharedMemory::Create(ordinals, processes.get(), &memory);
  if (status.ok()) status = alarms.Allocate(num_local() * kLine);
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
  if (status.ok() && processes != nullptr) status = AddStage(kLine, &news);
  if (status.ok()) watcher = std::thread([this] { Watch(); });
  return status;
}

// Each device's part: for every site the pointers to the boards, then for every site a board and a
// table. Peers may write to the boards from here on.
Status Arena::Impl::AddSlab() {
  slabs.emplace_back();
  Slab& slab = slabs.back();
  const int64_t sites = SitesPerSlab();
  slab.used = sites;  // unless all goes well
  slab.seen_records.assign(ordinals.size(), nullptr);
  // Movers may read a whole Table, behind the last one too.
  Status status =
      memory->Allocate(sites * SiteBytes() + static_cast<int64_t>(sizeof(Table)), &slab.data);
  if (status.ok()) {
    status = slab.records.Allocate(sites * num_local() * static_cast<int64_t>(sizeof(Record)));
  }
  for (size_t d = 0; d < ordinals.size() && status.ok(); ++d) {
    if (ordinals[d] < 0) continue;
    status = SeenHostMemory(ordinals[d], slab.records.data, &slab.seen_records[d]);
    std::vector<char> pointers(static_cast<size_t>(sites * PointersBytes()));
    for (int64_t site = 0; site < sites; ++site) {
      auto* boards = reinterpret_cast<void**>(pointers.data() + site * PointersBytes());
      for (void* data : slab.data[d]) {
        *boards++ = data == nullptr ? nullptr : At(data, BoardOf(site));
      }
    }
    if (!status.ok()) break;
    status = CopyToDevice(ordinals[d], Own(slab.data, d), pointers.data(),
                          static_cast<int64_t>(pointers.size()));
  }
  if (status.ok()) slab.used = 0;
  return status;
}

// In front of the bytes, the pointers to those of all devices.
Status Arena::Impl::AddStage(int64_t bytes, Stage* stage) {
  Status status = memory->Allocate(PointersBytes() + bytes, &stage->data);
  for (size_t d = 0; d < ordinals.size() && status.ok(); ++d) {
    if (ordinals[d] < 0) continue;
    std::vector<void*> pointers;
    for (void* data : stage->data[d]) {
      pointers.push_back(data == nullptr ? nullptr : At(data, PointersBytes()));
    }
    status = CopyToDevice(ordinals[d], Own(stage->data, d), pointers.data(),
                          static_cast<int64_t>(pointers.size() * sizeof(void*)));
  }
  if (status.ok()) stage->bytes = bytes;
  return status;
}

const Arena::Impl::Stage* Arena::Impl::FindStage(int64_t bytes) const {
  for (const Stage& stage : stages) {
    if (stage.bytes >= bytes) return &stage;
  }
  return nullptr;
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
  for (Impl::Slab& slab : impl_->slabs) slab.records.Release();
  for (size_t d = 0; d < impl_->failed_runs.size(); ++d) {
    if (impl_->failed_runs[d] != nullptr) Free(impl_->ordinals[d], impl_->failed_runs[d]);
  }
  impl_->alarms.Release();
}

Status Arena::Create(const std::vector<int>& ordinals, std::unique_ptr<Arena>* arena) {
  return Create(ordinals, nullptr, arena);
}

Status Arena::Create(const std::vector<int>& ordinals, std::unique_ptr<Processes> processes,
                     std::unique_ptr<Arena>* arena) {
  std::unique_ptr<Arena> made(new Arena);
  made->impl_->ordinals = ordinals;
  made->impl_->processes = std::move(processes);
  Status status = made->impl_->Start();
  if (status.ok()) *arena = std::move(made);
  return status;
}

namespace {

// With the devices of this process, or of all that can meet.
Status Open(bool alone, std::unique_ptr<Arena>* arena) {
  std::vector<int> in_use;
  Status status = DevicesInUse(&in_use);
  if (status.ok() && in_use.empty()) {
    status = Status::Internal("jax_fusco: this process has no GPU in use.");
  }
  std::unique_ptr<Processes> processes;
  if (status.ok() && !alone && Connected() != nullptr) {
    status = Processes::Meet(*Connected(), HostName(), in_use, &processes);
  }
  if (!status.ok()) return status;
  if (processes != nullptr && processes->members().size() == 1) processes = nullptr;
  std::vector<int> ordinals(static_cast<size_t>(in_use.back()) + 1, -1);
  for (int ordinal : in_use) ordinals[static_cast<size_t>(ordinal)] = ordinal;
  return Arena::Create(ordinals, std::move(processes), arena);
}

}  // namespace

Status Arena::Get(int64_t num_ranks, Arena** arena) {
  // Never destroyed: kernels may run to the end of the process. Made again after a failure, but for
  // one that other processes have a part in: they would have to come again too.
  struct One {
    std::mutex mutex;
    Arena* arena = nullptr;
    Status status;
  };
  static One* both = new One[2];
  const bool alone = Connected() != nullptr && num_ranks == 1;
  One& one = both[alone];
  std::lock_guard<std::mutex> lock(one.mutex);
  if (!one.status.ok()) return one.status;
  if (one.arena == nullptr) {
    std::unique_ptr<Arena> made;
    const Status status = Open(alone, &made);
    if (Connected() != nullptr && !alone) one.status = status;
    if (!status.ok()) return status;
    one.arena = made.release();
  }
  *arena = one.arena;
  return Status::Ok();
}

Processes* Arena::processes() const { return impl_->processes.get(); }

int Arena::num_devices() const { return impl_->num_devices(); }

int Arena::first_device() const { return static_cast<int>(impl_->DeviceOf(0)); }

bool Arena::has_others() const {
  if (impl_->processes != nullptr) return impl_->processes->is_part();
  return Connected() != nullptr;
}

int Arena::ordinal(int device) const {
  if (device < 0 || device >= impl_->num_local()) return -1;
  return impl_->ordinals[static_cast<size_t>(device)];
}

uint64_t* const* Arena::news(int device) const {
  if (impl_->processes == nullptr) return nullptr;
  return static_cast<uint64_t* const*>(impl_->Own(impl_->news.data, static_cast<size_t>(device)));
}

const Status& Arena::reach() const { return impl_->reach; }

uint64_t* Arena::failed_run(int device) const {
  return static_cast<uint64_t*>(impl_->failed_runs[static_cast<size_t>(device)]);
}

uint64_t* Arena::seen_alarm(int device) const {
  return static_cast<uint64_t*>(impl_->seen_alarms[static_cast<size_t>(device)]);
}

Status Arena::NewPlaces(const std::string& site, int64_t stage_bytes, std::vector<Place>* places) {
  Impl& impl = *impl_;
  std::lock_guard<std::mutex> lock(impl.mutex);
  const Impl::Stage* stage = nullptr;
  if (impl.processes != nullptr) {
    Status status = impl.processes->AddSite(site);
    if (!status.ok()) return status;
    stage = impl.FindStage(stage_bytes);
    if (stage == nullptr) {
      impl.stages.emplace_back();
      status = impl.AddStage(stage_bytes, &impl.stages.back());
      if (!status.ok()) return status;
      stage = &impl.stages.back();
    }
  }
  if (impl.slabs.back().used == impl.SitesPerSlab()) {
    const Status status = impl.AddSlab();
    if (!status.ok()) return status;
  }
  Impl::Slab& slab = impl.slabs.back();
  const int64_t place_of_site = slab.used++;
  places->assign(impl.ordinals.size(), {});
  for (size_t d = 0; d < impl.ordinals.size(); ++d) {
    if (impl.ordinals[d] < 0) continue;
    Place& place = (*places)[d];
    void* base = impl.Own(slab.data, d);
    char* board = At(base, impl.BoardOf(place_of_site));
    place.boards = reinterpret_cast<Board* const*>(At(base, place_of_site * impl.PointersBytes()));
    place.board = reinterpret_cast<Board*>(board);
    place.table = reinterpret_cast<Table*>(board + RoundUp(BoardBytes(impl.num_devices()), kLine));
    const int64_t record = place_of_site * impl.num_local() + static_cast<int64_t>(d);
    place.record = static_cast<Record*>(slab.records.data) + record;
    place.seen_record = static_cast<Record*>(slab.seen_records[d]) + record;
    if (stage == nullptr) continue;
    place.stages = static_cast<char* const*>(impl.Own(stage->data, d));
    place.stage = At(impl.Own(stage->data, d), impl.PointersBytes());
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
