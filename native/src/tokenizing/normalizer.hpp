// The normalizers of a tokenizer.json.
#pragma once

#include "strict.hpp"
#include "tokenizing/characters.hpp"

#include <memory>

namespace glance_trt {

/// May be used from several threads at once.
class Normalizer {
  public:
    virtual ~Normalizer() = default;
    /// Throws `Mismatch`.
    virtual Characters normalized(const Characters &text) const = 0;
};

/// Throws `Mismatch`, and `Error` of the kind unsupported.
std::unique_ptr<const Normalizer> read_normalizer(const Node &node);

} // namespace glance_trt
