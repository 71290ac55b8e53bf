// The parts of a bundle's manifest that say what there is: files, graphs, engines, tokenizers. Each `read_` checks what
// can be said of the part alone, and throws `Mismatch`; what must hold between the parts is checked by manifest.cpp.
// docs/bundle-format.md explains every field.
#pragma once

#include "strict.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace glance_trt {

/// What stands for the prompt in a tokenizer's template.
constexpr const char *prompt_place = "{}";

struct FileEntry {
    std::int64_t size; // bytes
    std::string sha256;
};

/// A number, or the name of one that may vary.
struct Dimension {
    std::int64_t size; // 0 where it has a name
    std::string name;
};

/// Of a graph: an input, with the source that it is fed from, or an output.
struct Port {
    std::string name, dtype;
    std::vector<Dimension> shape;
    std::string source;

    /// What stands before the first dot of the source, and behind it.
    std::pair<std::string, std::string> source_parts() const;
};

struct Graph {
    std::vector<Port> inputs, outputs;
    Named<std::string> files; // by compute dtype
    std::vector<std::string> weights;
};

struct Engine {
    std::string file;
    std::vector<std::string> weights;
};

struct EngineSet {
    std::string backend;
    Named<Engine> graphs;
    Named<std::string> requirements;
    std::optional<std::int64_t> weight_streaming_budget; // MiB

    /// What a requirement says; empty where it is not named.
    std::string required(const std::string &key) const;
};

struct TokenizerItem {
    std::string file;
    std::int64_t max_length, pad_token_id;
    std::string text_template; // with `prompt_place` once
};

FileEntry read_file_entry(const Node &node);
Graph read_graph(const Node &node);
EngineSet read_engine_set(const Node &node);
TokenizerItem read_tokenizer(const Node &node);
/// Checks it; a runtime has no use for it.
void read_provenance(const Node &node);

} // namespace glance_trt
