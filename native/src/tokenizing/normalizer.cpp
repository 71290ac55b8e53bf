#include "tokenizing/normalizer.hpp"

#include "tokenizing/charsmap.hpp"
#include "tokenizing/icu.hpp"
#include "tokenizing/pattern.hpp"
#include "tokenizing/read.hpp"

#include <algorithm>

#include <unicode/locid.h>
#include <unicode/normalizer2.h>

namespace glance_trt {
namespace {

constexpr char32_t first_composed = 0x300; // all below are their own normal form, and compose with nothing before them

std::u32string from_icu(const icu::UnicodeString &text) {
    std::u32string result;
    for (std::int32_t i = 0; i < text.length(); i = text.moveIndex32(i, 1)) {
        result.push_back(static_cast<char32_t>(text.char32At(i)));
    }
    return result;
}

class Nfc : public Normalizer {
  public:
    Nfc() {
        UErrorCode status = U_ZERO_ERROR;
        nfc_ = icu::Normalizer2::getNFCInstance(status);
        if (U_FAILURE(status)) {
            throw Mismatch(std::string("ICU's data is missing (") + u_errorName(status) + ")");
        }
    }

    Characters normalized(const Characters &text) const override {
        Characters result;
        for (std::size_t begin = 0, end = 0; begin < text.size(); begin = end) {
            end = begin + 1;
            while (end < text.size() && text.points[end] >= first_composed &&
                   !nfc_->hasBoundaryBefore(static_cast<UChar32>(text.points[end]))) {
                ++end;
            }
            if (end == begin + 1 && text.points[begin] < first_composed) {
                result.add(text.points[begin], text.origins[begin]);
                continue;
            }
            UErrorCode status = U_ZERO_ERROR;
            const auto segment = to_icu(std::u32string_view(text.points).substr(begin, end - begin));
            const std::u32string composed = from_icu(nfc_->normalize(segment, status));
            if (U_FAILURE(status)) {
                throw Mismatch(std::string("NFC fails on a prompt (") + u_errorName(status) + ")");
            }
            // Each character comes from as many as decompose into what it decomposes into.
            std::size_t taken = begin, left = 0;
            for (const char32_t point : composed) {
                result.add(point, text.origins[std::min(taken, end - 1)]);
                for (left += decomposed(point); taken < end && left >= decomposed(text.points[taken]); ++taken) {
                    left -= decomposed(text.points[taken]);
                }
            }
        }
        return result;
    }

  private:
    /// How many characters it decomposes into.
    std::size_t decomposed(char32_t point) const {
        icu::UnicodeString parts;
        const bool any = nfc_->getDecomposition(static_cast<UChar32>(point), parts);
        return any ? static_cast<std::size_t>(parts.countChar32()) : 1;
    }

    const icu::Normalizer2 *nfc_ = nullptr;
};

/// Character by character, so that a sigma at the end of a word is like any other.
class Lowercase : public Normalizer {
  public:
    Characters normalized(const Characters &text) const override {
        Characters result;
        for (std::size_t i = 0; i < text.size(); ++i) {
            icu::UnicodeString lowered(static_cast<UChar32>(text.points[i]));
            result.add(from_icu(lowered.toLower(icu::Locale::getRoot())), text.origins[i]);
        }
        return result;
    }
};

class Replace : public Normalizer {
  public:
    explicit Replace(const Node &node)
        : pattern_(Pattern::read(required(node, "pattern"))), content_(points_of(required(node, "content").text())) {}

    Characters normalized(const Characters &text) const override {
        Characters result;
        std::size_t done = 0;
        for (const auto [begin, end] : pattern_.matches(text.points)) {
            result.add(text.part(done, begin));
            result.add(content_, text.origins[begin]);
            done = end;
        }
        result.add(text.part(done, text.size()));
        return result;
    }

  private:
    Pattern pattern_;
    std::u32string content_;
};

class Sequence : public Normalizer {
  public:
    explicit Sequence(const Node &node) : parts_(required(node, "normalizers").list_of(read_normalizer)) {}

    Characters normalized(const Characters &text) const override {
        Characters result = text;
        for (const auto &part : parts_) {
            result = part->normalized(result);
        }
        return result;
    }

  private:
    std::vector<std::unique_ptr<const Normalizer>> parts_;
};

} // namespace

std::unique_ptr<const Normalizer> read_normalizer(const Node &node) {
    const std::string &type = required(node, "type").text();
    if (type == "Sequence") {
        return std::make_unique<Sequence>(node);
    }
    if (type == "NFC") {
        return std::make_unique<Nfc>();
    }
    if (type == "Lowercase") {
        return std::make_unique<Lowercase>();
    }
    if (type == "Replace") {
        return std::make_unique<Replace>(node);
    }
    if (type == "Precompiled") {
        return std::make_unique<Charsmap>(required(node, "precompiled_charsmap"));
    }
    unsupported(node, type);
}

} // namespace glance_trt
