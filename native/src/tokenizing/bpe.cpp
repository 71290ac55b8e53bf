// Byte-pair encoding: pieces are spelt in characters, and pairs merged, those first that were learned first.
#include "tokenizing/model.hpp"
#include "tokenizing/read.hpp"

#include <algorithm>
#include <queue>
#include <unordered_map>

namespace glance_trt {
namespace {

constexpr std::size_t none = static_cast<std::size_t>(-1);

struct Merge {
    std::uint32_t rank;
    std::uint32_t id; // of what the pair becomes
};

/// A part of a piece, linked to its neighbours.
struct Symbol {
    std::uint32_t id;
    std::size_t origin, previous, next;
    bool gone;
};

/// A merge that may be made at a symbol. The order is that of a queue whose first is the lowest rank, and then place.
struct Candidate {
    Merge merge;
    std::size_t place;
    bool operator<(const Candidate &other) const {
        return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : place > other.place;
    }
};

class Bpe : public TokenModel {
  public:
    explicit Bpe(const Node &node)
        : suffix_(text_of(node, "end_of_word_suffix")), prefix_(text_of(node, "continuing_subword_prefix")),
          whole_words_(flag(node, "ignore_merges", false)), fuses_(flag(node, "fuse_unk", false)) {
        for (const char *key : {"dropout", "byte_fallback"}) {
            const auto found = member(node, key);
            const bool *value = found ? found->value().as<bool>() : nullptr;
            if (found && !(value && !*value)) {
                unsupported(*found, key);
            }
        }
        read_vocabulary(required(node, "vocab"));
        read_merges(required(node, "merges"));
        if (const auto unknown = member(node, "unk_token")) {
            unknown_ = id_of(unknown->text());
            if (!unknown_) {
                unknown->fail("is not in the vocabulary");
            }
        }
    }

    void tokenize(const Characters &piece, std::vector<Token> &tokens) const override {
        if (whole_words_) {
            if (const auto id = id_of(utf8_of(piece.points))) {
                tokens.push_back({*id, piece.origins.front()});
                return;
            }
        }
        std::vector<Symbol> symbols = spelt(piece);
        merge(symbols);
        for (const Symbol &symbol : symbols) {
            if (!symbol.gone) {
                tokens.push_back({symbol.id, symbol.origin});
            }
        }
    }

    std::optional<std::uint32_t> id_of(const std::string &token) const override {
        const auto place = ids_.find(token);
        return place == ids_.end() ? std::nullopt : std::optional(place->second);
    }

    bool has(std::uint32_t id) const override {
        return std::any_of(ids_.begin(), ids_.end(), [id](const auto &entry) { return entry.second == id; });
    }

  private:
    static std::string text_of(const Node &node, const std::string &key) {
        const auto found = member(node, key);
        return found ? found->text() : "";
    }

    static std::uint64_t pair_of(std::uint32_t left, std::uint32_t right) {
        return (static_cast<std::uint64_t>(left) << 32) | right;
    }

    void read_vocabulary(const Node &node) {
        const auto *entries = node.value().as<json::Object>();
        if (!entries) {
            node.fail("expected tokens and their ids");
        }
        ids_.reserve(entries->size());
        for (const auto &[token, value] : *entries) {
            ids_.emplace(token, token_id(Node(value, node.path())));
        }
    }

    void read_merges(const Node &node) {
        const auto *entries = node.value().as<json::List>();
        if (!entries) {
            node.fail("expected a list of merges");
        }
        merges_.reserve(entries->size());
        for (const json::Value &entry : *entries) {
            const auto [left, right] = parts_of(entry, node);
            const auto left_id = id_of(left), right_id = id_of(right);
            const bool prefixed = right.compare(0, prefix_.size(), prefix_) == 0;
            const auto id = id_of(left + (prefixed ? right.substr(prefix_.size()) : right));
            if (!left_id || !right_id || !id) {
                node.fail("a merge of what is not in the vocabulary");
            }
            // Of a pair that stands twice, the last counts.
            merges_[pair_of(*left_id, *right_id)] = {static_cast<std::uint32_t>(&entry - entries->data()), *id};
        }
    }

    /// ["a", "b"], or "a b" as files had it until 2024.
    static std::pair<std::string, std::string> parts_of(const json::Value &entry, const Node &node) {
        if (const auto *text = entry.as<std::string>()) {
            const std::size_t space = text->find(' ');
            if (space != std::string::npos && text->find(' ', space + 1) == std::string::npos) {
                return {text->substr(0, space), text->substr(space + 1)};
            }
        } else if (const auto *list = entry.as<json::List>(); list && list->size() == 2) {
            const auto *left = (*list)[0].as<std::string>(), *right = (*list)[1].as<std::string>();
            if (left && right) {
                return {*left, *right};
            }
        }
        node.fail("expected pairs of tokens");
    }

    std::vector<Symbol> spelt(const Characters &piece) const {
        std::vector<Symbol> symbols;
        bool unknown_before = false;
        for (std::size_t i = 0; i < piece.size(); ++i) {
            std::string token = utf8_of({&piece.points[i], 1});
            token = (i > 0 ? prefix_ : "") + token + (i + 1 == piece.size() ? suffix_ : "");
            auto id = id_of(token);
            const bool unknown = !id;
            if (unknown) {
                if (!unknown_ || (fuses_ && unknown_before)) {
                    continue; // a model without a token for the unknown leaves it out
                }
                id = unknown_;
            }
            unknown_before = unknown;
            const std::size_t place = symbols.size();
            symbols.push_back({*id, piece.origins[i], place == 0 ? none : place - 1, place + 1, false});
        }
        if (!symbols.empty()) {
            symbols.back().next = none;
        }
        return symbols;
    }

    void merge(std::vector<Symbol> &symbols) const {
        std::priority_queue<Candidate> candidates;
        const auto consider = [&](std::size_t place) {
            if (place == none || symbols[place].next == none) {
                return;
            }
            const auto found = merges_.find(pair_of(symbols[place].id, symbols[symbols[place].next].id));
            if (found != merges_.end()) {
                candidates.push({found->second, place});
            }
        };
        for (std::size_t i = 0; i < symbols.size(); ++i) {
            consider(i);
        }
        while (!candidates.empty()) {
            const auto [merge, place] = candidates.top();
            candidates.pop();
            Symbol &left = symbols[place];
            if (left.gone || left.next == none) {
                continue;
            }
            Symbol &right = symbols[left.next];
            const auto found = merges_.find(pair_of(left.id, right.id));
            if (found == merges_.end() || found->second.id != merge.id) {
                continue; // one of the two is part of another by now
            }
            left.id = merge.id;
            left.next = right.next;
            right.gone = true;
            if (left.next != none) {
                symbols[left.next].previous = place;
            }
            consider(left.previous);
            consider(place);
        }
    }

    std::string suffix_, prefix_;
    bool whole_words_, fuses_;
    std::unordered_map<std::string, std::uint32_t> ids_;
    std::unordered_map<std::uint64_t, Merge> merges_;
    std::optional<std::uint32_t> unknown_;
};

} // namespace

std::unique_ptr<const TokenModel> read_bpe(const Node &node) {
    return std::make_unique<Bpe>(node);
}

} // namespace glance_trt
