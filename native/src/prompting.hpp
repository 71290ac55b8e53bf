// Prompts to conditions: a bundle's tokenizers and text encoders, and what they last made of prompts.
#pragma once

#include "bundle.hpp"
#include "engine.hpp"
#include "settings.hpp"
#include "tensor.hpp"
#include "tokenizer.hpp"

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

namespace glance_trt {

/// Gives the content of one of a bundle's files.
using ReadFile = std::function<std::string(const std::string &name)>;

/// A prompt as the text encoders take it: the inputs of each, by graph. key: the same for prompts that are the same to
/// them.
struct Tokens {
    std::map<std::string, Tensors> inputs;
    std::string key;
};

/// What was lately made of prompts: the latest of them, up to a number and an amount of memory.
class PromptCache {
  public:
    std::optional<Tensors> find(const std::string &key);
    void add(const std::string &key, const Tensors &made);

  private:
    struct Entry {
        std::string key;
        Tensors made;
        std::size_t bytes;
    };

    std::mutex mutex_;
    std::list<Entry> entries_; // the latest first
    std::unordered_map<std::string, std::list<Entry>::iterator> places_;
    std::size_t bytes_ = 0;
};

/// May be used from several threads at once.
class TextEncoders {
  public:
    TextEncoders(const Manifest &manifest, ReadFile read, Log log);

    /// `what` is what errors and warnings call the prompt. Throws `Error`.
    Tokens tokenize(const Prompt &prompt, const std::string &what);
    /// What the text encoders make of a prompt, by name, for a batch of one; without running them if it was seen
    /// lately.
    Tensors encode(const Tokens &tokens, const Runner &runner);

  private:
    std::map<std::string, Encoded> encoded(const Prompt &prompt, const std::string &what);
    std::map<std::string, Encoded> encoded_text(const std::string &text, const std::string &what);
    const Tokenizer &tokenizer(const std::string &name);
    void warn_of_cut(const std::map<std::string, Encoded> &encoded, const std::string &what) const;

    const Manifest &manifest_;
    ReadFile read_;
    Log log_;
    std::vector<std::string> used_; // the tokenizers that text encoders take tokens or masks of
    std::mutex opening_;
    std::map<std::string, std::unique_ptr<const Tokenizer>> tokenizers_;
    PromptCache cache_;
};

} // namespace glance_trt
