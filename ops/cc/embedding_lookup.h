// What the shape function and the kernel of `Qianmo>EmbeddingLookup` share.

#ifndef QIANMO_OPS_CC_EMBEDDING_LOOKUP_H_
#define QIANMO_OPS_CC_EMBEDDING_LOOKUP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace qianmo {

// The attributes that say how each of the `ids` is read.
struct LookupAttrs {
  std::vector<std::string> tables, pooling;
  std::vector<int32_t> dims;
  std::vector<bool> weighted;

  // `from` is the context of a kernel's construction or of shape inference.
  template <typename Context>
  absl::Status Get(Context* from) {
    absl::Status status = from->GetAttr("tables", &tables);
    status.Update(from->GetAttr("pooling", &pooling));
    status.Update(from->GetAttr("dims", &dims));
    status.Update(from->GetAttr("weighted", &weighted));
    return status;
  }

  // Whether they fit each other and these numbers of input tensors.
  absl::Status Check(size_t ids, size_t lengths, size_t weights) const;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_EMBEDDING_LOOKUP_H_
