#include "ops/cc/support_store.h"

#include <time.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/cc/local_support.h"
#include "ops/cc/redis_client.h"
#include "ops/cc/redis_support.h"

namespace qianmo {
namespace {

int64_t SystemMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Counts while the machine sleeps, too.
int64_t SteadyMicros() {
  timespec time;
  clock_gettime(CLOCK_BOOTTIME, &time);
  return int64_t{1'000'000} * time.tv_sec + time.tv_nsec / 1000;
}

SupportOptions WithClock(SupportOptions options) {
  if (!options.steady) {
    options.steady = options.clock ? options.clock : SteadyMicros;
  }
  if (!options.clock) options.clock = SystemMicros;
  const int64_t ahead = options.clock() - options.steady();
  options.clock = [ahead, steady = options.steady] { return ahead + steady(); };
  return options;
}

bool Valid(const SupportOptions& options, std::string* error) {
  const SupportShape& shape = options.shape;
  const SupportLimits& limits = options.limits;
  const auto in = [error](const char* name, int64_t value, int64_t low,
                          int64_t high) {
    if (low <= value && value <= high) return true;
    *error = std::string("`") + name + "` should be in [" +
             std::to_string(low) + ", " + std::to_string(high) +
             "]. Received: " + std::to_string(value);
    return false;
  };
  if (IsRedisUrl(options.path) &&
      (limits.max_tasks != 0 || limits.max_bytes != 0)) {
    *error =
        "`max_tasks` and `max_bytes` are not for a Redis, which has a limit of "
        "its own: set its `maxmemory` and `maxmemory-policy`";
    return false;
  }
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  return in("dim", shape.dim, 1, 65536) &&
         in("num_labels", shape.num_labels, 1, 65536) &&
         in("max_rows", shape.max_rows, 1, kMaxTaskRows) &&
         in("ttl", limits.ttl_micros, 0, kAny) &&
         in("max_tasks", limits.max_tasks, 0, kAny) &&
         in("max_bytes", limits.max_bytes, 0, kAny);
}

// The stores that are shared by name. It is never destroyed, as stores may be
// used until the process ends.
struct Registry {
  std::mutex mutex;
  std::condition_variable closed;
  std::map<std::string, std::weak_ptr<SupportStore>>
      stores;  // closing ones too

  static Registry& Get() {
    static Registry* const registry = new Registry;
    return *registry;
  }
};

// Those that are open when the process ends keep what was put last.
void FlushAll() {
  std::vector<std::shared_ptr<SupportStore>> stores;
  {
    Registry& registry = Registry::Get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    for (const auto& entry : registry.stores) {
      stores.push_back(entry.second.lock());
    }
  }
  for (const auto& store : stores) {
    if (store) store->Flush();
  }
}

}  // namespace

SupportStore::SupportStore(const SupportOptions& options)
    : options_(WithClock(options)) {}

std::unique_ptr<SupportStore> SupportStore::Open(const SupportOptions& options,
                                                 std::string* error) {
  if (!Valid(options, error)) return nullptr;
  if (IsRedisUrl(options.path)) return RedisSupport::Open(options, error);
  return LocalSupport::Open(options, error);
}

std::shared_ptr<SupportStore> SupportStore::Shared(
    const std::string& name, const SupportOptions& options,
    std::string* error) {
  static const int at_exit = std::atexit(FlushAll);
  (void)at_exit;
  if (!Valid(options, error)) return nullptr;
  Registry& registry = Registry::Get();
  std::shared_ptr<SupportStore> store;  // outlives the lock: see below
  std::unique_lock<std::mutex> lock(registry.mutex);
  // A store that is being closed still has its files.
  registry.closed.wait(lock, [&] {
    const auto found = registry.stores.find(name);
    return found == registry.stores.end() || (store = found->second.lock());
  });
  if (store) {
    const SupportShape &have = store->shape(), &want = options.shape;
    if (have.dim != want.dim || have.num_labels != want.num_labels ||
        have.max_rows != want.max_rows ||
        store->options_.path != options.path) {
      const auto shown = [](const SupportShape& shape,
                            const std::string& path) {
        return "dim " + std::to_string(shape.dim) + ", num_labels " +
               std::to_string(shape.num_labels) + ", max_rows " +
               std::to_string(shape.max_rows) + ", path `" + path + "`";
      };
      *error = "Store `" + name + "` is open with " +
               shown(have, store->options_.path) +
               ". Asked for: " + shown(want, options.path) +
               ". Use another name";
      return nullptr;
    }
    store->SetLimits(options.limits);
    return store;
  }
  std::unique_ptr<SupportStore> opened = Open(options, error);
  if (!opened) return nullptr;
  // The last holder closes the store, and only then lets the name go.
  store.reset(opened.release(), [name](SupportStore* last) {
    delete last;
    Registry& registry = Registry::Get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    registry.stores.erase(name);
    registry.closed.notify_all();
  });
  registry.stores[name] = store;
  return store;
}

}  // namespace qianmo
