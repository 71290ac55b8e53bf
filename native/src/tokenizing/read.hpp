// Reading tokenizer.json, whose format grows: unlike a manifest it may hold keys that are not known here.
#pragma once

#include "strict.hpp"

#include <cstdint>
#include <optional>
#include <string>

namespace glance_trt {

/// A member that is there, and not null. Throws `Mismatch` where the node is no object.
std::optional<Node> member(const Node &node, const std::string &key);

/// One that must be there. Throws `Mismatch`.
Node required(const Node &node, const std::string &key);

/// True or false, by default `otherwise`. Throws `Mismatch`.
bool flag(const Node &node, const std::string &key, bool otherwise);

/// The id of a token, from 0 to 2^31 - 1. Throws `Mismatch`.
std::uint32_t token_id(const Node &node);

/// Refuses a kind of part that there is no code for. Throws `Error` of the kind unsupported.
[[noreturn]] void unsupported(const Node &node, const std::string &what);

} // namespace glance_trt
