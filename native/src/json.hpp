// JSON from a source that nobody vouches for: no key twice, nothing nested deeply, whole numbers kept as they are
// written.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace glance_trt::json {

/// A whole number as it is written: of at most 20 characters, so that it may be larger than any integer.
struct Whole {
    std::string digits;

    /// Empty where 64 bits do not hold it.
    std::optional<std::int64_t> value() const;
    bool negative() const { return digits.front() == '-'; }
};

struct Value;
using List = std::vector<Value>;
using Object = std::vector<std::pair<std::string, Value>>; // in the order of the text

struct Value {
    std::variant<std::nullptr_t, bool, Whole, double, std::string, List, Object> content = nullptr;

    template <class T>
    const T *as() const {
        return std::get_if<T>(&content);
    }
};

/// A text that is not JSON; says why.
class Malformed : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// Throws `Malformed`.
Value parse(std::string_view text);

/// A text in quotes.
std::string quoted(const std::string &text);

} // namespace glance_trt::json
