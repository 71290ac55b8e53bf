#include "tokenizing/characters.hpp"

#include <unicode/uchar.h>
#include <unicode/unistr.h>

namespace glance_trt {

Characters characters_of(std::string_view utf8) {
    const auto size = static_cast<std::int32_t>(utf8.size());
    const auto units = icu::UnicodeString::fromUTF8(icu::StringPiece(utf8.data(), size));
    Characters result;
    std::size_t origin = 0;
    for (std::int32_t i = 0; i < units.length(); i = units.moveIndex32(i, 1)) {
        const auto point = static_cast<char32_t>(units.char32At(i));
        result.add(point, origin);
        origin += utf8_length(point);
    }
    return result;
}

std::u32string points_of(std::string_view utf8) {
    return characters_of(utf8).points;
}

std::string utf8_of(std::u32string_view points) {
    std::string result;
    for (const char32_t point : points) {
        if (point < 0x80) {
            result.push_back(static_cast<char>(point));
            continue;
        }
        const auto more = static_cast<int>(utf8_length(point)) - 1; // bytes after the first, of six bits each
        const char32_t marks[] = {0xC0, 0xE0, 0xF0};
        result.push_back(static_cast<char>(marks[more - 1] | (point >> (6 * more))));
        for (int shift = 6 * (more - 1); shift >= 0; shift -= 6) {
            result.push_back(static_cast<char>(0x80 | ((point >> shift) & 0x3F)));
        }
    }
    return result;
}

bool is_space(char32_t point) {
    return u_isUWhiteSpace(static_cast<UChar32>(point));
}

bool is_word(char32_t point) {
    const auto c = static_cast<UChar32>(point);
    return u_isUAlphabetic(c) || (U_GET_GC_MASK(c) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0 ||
           u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL);
}

} // namespace glance_trt
