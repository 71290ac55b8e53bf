// Words by their bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace glance_trt {

class Trie {
  public:
    /// A word that is there already gets the new value.
    void add(std::string_view word, std::uint32_t value) {
        std::uint32_t node = 0;
        for (const char c : word) {
            const auto [place, added] = children_.try_emplace(key(node, c), static_cast<std::uint32_t>(values_.size()));
            if (added) {
                values_.emplace_back();
            }
            node = place->second;
        }
        values_[node] = value;
    }

    /// Calls ``visit(length, value)`` for each word that a text begins with, the shortest first.
    template <class Visit>
    void prefixes(std::string_view text, const Visit &visit) const {
        std::uint32_t node = 0;
        for (std::size_t i = 0; i < text.size(); ++i) {
            const auto place = children_.find(key(node, text[i]));
            if (place == children_.end()) {
                return;
            }
            node = place->second;
            if (values_[node]) {
                visit(i + 1, *values_[node]);
            }
        }
    }

  private:
    static std::uint64_t key(std::uint32_t node, char c) {
        return (static_cast<std::uint64_t>(node) << 8) | static_cast<unsigned char>(c);
    }

    std::unordered_map<std::uint64_t, std::uint32_t> children_;
    std::vector<std::optional<std::uint32_t>> values_ = {std::nullopt}; // of the empty word
};

} // namespace glance_trt
