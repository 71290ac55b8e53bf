// How long calls report, and are ended: they call back, they never print.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace glance_trt {

/// A stage's name, how much of it is done, and of how much. Returns whether to go on.
using Progress = std::function<bool(const char *stage, std::uint64_t done, std::uint64_t total)>;

enum class Level : std::int32_t { info = 1, warning = 2, error = 3 };

/// Empty where nobody listens. May be called from several threads at once.
using Log = std::function<void(Level level, const std::string &message)>;

} // namespace glance_trt
