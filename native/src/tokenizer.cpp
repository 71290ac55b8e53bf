#include "tokenizer.hpp"

#include "error.hpp"
#include "limits.hpp"
#include "text.hpp"
#include "tokenizing/added.hpp"
#include "tokenizing/frame.hpp"
#include "tokenizing/model.hpp"
#include "tokenizing/normalizer.hpp"
#include "tokenizing/read.hpp"
#include "tokenizing/splitter.hpp"

#include <algorithm>

namespace glance_trt {
namespace {

json::Value parsed(std::string_view json, const std::string &name) {
    try {
        return json::parse(json);
    } catch (const json::Malformed &error) {
        throw Error(Kind::bundle, name + ": not a tokenizer that can be read: " + error.what());
    }
}

/// Calls `read`, whose errors become errors about the file.
template <class Read>
auto sound(const std::string &name, const std::string &what, const Read &read) {
    try {
        return read();
    } catch (const Mismatch &error) {
        throw Error(Kind::bundle, name + ": " + what + ": " + error.what());
    } catch (const Error &error) {
        throw Error(error.kind(), name + ": " + error.what());
    }
}

/// The parts of a tokenizer.json.
struct Parts {
    std::unique_ptr<const Normalizer> normalizer;
    std::unique_ptr<const Splitter> splitter;
    std::unique_ptr<const TokenModel> model;
    std::unique_ptr<const AddedTokens> added;
    Frame frame;

    explicit Parts(const Node &root) {
        if (const auto node = member(root, "normalizer")) {
            normalizer = read_normalizer(*node);
        }
        if (const auto node = member(root, "pre_tokenizer")) {
            splitter = read_splitter(*node);
        }
        model = read_model(required(root, "model"));
        added = std::make_unique<AddedTokens>(required(root, "added_tokens"), *model, normalizer.get());
        if (const auto node = member(root, "post_processor")) {
            frame = read_frame(*node);
        }
    }

    std::vector<Token> tokens(std::string_view text) const {
        std::vector<Token> result;
        added->split(
            characters_of(text), normalizer.get(), [&](Token token) { result.push_back(token); },
            [&](const Characters &part) {
                Pieces pieces;
                if (splitter) {
                    splitter->split(part, pieces);
                } else if (!part.empty()) {
                    pieces.push_back(part);
                }
                for (const Characters &piece : pieces) {
                    model->tokenize(piece, result);
                }
            });
        return result;
    }
};

class FileTokenizer : public Tokenizer {
  public:
    FileTokenizer(std::string_view json, const TokenizerItem &item, const std::string &name)
        : name_(name), length_(static_cast<std::size_t>(item.max_length)), pad_token_id_(item.pad_token_id) {
        const json::Value root = parsed(json, name);
        parts_ = sound(name, "not a tokenizer that can be read",
                       [&] { return std::make_unique<Parts>(Node(root, "")); });
        const auto pad = static_cast<std::uint32_t>(pad_token_id_);
        if (!parts_->model->has(pad) && !parts_->added->has(pad)) {
            throw Error(Kind::bundle, name + ": pad_token_id: got " + std::to_string(pad_token_id_) +
                                          "; no token of the vocabulary has this id");
        }
        if (length_ <= parts_->frame.size()) {
            throw Error(Kind::bundle, name + ": max_length: got " + std::to_string(length_) + "; " +
                                          std::to_string(parts_->frame.size()) +
                                          " are taken by the start and end tokens");
        }
        room_ = length_ - parts_->frame.size();
        const std::size_t place = item.text_template.find(prompt_place);
        before_ = item.text_template.substr(0, place);
        after_ = item.text_template.substr(place + std::string_view(prompt_place).size());
        if (!before_.empty() && tokens(before_).size() >= room_) {
            throw Error(Kind::bundle, name + ": max_length: got " + std::to_string(length_) +
                                          "; the template alone takes as many tokens");
        }
    }

    Encoded encode(std::string_view prompt) const override {
        std::vector<Token> found = tokens(before_ + std::string(prompt) + after_);
        Encoded encoded;
        if (found.size() > room_) {
            const std::size_t cut = found[room_].origin;
            const std::size_t begin = std::min(cut > before_.size() ? cut - before_.size() : 0, prompt.size());
            encoded.dropped = prompt.substr(begin);
            found.resize(room_);
        }
        const Frame &frame = parts_->frame;
        encoded.ids.assign(frame.before.begin(), frame.before.end());
        for (const Token &token : found) {
            encoded.ids.push_back(token.id);
        }
        encoded.ids.insert(encoded.ids.end(), frame.after.begin(), frame.after.end());
        encoded.mask.assign(encoded.ids.size(), 1);
        encoded.ids.resize(length_, pad_token_id_);
        encoded.mask.resize(length_, 0);
        return encoded;
    }

  private:
    std::vector<Token> tokens(const std::string &text) const {
        return sound(name_, "fails on a prompt, so the file is not sound", [&] { return parts_->tokens(text); });
    }

    std::string name_;
    std::size_t length_, room_ = 0;
    std::int64_t pad_token_id_;
    std::string before_, after_; // of the template
    std::unique_ptr<const Parts> parts_;
};

} // namespace

std::unique_ptr<const Tokenizer> make_tokenizer(std::string_view json, const TokenizerItem &item,
                                                const std::string &name) {
    return std::make_unique<FileTokenizer>(json, item, name);
}

Encoded padded(const std::vector<std::int64_t> &ids, const TokenizerItem &item, const std::string &what) {
    const auto length = static_cast<std::size_t>(item.max_length);
    if (ids.empty() || ids.size() > length) {
        throw Error(Kind::input, what + ": expected 1 to " + std::to_string(length) + " token ids, got " +
                                     std::to_string(ids.size()));
    }
    for (const std::int64_t id : ids) {
        if (id < 0 || id > limits::int32) {
            throw Error(Kind::input, what + ": expected token ids from 0 to " + std::to_string(limits::int32) +
                                         ", got " + std::to_string(id));
        }
    }
    Encoded encoded = {ids, std::vector<std::int64_t>(ids.size(), 1), ""};
    encoded.ids.resize(length, item.pad_token_id);
    encoded.mask.resize(length, 0);
    return encoded;
}

} // namespace glance_trt
