// Embedding versions in a Redis or a Redis Cluster.
//
// The keys of prefix P, all of strings:
//
//   P:CURRENT       the number of the version to read
//   P:VERSIONS      a line `VERSION SPACE` for each version that is whole
//   P:7:MANIFEST    version 7 as embedding_version.h describes it, without the
//                   lines of shards
//   P:7:item:42     the bytes of row 42 of its table `item`
//
// A version's rows never change. Redis must keep them all: with a limit of
// memory, under the policy `noeviction`.

#ifndef QIANMO_OPS_CC_REDIS_SOURCE_H_
#define QIANMO_OPS_CC_REDIS_SOURCE_H_

#include <memory>
#include <string>

#include "ops/cc/embedding_store.h"

namespace qianmo {

// `url` as redis_client.h describes it. Returns null and an error when it is
// none, or of `verify`, which is for files.
std::unique_ptr<EmbeddingSource> OpenRedis(const std::string& url, bool verify,
                                           std::string* error);

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_REDIS_SOURCE_H_
