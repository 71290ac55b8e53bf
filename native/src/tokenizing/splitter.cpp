#include "tokenizing/splitter.hpp"

#include "tokenizing/pattern.hpp"
#include "tokenizing/read.hpp"

#include <algorithm>
#include <array>
#include <optional>

namespace glance_trt {
namespace {

void add(Characters piece, Pieces &pieces) {
    if (!piece.empty()) {
        pieces.push_back(std::move(piece));
    }
}

/// Cuts around the matches of a pattern. Either kind of piece may be left out.
void cut(const Characters &text, const Pattern &pattern, bool with_matches, bool with_others, Pieces &pieces) {
    std::size_t done = 0;
    for (const auto [begin, end] : pattern.matches(text.points)) {
        if (with_others) {
            add(text.part(done, begin), pieces);
        }
        if (with_matches) {
            add(text.part(begin, end), pieces);
        }
        done = end;
    }
    if (with_others) {
        add(text.part(done, text.size()), pieces);
    }
}

class Split : public Splitter {
  public:
    explicit Split(const Node &node) : pattern_(Pattern::read(required(node, "pattern"))) {
        const Node behavior = required(node, "behavior");
        if (behavior.text() == "Isolated") {
            return;
        }
        if (behavior.text() != "Removed") {
            unsupported(behavior, behavior.text());
        }
        (flag(node, "invert", false) ? with_others_ : with_matches_) = false;
    }

    void split(const Characters &text, Pieces &pieces) const override {
        cut(text, pattern_, with_matches_, with_others_, pieces);
    }

  private:
    Pattern pattern_;
    bool with_matches_ = true;
    bool with_others_ = true;
};

/// Spells a text in bytes, each as a character that can be printed, as GPT-2 did first.
class ByteLevel : public Splitter {
  public:
    explicit ByteLevel(const Node &node) : prefixed_(flag(node, "add_prefix_space", true)) {
        if (flag(node, "use_regex", true)) {
            words_ = Pattern::regex(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)",
                                    node.path());
        }
        char32_t other = 256;
        for (std::size_t byte = 0; byte < letters_.size(); ++byte) {
            const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
            letters_[byte] = printable ? static_cast<char32_t>(byte) : other++;
        }
    }

    void split(const Characters &text, Pieces &pieces) const override {
        Characters whole;
        if (prefixed_ && !text.empty() && text.points.front() != U' ') {
            whole.add(U' ', text.origins.front());
        }
        whole.add(text);
        Pieces words;
        if (words_) {
            cut(whole, *words_, true, true, words);
        } else {
            add(std::move(whole), words);
        }
        for (const Characters &word : words) {
            Characters &spelt = pieces.emplace_back();
            for (std::size_t i = 0; i < word.size(); ++i) {
                for (const char byte : utf8_of({&word.points[i], 1})) {
                    spelt.add(letters_[static_cast<unsigned char>(byte)], word.origins[i]);
                }
            }
        }
    }

  private:
    bool prefixed_;
    std::optional<Pattern> words_;
    std::array<char32_t, 256> letters_{};
};

class WhitespaceSplit : public Splitter {
  public:
    void split(const Characters &text, Pieces &pieces) const override {
        std::size_t begin = 0;
        for (std::size_t i = 0; i <= text.size(); ++i) {
            if (i == text.size() || is_space(text.points[i])) {
                add(text.part(begin, i), pieces);
                begin = i + 1;
            }
        }
    }
};

/// Writes a mark for each space, and one before the text, and cuts before each mark.
class Metaspace : public Splitter {
  public:
    explicit Metaspace(const Node &node) : cuts_(flag(node, "split", true)) {
        const Node replacement = required(node, "replacement");
        const std::u32string mark = points_of(replacement.text());
        if (mark.size() != 1) {
            replacement.fail("expected one character");
        }
        mark_ = mark.front();
        const auto scheme = member(node, "prepend_scheme");
        scheme_ = scheme ? scheme->choice({"always", "first", "never"}) : "always";
    }

    void split(const Characters &text, Pieces &pieces) const override {
        Characters marked;
        const bool first = !text.empty() && text.origins.front() == 0;
        const bool starts = !text.empty() && (text.points.front() == mark_ || text.points.front() == U' ');
        if (!text.empty() && !starts && (scheme_ == "always" || (scheme_ == "first" && first))) {
            marked.add(mark_, text.origins.front());
        }
        marked.add(text);
        std::replace(marked.points.begin(), marked.points.end(), U' ', mark_);
        std::size_t begin = 0;
        for (std::size_t i = 1; cuts_ && i < marked.size(); ++i) {
            if (marked.points[i] == mark_) {
                add(marked.part(begin, i), pieces);
                begin = i;
            }
        }
        add(marked.part(begin, marked.size()), pieces);
    }

  private:
    bool cuts_;
    char32_t mark_;
    std::string scheme_;
};

class Sequence : public Splitter {
  public:
    explicit Sequence(const Node &node) : parts_(required(node, "pretokenizers").list_of(read_splitter)) {}

    void split(const Characters &text, Pieces &pieces) const override {
        Pieces current;
        add(text, current);
        for (const auto &part : parts_) {
            Pieces next;
            for (const Characters &piece : current) {
                part->split(piece, next);
            }
            current = std::move(next);
        }
        for (Characters &piece : current) {
            pieces.push_back(std::move(piece));
        }
    }

  private:
    std::vector<std::unique_ptr<const Splitter>> parts_;
};

} // namespace

std::unique_ptr<const Splitter> read_splitter(const Node &node) {
    const std::string &type = required(node, "type").text();
    if (type == "Sequence") {
        return std::make_unique<Sequence>(node);
    }
    if (type == "Split") {
        return std::make_unique<Split>(node);
    }
    if (type == "ByteLevel") {
        return std::make_unique<ByteLevel>(node);
    }
    if (type == "WhitespaceSplit") {
        return std::make_unique<WhitespaceSplit>();
    }
    if (type == "Metaspace") {
        return std::make_unique<Metaspace>(node);
    }
    unsupported(node, type);
}

} // namespace glance_trt
