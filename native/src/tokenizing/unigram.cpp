// The model of SentencePiece's unigram vocabularies: of all ways to cut a piece into tokens, that of the highest score.
#include "tokenizing/model.hpp"
#include "tokenizing/read.hpp"
#include "tokenizing/trie.hpp"

#include <algorithm>
#include <unordered_map>

namespace glance_trt {
namespace {

constexpr double unknown_penalty = 10; // below the lowest score

class Unigram : public TokenModel {
  public:
    explicit Unigram(const Node &node) {
        if (flag(node, "byte_fallback", false)) {
            unsupported(node, "byte_fallback");
        }
        const Node vocabulary = required(node, "vocab");
        const auto *entries = vocabulary.value().as<json::List>();
        if (!entries || entries->empty()) {
            vocabulary.fail("expected a list of tokens and scores");
        }
        for (const json::Value &entry : *entries) {
            const auto *pair = entry.as<json::List>();
            const auto *token = pair && pair->size() == 2 ? (*pair)[0].as<std::string>() : nullptr;
            if (!token) {
                vocabulary.fail("expected pairs of a token and its score");
            }
            const auto id = static_cast<std::uint32_t>(scores_.size());
            scores_.push_back(Node((*pair)[1], vocabulary.path()).number());
            ids_[*token] = id;
            if (!token->empty()) {
                words_.add(*token, id);
            }
        }
        unknown_ = token_id(required(node, "unk_id"));
        if (!has(unknown_)) {
            node.fail("unk_id: no token of the vocabulary has this id");
        }
        unknown_score_ = *std::min_element(scores_.begin(), scores_.end()) - unknown_penalty;
    }

    void tokenize(const Characters &piece, std::vector<Token> &tokens) const override {
        const std::string text = utf8_of(piece.points);
        const std::vector<Best> best = searched(piece, text);
        std::vector<Token> found; // from the last to the first
        std::vector<std::size_t> begins(1, text.size());
        for (std::size_t end = text.size(); end > 0; end = best[end].begin) {
            const bool unknown = best[end].id == unknown_;
            if (unknown && !found.empty() && found.back().id == unknown_) { // neighbours become one token
                begins.back() = best[end].begin;
            } else {
                found.push_back({best[end].id, 0});
                begins.push_back(best[end].begin);
            }
        }
        const std::vector<std::size_t> places = places_of(piece, text);
        for (std::size_t i = found.size(); i-- > 0;) {
            tokens.push_back({found[i].id, piece.origins[places[begins[i + 1]]]});
        }
    }

    std::optional<std::uint32_t> id_of(const std::string &token) const override {
        const auto place = ids_.find(token);
        return place == ids_.end() ? std::nullopt : std::optional(place->second);
    }

    bool has(std::uint32_t id) const override { return id < scores_.size(); }

  private:
    /// The best way to cut the text up to a byte: its score, and its last token.
    struct Best {
        double score = 0;
        std::uint32_t id = 0;
        std::size_t begin = static_cast<std::size_t>(-1);
        bool reached = false;
    };

    std::vector<Best> searched(const Characters &piece, const std::string &text) const {
        std::vector<Best> best(text.size() + 1);
        std::size_t begin = 0;
        for (const char32_t point : piece.points) {
            const std::size_t length = utf8_length(point);
            const double before = best[begin].score;
            const auto consider = [&](std::size_t end, std::uint32_t id, double score) {
                if (!best[end].reached || score > best[end].score) {
                    best[end] = {score, id, begin, true};
                }
            };
            bool alone = false; // whether the character is a token by itself
            words_.prefixes(std::string_view(text).substr(begin), [&](std::size_t size, std::uint32_t id) {
                consider(begin + size, id, scores_[id] + before);
                alone |= size == length;
            });
            if (!alone) {
                consider(begin + length, unknown_, unknown_score_ + before);
            }
            begin += length;
        }
        return best;
    }

    /// By byte of the text: the character that it begins.
    static std::vector<std::size_t> places_of(const Characters &piece, const std::string &text) {
        std::vector<std::size_t> places(text.size() + 1, 0);
        std::size_t byte = 0;
        for (std::size_t i = 0; i < piece.size(); ++i) {
            places[byte] = i;
            byte += utf8_length(piece.points[i]);
        }
        return places;
    }

    std::vector<double> scores_; // by id
    std::unordered_map<std::string, std::uint32_t> ids_;
    Trie words_;
    std::uint32_t unknown_ = 0;
    double unknown_score_ = 0;
};

} // namespace

std::unique_ptr<const TokenModel> read_unigram(const Node &node) {
    return std::make_unique<Unigram>(node);
}

std::unique_ptr<const TokenModel> read_model(const Node &node) {
    const std::string &type = required(node, "type").text();
    if (type == "BPE") {
        return read_bpe(node);
    }
    if (type == "Unigram") {
        return read_unigram(node);
    }
    unsupported(node, type);
}

} // namespace glance_trt
