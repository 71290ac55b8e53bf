#include "tokenizing/charsmap.hpp"

#include "tokenizing/icu.hpp"

#include <openssl/evp.h>
#include <unicode/brkiter.h>

namespace glance_trt {
namespace {

constexpr std::size_t longest_grapheme = 5; // bytes

std::string from_base64(const Node &node) {
    const std::string &text = node.text();
    std::string bytes(text.size() / 4 * 3, '\0');
    const int length = EVP_DecodeBlock(reinterpret_cast<unsigned char *>(bytes.data()),
                                       reinterpret_cast<const unsigned char *>(text.data()),
                                       static_cast<int>(text.size()));
    if (length < 0 || text.size() % 4 != 0) {
        node.fail("not base64");
    }
    std::size_t padding = 0; // which EVP_DecodeBlock counts as zeros
    while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') {
        ++padding;
    }
    bytes.resize(static_cast<std::size_t>(length) - padding);
    return bytes;
}

std::uint32_t little_endian(std::string_view bytes, std::size_t at) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < 4; ++i) {
        value |= static_cast<std::uint32_t>(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
    }
    return value;
}

// The fields of a unit of the trie.
bool has_leaf(std::uint32_t unit) {
    return ((unit >> 8) & 1) != 0;
}
std::uint32_t value_of(std::uint32_t unit) {
    return unit & 0x7FFFFFFF;
}
std::uint32_t label_of(std::uint32_t unit) {
    return unit & 0x800000FF;
}
std::uint32_t offset_of(std::uint32_t unit) {
    return (unit >> 10) << ((unit & (1u << 9)) >> 6);
}

} // namespace

Charsmap::Charsmap(const Node &node) {
    const std::string bytes = from_base64(node);
    const std::size_t size = bytes.size() < 4 ? 0 : little_endian(bytes, 0);
    if (size == 0 || size % 4 != 0 || size > bytes.size() - 4) {
        node.fail("not a table of characters");
    }
    for (std::size_t at = 4; at < 4 + size; at += 4) {
        units_.push_back(little_endian(bytes, at));
    }
    texts_ = bytes.substr(4 + size);
}

Characters Charsmap::normalized(const Characters &text) const {
    UErrorCode status = U_ZERO_ERROR;
    const std::unique_ptr<icu::BreakIterator> graphemes(
        icu::BreakIterator::createCharacterInstance(icu::Locale::getRoot(), status));
    if (U_FAILURE(status)) {
        throw Mismatch(std::string("ICU's data is missing (") + u_errorName(status) + ")");
    }
    const icu::UnicodeString units = to_icu(text.points);
    graphemes->setText(units);
    Characters result;
    std::size_t begin = 0;
    std::int32_t unit = graphemes->first();
    for (std::int32_t next = graphemes->next(); next != icu::BreakIterator::DONE; next = graphemes->next()) {
        const auto count = static_cast<std::size_t>(units.countChar32(unit, next - unit));
        const std::u32string_view points = std::u32string_view(text.points).substr(begin, count);
        const std::string whole = count <= longest_grapheme ? utf8_of(points) : "";
        const auto found = !whole.empty() && whole.size() <= longest_grapheme ? replacement(whole) : std::nullopt;
        if (found) {
            result.add(*found, text.origins[begin]);
        }
        for (std::size_t i = begin; !found && i < begin + count; ++i) {
            const auto other = replacement(utf8_of({&text.points[i], 1}));
            result.add(other ? *other : std::u32string(1, text.points[i]), text.origins[i]);
        }
        begin += count;
        unit = next;
    }
    return result;
}

std::optional<std::u32string> Charsmap::replacement(std::string_view text) const {
    const auto at = shortest_prefix(text);
    if (!at || *at >= texts_.size()) {
        return std::nullopt;
    }
    return points_of(std::string_view(texts_).substr(*at, texts_.find('\0', *at) - *at));
}

std::optional<std::size_t> Charsmap::shortest_prefix(std::string_view text) const {
    std::size_t node = offset_of(units_[0]);
    for (const char c : text) {
        const auto label = static_cast<unsigned char>(c);
        node ^= label;
        if (label == 0 || node >= units_.size() || label_of(units_[node]) != label) {
            return std::nullopt;
        }
        const bool leaf = has_leaf(units_[node]);
        node ^= offset_of(units_[node]);
        if (leaf) {
            return node < units_.size() ? std::optional<std::size_t>(value_of(units_[node])) : std::nullopt;
        }
    }
    return std::nullopt;
}

} // namespace glance_trt
