// The normalizer of SentencePiece models, such as T5's: a table of texts and what stands for them.
#pragma once

#include "tokenizing/normalizer.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace glance_trt {

/// As the tokenizers library applies it, not SentencePiece itself: to whole graphemes of up to five bytes where the
/// table has one that it begins with, and else to code points.
class Charsmap : public Normalizer {
  public:
    /// A text in base64: the size of a double-array trie (https://github.com/s-yata/darts-clone), the trie, and the
    /// texts that its values lead to, each with a zero at its end. Throws `Mismatch`.
    explicit Charsmap(const Node &node);

    Characters normalized(const Characters &text) const override;

  private:
    std::optional<std::u32string> replacement(std::string_view text) const;
    std::optional<std::size_t> shortest_prefix(std::string_view text) const;

    std::vector<std::uint32_t> units_;
    std::string texts_;
};

} // namespace glance_trt
