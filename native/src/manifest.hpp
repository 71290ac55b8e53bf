// The manifest of a bundle, bundle.json: reading it, and what must hold between its parts.
#pragma once

#include "image.hpp"
#include "schedule.hpp"
#include "schema.hpp"

#include <string>
#include <string_view>
#include <vector>

namespace glance_trt {

constexpr const char *manifest_name = "bundle.json";

/// What docs/bundle-format.md says MUST hold, holds of it.
struct Manifest {
    std::string name;
    Image image;
    Named<TokenizerItem> tokenizers;
    Guidance guidance;
    Named<Schedule> schedules;
    Named<Graph> graphs;
    Named<EngineSet> engines;
    Named<FileEntry> files;

    /// The names of the text encoders' graphs.
    std::vector<std::string> text_encoders() const;
    /// What the text encoders put out, in order of the graphs.
    std::vector<Port> conditions() const;
    /// The files that running on a target reads, tokenizers included, without repetition.
    std::vector<std::string> engine_files(const std::string &target) const;
};

/// Whether a graph is a text encoder, by its name.
bool is_text_encoder(const std::string &graph);

/// Parse and check a manifest. `where` is what errors call it. Throws `Error` of the kind bundle.
Manifest load_manifest(std::string_view text, const std::string &where);

} // namespace glance_trt
