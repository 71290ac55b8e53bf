// The special tokens that a tokenizer.json puts around a text.
#pragma once

#include "strict.hpp"

#include <cstdint>
#include <vector>

namespace glance_trt {

struct Frame {
    std::vector<std::uint32_t> before, after;

    std::size_t size() const { return before.size() + after.size(); }
};

/// Of a post-processor. Throws `Mismatch`, and `Error` of the kind unsupported.
Frame read_frame(const Node &node);

} // namespace glance_trt
