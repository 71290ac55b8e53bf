#include "text.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>

namespace glance_trt {
namespace {

constexpr std::size_t shown_length = 40;
constexpr std::size_t key_length = 64;
constexpr std::string_view spaces = " \t\n\r\v\f\x1c\x1d\x1e\x1f";

struct CodePoint {
    std::uint32_t value;
    std::size_t length; // bytes; 0 where there is none
};

/// The first code point of a text that is not empty, by table 3-7 of the Unicode standard.
CodePoint first_code_point(std::string_view text) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned first = byte(0);
    if (first < 0x80) {
        return {first, 1};
    }
    const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4 || text.size() < length) {
        return {first, 0};
    }
    std::uint32_t value = first & (0x7Fu >> length);
    for (std::size_t i = 1; i < length; ++i) {
        if ((byte(i) & 0xC0) != 0x80) {
            return {first, 0};
        }
        value = value << 6 | (byte(i) & 0x3F);
    }
    constexpr std::array<std::uint32_t, 5> least = {0, 0, 0x80, 0x800, 0x10000};
    const bool surrogate = value >= 0xD800 && value <= 0xDFFF;
    return value < least[length] || value > 0x10FFFF || surrogate ? CodePoint{first, 0} : CodePoint{value, length};
}

std::string hexadecimal(char letter, std::uint32_t value, int digits) {
    std::string text = {'\\', letter};
    for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) {
        text += "0123456789abcdef"[value >> shift & 0xF];
    }
    return text;
}

std::string escaped(std::uint32_t value) {
    switch (value) {
    case '\n':
        return "\\n";
    case '\r':
        return "\\r";
    case '\t':
        return "\\t";
    case '\\':
        return "\\\\";
    }
    if (value >= 0x20 && value < 0x7F) {
        return {static_cast<char>(value)};
    }
    return value < 0x100     ? hexadecimal('x', value, 2)
           : value < 0x10000 ? hexadecimal('u', value, 4)
                             : hexadecimal('U', value, 8);
}

std::string formatted(double number, std::chars_format format, int precision) {
    std::array<char, 32> buffer{};
    // Not by printf, which writes a comma where the host's locale has one.
    const auto end = precision ? std::to_chars(buffer.data(), buffer.data() + buffer.size(), number, format, precision)
                               : std::to_chars(buffer.data(), buffer.data() + buffer.size(), number);
    return {buffer.data(), end.ptr};
}

struct Block {
    std::size_t a, b, length;
};

/// The longest stretch that two texts have in common, the first of several.
Block longest_common(std::string_view a, std::string_view b) {
    Block best = {0, 0, 0};
    for (std::size_t i = 0; i < a.size(); ++i) {
        for (std::size_t j = 0; j < b.size(); ++j) {
            std::size_t length = 0;
            while (i + length < a.size() && j + length < b.size() && a[i + length] == b[j + length]) {
                ++length;
            }
            if (length > best.length) {
                best = {i, j, length};
            }
        }
    }
    return best;
}

/// Characters in common, by Ratcliff and Obershelp.
std::size_t in_common(std::string_view a, std::string_view b) {
    const Block block = longest_common(a, b);
    if (block.length == 0) {
        return 0;
    }
    return block.length + in_common(a.substr(0, block.a), b.substr(0, block.b)) +
           in_common(a.substr(block.a + block.length), b.substr(block.b + block.length));
}

} // namespace

std::string shown(std::string_view text) {
    const bool has_single = text.find('\'') != std::string_view::npos;
    const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
    std::string result(1, quote);
    while (!text.empty() && result.size() <= shown_length) {
        const CodePoint point = first_code_point(text);
        if (point.length == 0) {
            result += hexadecimal('u', 0xDC00 + point.value, 4); // as Python has the bytes of names that are no text
        } else if (point.value == static_cast<unsigned char>(quote)) {
            result += {'\\', quote};
        } else {
            result += escaped(point.value);
        }
        text.remove_prefix(std::max<std::size_t>(point.length, 1));
    }
    result += quote;
    return result.size() <= shown_length ? result : result.substr(0, shown_length - 3) + "...";
}

std::string shown(double number) {
    const std::string text = formatted(number, std::chars_format::general, 0);
    return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

std::string shown_briefly(double number) {
    return formatted(number, std::chars_format::general, 6);
}

std::string shown_key(std::string_view key) {
    const auto printable = [](char c) { return c >= 0x20 && c < 0x7F; };
    const bool plain = !key.empty() && key.size() <= key_length && std::all_of(key.begin(), key.end(), printable);
    return plain ? std::string(key) : shown(key);
}

std::string joined(const std::vector<std::string> &items, std::string_view between) {
    std::string result;
    for (const std::string &item : items) {
        if (&item != &items.front()) {
            result += between;
        }
        result += item;
    }
    return result;
}

std::string closest(std::string_view word, const std::vector<std::string> &words) {
    constexpr double least = 0.6;
    std::string best;
    double best_ratio = 0;
    for (const std::string &candidate : words) {
        const auto total = static_cast<double>(candidate.size() + word.size());
        if (2.0 * static_cast<double>(std::min(candidate.size(), word.size())) < least * total) {
            continue; // too long or too short, whatever its letters
        }
        const double ratio = 2.0 * static_cast<double>(in_common(candidate, word)) / total;
        if (ratio >= least && (ratio > best_ratio || (ratio == best_ratio && candidate > best))) {
            best = candidate;
            best_ratio = ratio;
        }
    }
    return best;
}

std::size_t valid_utf8(std::string_view text) {
    std::size_t place = 0;
    while (place < text.size()) {
        const std::size_t length = first_code_point(text.substr(place)).length;
        if (length == 0) {
            break;
        }
        place += length;
    }
    return place;
}

std::string_view stripped(std::string_view text) {
    const std::size_t first = text.find_first_not_of(spaces);
    if (first == std::string_view::npos) {
        return {};
    }
    return text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

} // namespace glance_trt
