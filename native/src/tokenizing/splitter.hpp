// The pre-tokenizers of a tokenizer.json: they cut a text into the pieces that are tokenized each for itself.
#pragma once

#include "strict.hpp"
#include "tokenizing/characters.hpp"

#include <memory>
#include <vector>

namespace glance_trt {

using Pieces = std::vector<Characters>;

/// May be used from several threads at once.
class Splitter {
  public:
    virtual ~Splitter() = default;
    /// Adds the pieces of a text, none of them empty. Throws `Mismatch`.
    virtual void split(const Characters &text, Pieces &pieces) const = 0;
};

/// Throws `Mismatch`, and `Error` of the kind unsupported.
std::unique_ptr<const Splitter> read_splitter(const Node &node);

} // namespace glance_trt
