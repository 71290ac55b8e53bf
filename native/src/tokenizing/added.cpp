#include "tokenizing/added.hpp"

#include "tokenizing/read.hpp"

#include <algorithm>

namespace glance_trt {

AddedTokens::AddedTokens(const Node &node, const TokenModel &model, const Normalizer *normalizer) {
    for (const Node &item : node.list()) {
        const std::string &content = required(item, "content").text();
        if (content.empty()) {
            continue;
        }
        const auto known = model.id_of(content);
        const std::uint32_t id = known ? *known : token_id(required(item, "id"));
        const auto place = static_cast<std::uint32_t>(tokens_.size());
        tokens_.push_back(
            {id, flag(item, "single_word", false), flag(item, "lstrip", false), flag(item, "rstrip", false)});
        if (!flag(item, "normalized", true)) {
            as_written_.add(content, place);
            continue;
        }
        const Characters whole = characters_of(content);
        normalized_.add(utf8_of((normalizer ? normalizer->normalized(whole) : whole).points), place);
    }
}

void AddedTokens::split(const Characters &text, const Normalizer *normalizer, const std::function<void(Token)> &token,
                        const std::function<void(const Characters &)> &between) const {
    search(text, as_written_, token, [&](const Characters &part) {
        search(normalizer ? normalizer->normalized(part) : part, normalized_, token, between);
    });
}

bool AddedTokens::has(std::uint32_t id) const {
    return std::any_of(tokens_.begin(), tokens_.end(), [id](const Added &token) { return token.id == id; });
}

void AddedTokens::search(const Characters &text, const Trie &words, const std::function<void(Token)> &token,
                         const std::function<void(const Characters &)> &between) const {
    const std::string bytes = utf8_of(text.points);
    std::size_t done = 0; // what comes before is handed out
    for (std::size_t i = 0, byte = 0; i < text.size();) {
        std::size_t length = 0;
        const Added *found = nullptr;
        words.prefixes(std::string_view(bytes).substr(byte), [&](std::size_t size, std::uint32_t place) {
            length = size;
            found = &tokens_[place];
        });
        const std::size_t count = found ? points_of(std::string_view(bytes).substr(byte, length)).size() : 1;
        std::size_t begin = i, end = i + count;
        byte += found ? length : utf8_length(text.points[i]);
        i = end;
        if (!found || (found->single_word && ((begin > 0 && is_word(text.points[begin - 1])) ||
                                              (end < text.size() && is_word(text.points[end]))))) {
            continue;
        }
        while (found->left && begin > done && is_space(text.points[begin - 1])) {
            --begin;
        }
        while (found->right && end < text.size() && is_space(text.points[end])) {
            ++end;
        }
        if (begin > done) {
            between(text.part(done, begin));
        }
        token({found->id, text.origins[begin]});
        done = end;
    }
    if (done < text.size()) {
        between(text.part(done, text.size()));
    }
}

} // namespace glance_trt
