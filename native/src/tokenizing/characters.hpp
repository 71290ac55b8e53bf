// Text as code points that know where they come from.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace glance_trt {

/// Code points, each with the byte of the user's text that it comes from.
struct Characters {
    std::u32string points;
    std::vector<std::size_t> origins;

    std::size_t size() const { return points.size(); }
    bool empty() const { return points.empty(); }
    void add(char32_t point, std::size_t origin) {
        points.push_back(point);
        origins.push_back(origin);
    }
    void add(std::u32string_view text, std::size_t origin) {
        points += text;
        origins.insert(origins.end(), text.size(), origin);
    }
    void add(const Characters &other) {
        points += other.points;
        origins.insert(origins.end(), other.origins.begin(), other.origins.end());
    }
    Characters part(std::size_t begin, std::size_t end) const {
        const auto at = [this](std::size_t i) { return origins.begin() + static_cast<std::ptrdiff_t>(i); };
        return {points.substr(begin, end - begin), {at(begin), at(end)}};
    }
};

/// Of valid UTF-8.
Characters characters_of(std::string_view utf8);

/// The same, without where they come from.
std::u32string points_of(std::string_view utf8);

std::string utf8_of(std::u32string_view points);

/// Bytes that UTF-8 takes for a code point.
inline std::size_t utf8_length(char32_t point) {
    return point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
}

/// As the Unicode property White_Space has it.
bool is_space(char32_t point);

/// As \w of a regular expression has it.
bool is_word(char32_t point);

} // namespace glance_trt
