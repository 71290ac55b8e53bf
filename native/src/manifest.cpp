#include "manifest.hpp"

#include "checks.hpp"
#include "error.hpp"

#include <algorithm>

namespace glance_trt {
namespace {

constexpr std::int64_t format = 1;

/// Refuses other formats first: whatever else they changed is theirs.
void check_format(const json::Value &value, const std::string &where) {
    const auto *object = value.as<json::Object>();
    if (!object) {
        return;
    }
    for (const auto &[key, item] : *object) {
        const auto *found = item.as<json::Whole>();
        if (key != "format" || !found || found->value() == format) {
            continue;
        }
        const bool newer = !found->negative() && found->value() != 0;
        const std::string number = std::to_string(format);
        throw Error(Kind::bundle,
                    where + ": format " + found->digits +
                        (newer ? " is newer than " + number + ", which this version reads; upgrade glance-trt"
                               : " is unknown; this version reads " + number));
    }
}

Manifest read_manifest(const Node &node) {
    const Fields fields(node, {"format", "name", "family", "provenance", "image", "tokenizers", "guidance", "schedules",
                               "graphs", "engines", "files"});
    Manifest manifest;
    fields["format"].whole();
    manifest.name = fields["name"].text();
    fields["family"].text();
    read_provenance(fields["provenance"]);
    manifest.image = read_image(fields["image"]);
    manifest.tokenizers = fields["tokenizers"].named(read_tokenizer);
    manifest.guidance = read_guidance(fields["guidance"]);
    manifest.schedules = fields["schedules"].named(read_schedule);
    manifest.graphs = fields["graphs"].named(read_graph);
    manifest.engines = fields["engines"].named(read_engine_set);
    manifest.files = fields["files"].named(read_file_entry);
    check_parts(manifest);
    return manifest;
}

} // namespace

bool is_text_encoder(const std::string &name) {
    const std::string stem = "text_encoder";
    return name == stem || (name.size() == stem.size() + 2 && name.substr(0, stem.size() + 1) == stem + "_" &&
                            name.back() >= '0' && name.back() <= '9');
}

std::vector<std::string> Manifest::text_encoders() const {
    std::vector<std::string> result = graphs.names();
    result.erase(
        std::remove_if(result.begin(), result.end(), [](const auto &graph) { return !is_text_encoder(graph); }),
        result.end());
    return result;
}

std::vector<Port> Manifest::conditions() const {
    std::vector<Port> result;
    for (const std::string &graph : text_encoders()) {
        const std::vector<Port> &outputs = graphs[graph].outputs;
        result.insert(result.end(), outputs.begin(), outputs.end());
    }
    return result;
}

std::vector<std::string> Manifest::engine_files(const std::string &target) const {
    std::vector<std::string> all, result;
    for (const auto &[key, tokenizer] : tokenizers) {
        all.push_back(tokenizer.file);
    }
    for (const auto &[graph, engine] : engines[target].graphs) {
        all.push_back(engine.file);
        all.insert(all.end(), engine.weights.begin(), engine.weights.end());
    }
    for (std::string &file : all) {
        if (std::find(result.begin(), result.end(), file) == result.end()) {
            result.push_back(std::move(file));
        }
    }
    return result;
}

Manifest load_manifest(std::string_view text, const std::string &where) {
    try {
        const json::Value value = json::parse(text);
        check_format(value, where);
        return read_manifest(Node(value, ""));
    } catch (const json::Malformed &error) {
        throw Error(Kind::bundle, where + ": not valid JSON: " + error.what());
    } catch (const Mismatch &error) {
        throw Error(Kind::bundle, where + ": " + error.what());
    }
}

} // namespace glance_trt
