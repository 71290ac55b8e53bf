// Values as error texts show them: printable, short, and in the words of the Python package.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace glance_trt {

/// In quotes, at most 40 characters, all of them printable ASCII: Python's ascii(), cut.
std::string shown(std::string_view text);

/// A number, as short as may be: 1.0, 4.5, 1e+39.
std::string shown(double number);

/// A number without a fraction that is zero: 1, 4.5.
std::string shown_briefly(double number);

/// A key as it stands in a key path: plain where it is short and printable.
std::string shown_key(std::string_view key);

/// Items with a text between them.
std::string joined(const std::vector<std::string> &items, std::string_view between = ", ");

/// The one of the words that is most like a misspelt one; empty where none is. As Python's difflib has it.
std::string closest(std::string_view word, const std::vector<std::string> &words);

/// Where a text stops being UTF-8; its length where it is.
std::size_t valid_utf8(std::string_view text);

/// Without what Python's str.strip() takes off, as far as it is ASCII.
std::string_view stripped(std::string_view text);

} // namespace glance_trt
