// Code points as ICU has text.
#pragma once

#include <string_view>

#include <unicode/unistr.h>

namespace glance_trt {

inline icu::UnicodeString to_icu(std::u32string_view points) {
    return icu::UnicodeString::fromUTF32(reinterpret_cast<const UChar32 *>(points.data()),
                                         static_cast<std::int32_t>(points.size()));
}

} // namespace glance_trt
