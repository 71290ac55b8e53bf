// The errors that reach a user. Their texts say what, where, what was expected, and what to do.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace glance_trt {

/// As in glance.h.
enum class Kind : std::int32_t { other = 1, bundle = 6, target = 7, input = 8, unsupported = 12, cancelled = 130 };

class Error : public std::runtime_error {
  public:
    Error(Kind kind, const std::string &text) : std::runtime_error(text), kind_(kind) {}

    Kind kind() const noexcept { return kind_; }

  private:
    Kind kind_;
};

/// The error for what stands between "PATH: " and a reason of the operating system.
Error system_error(Kind kind, const std::string &path, int number);

} // namespace glance_trt
