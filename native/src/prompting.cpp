#include "prompting.hpp"

#include "error.hpp"
#include "text.hpp"

#include <algorithm>
#include <set>

namespace glance_trt {
namespace {

constexpr std::size_t cached_prompts = 64;
constexpr std::size_t cached_bytes = 1 << 30;
constexpr std::size_t shown_cut = 200; // bytes of a cut prompt that a warning shows

void check_text(const std::string &text, const std::string &what) {
    if (const std::size_t end = valid_utf8(text); end != text.size()) {
        throw Error(Kind::input, what + ": not UTF-8 at byte " + std::to_string(end) + "; a prompt is text");
    }
}

} // namespace

std::optional<Tensors> PromptCache::find(const std::string &key) {
    const std::lock_guard lock(mutex_);
    const auto place = places_.find(key);
    if (place == places_.end()) {
        return std::nullopt;
    }
    entries_.splice(entries_.begin(), entries_, place->second);
    return place->second->made;
}

void PromptCache::add(const std::string &key, const Tensors &made) {
    std::size_t bytes = 0;
    for (const auto &[name, tensor] : made) {
        bytes += tensor.bytes();
    }
    const std::lock_guard lock(mutex_);
    if (bytes > cached_bytes || places_.count(key)) {
        return; // another thread has made the same meanwhile
    }
    entries_.push_front({key, made, bytes});
    places_[key] = entries_.begin();
    bytes_ += bytes;
    while (entries_.size() > cached_prompts || bytes_ > cached_bytes) {
        bytes_ -= entries_.back().bytes;
        places_.erase(entries_.back().key);
        entries_.pop_back();
    }
}

TextEncoders::TextEncoders(const Manifest &manifest, ReadFile read, Log log)
    : manifest_(manifest), read_(std::move(read)), log_(std::move(log)) {
    std::set<std::string> used;
    for (const std::string &graph : manifest_.text_encoders()) {
        for (const Port &port : manifest_.graphs[graph].inputs) {
            used.insert(port.source_parts().second);
        }
    }
    used_.assign(used.begin(), used.end());
}

Tokens TextEncoders::tokenize(const Prompt &prompt, const std::string &what) {
    const std::map<std::string, Encoded> all = encoded(prompt, what);
    Tokens tokens;
    for (const std::string &graph : manifest_.text_encoders()) {
        for (const Port &port : manifest_.graphs[graph].inputs) {
            const auto [kind, tokenizer] = port.source_parts();
            const auto &row = kind == "mask" ? all.at(tokenizer).mask : all.at(tokenizer).ids;
            const auto length = static_cast<std::int64_t>(row.size());
            const Tensor &tensor = tokens.inputs[graph][port.name] = Tensor("int64", {1, length}, row);
            tokens.key.append(tensor.data<char>(), tensor.bytes());
        }
    }
    return tokens;
}

Tensors TextEncoders::encode(const Tokens &tokens, const Runner &runner) {
    if (auto known = cache_.find(tokens.key)) {
        return std::move(*known);
    }
    Tensors made;
    for (const auto &[graph, inputs] : tokens.inputs) {
        const Tensors outputs = runner.run(graph, inputs);
        for (const Port &port : manifest_.graphs[graph].outputs) {
            const Tensor &output = outputs.at(port.name);
            if (output.shape().empty() || output.shape()[0] != 1) {
                throw Error(Kind::bundle, graph + ": gave " + port.name + " " + shown(output.shape()) +
                                              " for one prompt; build the bundle again");
            }
            made[port.name] = output;
        }
    }
    cache_.add(tokens.key, made);
    return made;
}

std::map<std::string, Encoded> TextEncoders::encoded(const Prompt &prompt, const std::string &what) {
    if (prompt.text) {
        return encoded_text(*prompt.text, what);
    }
    std::map<std::string, Encoded> result;
    for (const auto &[name, ids] : prompt.ids) {
        const TokenizerItem *item = manifest_.tokenizers.find(name);
        if (!item) {
            throw Error(Kind::input, what + ": tokens of " + shown(name) + ": this bundle has the tokenizers " +
                                         joined(manifest_.tokenizers.names()));
        }
        result[name] = padded(ids, *item, what + ": tokens of '" + name + "'");
    }
    for (const std::string &name : used_) {
        if (!result.count(name)) {
            throw Error(Kind::input, what + (prompt.ids.empty() ? ": there is none; say what the image should show"
                                                                : ": tokens of '" + name +
                                                                      "': missing; this bundle "
                                                                      "takes those of " +
                                                                      joined(used_)));
        }
    }
    return result;
}

std::map<std::string, Encoded> TextEncoders::encoded_text(const std::string &text, const std::string &what) {
    check_text(text, what);
    std::map<std::string, Encoded> result;
    for (const std::string &name : used_) {
        result[name] = tokenizer(name).encode(text);
    }
    warn_of_cut(result, what);
    return result;
}

const Tokenizer &TextEncoders::tokenizer(const std::string &name) {
    const std::lock_guard lock(opening_);
    auto &place = tokenizers_[name];
    if (!place) {
        const TokenizerItem &item = manifest_.tokenizers[name];
        place = make_tokenizer(read_(item.file), item, item.file);
    }
    return *place;
}

void TextEncoders::warn_of_cut(const std::map<std::string, Encoded> &encoded, const std::string &what) const {
    // The tokenizer with the most room decides: what it has kept, a text encoder has seen.
    const auto best = std::min_element(encoded.begin(), encoded.end(), [](const auto &a, const auto &b) {
        return a.second.dropped.size() < b.second.dropped.size();
    });
    if (best == encoded.end() || !log_) {
        return;
    }
    std::string cut(stripped(best->second.dropped));
    if (cut.empty()) {
        return;
    }
    if (cut.size() > shown_cut) {
        cut.resize(shown_cut - 3);
        cut.resize(valid_utf8(cut)); // not through a character
        cut += "...";
    }
    const std::string length = std::to_string(manifest_.tokenizers[best->first].max_length);
    log_(Level::warning, what + ": longer than the " + length + " tokens of the text encoder; cut: '" + cut + "'");
}

} // namespace glance_trt
