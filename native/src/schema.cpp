#include "schema.hpp"

#include "limits.hpp"
#include "text.hpp"

#include <algorithm>

namespace glance_trt {
namespace {

using json::Whole;

const std::vector<std::string> dtypes = {"float32", "float16", "bfloat16", "int64", "uint8"};
const std::vector<std::string> compute_dtypes = {"float32", "float16", "bfloat16"};
const std::vector<std::string> backends = {"onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"};

std::string as_dtype(const Node &node) {
    return node.choice(dtypes);
}

void check_compute_dtype(const std::string &path, const std::string &dtype) {
    if (std::find(compute_dtypes.begin(), compute_dtypes.end(), dtype) == compute_dtypes.end()) {
        throw Mismatch(path + ": got " + shown(dtype) + ", expected one of " + joined(compute_dtypes));
    }
}

std::vector<std::string> names_of(const std::vector<Port> &ports) {
    std::vector<std::string> names;
    for (const Port &port : ports) {
        names.push_back(port.name);
    }
    return names;
}

Port read_port(const Node &node) {
    const Fields fields(node, {"name", "dtype", "shape", "source"});
    Port port;
    port.name = fields["name"].text();
    port.dtype = as_dtype(fields["dtype"]);
    const auto shape = fields["shape"].list_of([](const Node &item) { return item.whole_or_text(); });
    port.source = fields.get("source", std::string(), as_text);
    limits::check_name(fields.path("name"), port.name);
    limits::check_range(fields.path("shape") + ": rank", {std::to_string(shape.size())}, 0, limits::tensor_rank);
    std::vector<std::int64_t> known;
    for (const auto &dimension : shape) {
        const std::string path = fields.path("shape") + "[" + std::to_string(port.shape.size()) + "]";
        if (const auto *size = std::get_if<Whole>(&dimension)) {
            known.push_back(limits::check_range(path, *size, 1, limits::int32));
            port.shape.push_back({known.back(), ""});
            continue;
        }
        const std::string &name = std::get<std::string>(dimension);
        const auto graphic = [](char c) { return c >= '!' && c <= '~'; };
        if (name.empty() || name.size() > 64 || !std::all_of(name.begin(), name.end(), graphic)) {
            throw Mismatch(path + ": " + shown(name) + " is not 1 to 64 of ASCII without spaces");
        }
        port.shape.push_back({0, name});
    }
    limits::check_elements(fields.path("shape"), known);
    return port;
}

Engine read_engine(const Node &node) {
    const Fields fields(node, {"file", "weights", "dtype"});
    Engine engine = {fields["file"].text(), fields.get("weights", std::vector<std::string>(), as_texts)};
    const auto dtype = fields.get("dtype", std::string(),
                                  [](const Node &item) { return item.is_null() ? std::string() : as_dtype(item); });
    if (!dtype.empty()) {
        check_compute_dtype(fields.path("dtype"), dtype);
    }
    return engine;
}

} // namespace

std::pair<std::string, std::string> Port::source_parts() const {
    const std::size_t dot = source.find('.');
    return {source.substr(0, dot), dot == std::string::npos ? "" : source.substr(dot + 1)};
}

std::string EngineSet::required(const std::string &key) const {
    const std::string *value = requirements.find(key);
    return value ? *value : "";
}

FileEntry read_file_entry(const Node &node) {
    const Fields fields(node, {"size", "sha256", "key"});
    const Whole size = fields["size"].whole();
    std::string sha256 = fields["sha256"].text();
    fields.get("key", std::string(), as_text);
    const std::int64_t bytes = limits::check_range(fields.path("size"), size, 0, limits::int64);
    limits::check_sha256(fields.path("sha256"), sha256);
    return {bytes, std::move(sha256)};
}

Graph read_graph(const Node &node) {
    const Fields fields(node, {"inputs", "outputs", "files", "weights", "guidance"});
    Graph graph;
    graph.inputs = fields["inputs"].list_of(read_port);
    graph.outputs = fields["outputs"].list_of(read_port);
    graph.files = as_named_texts(fields["files"]);
    graph.weights = fields.get("weights", std::vector<std::string>(), as_texts);
    fields.get("guidance", std::string(), [](const Node &item) { return item.choice({"none", "cfg", "embedded"}); });
    const std::pair<const char *, const std::vector<Port> *> lists[] = {{"inputs", &graph.inputs},
                                                                        {"outputs", &graph.outputs}};
    for (const auto &[key, ports] : lists) {
        if (ports->empty()) {
            throw Mismatch(fields.path(key) + ": empty");
        }
        limits::check_distinct(fields.path(key), names_of(*ports));
    }
    for (std::size_t i = 0; i < graph.outputs.size(); ++i) {
        if (!graph.outputs[i].source.empty()) {
            throw Mismatch(fields.path("outputs") + "[" + std::to_string(i) + "].source: an output has none");
        }
    }
    for (const std::string &dtype : graph.files.names()) {
        check_compute_dtype(fields.path("files"), dtype);
    }
    return graph;
}

EngineSet read_engine_set(const Node &node) {
    const Fields fields(node, {"backend", "dtype", "graphs", "requires", "weight_streaming_budget"});
    EngineSet engines;
    engines.backend = fields["backend"].choice(backends);
    const std::string dtype = as_dtype(fields["dtype"]);
    engines.graphs = fields["graphs"].named(read_engine);
    engines.requirements = fields.get("requires", Named<std::string>(), as_named_texts);
    const auto budget = fields.get("weight_streaming_budget", std::optional<Whole>(), [](const Node &item) {
        return item.is_null() ? std::nullopt : std::optional(item.whole());
    });
    check_compute_dtype(fields.path("dtype"), dtype);
    if (budget) {
        engines.weight_streaming_budget =
            limits::check_range(fields.path("weight_streaming_budget"), *budget, 0, limits::int32);
    }
    return engines;
}

TokenizerItem read_tokenizer(const Node &node) {
    const Fields fields(node, {"file", "max_length", "pad_token_id", "template"});
    std::string file = fields["file"].text();
    const Whole max_length = fields["max_length"].whole();
    const Whole pad_token_id = fields["pad_token_id"].whole();
    std::string text_template = fields.get("template", std::string(prompt_place), as_text);
    const std::int64_t length = limits::check_range(fields.path("max_length"), max_length, 1, limits::prompt_tokens);
    const std::int64_t padding = limits::check_range(fields.path("pad_token_id"), pad_token_id, 0, limits::int32);
    const std::size_t place = text_template.find(prompt_place);
    if (place == std::string::npos || text_template.find(prompt_place, place + 2) != std::string::npos) {
        throw Mismatch(fields.path("template") + ": " + shown(text_template) + " does not hold {} once");
    }
    return {std::move(file), length, padding, std::move(text_template)};
}

void read_provenance(const Node &node) {
    const auto read_lora = [](const Node &item) {
        const Fields fields(item, {"phase", "file", "sha256", "scale", "alpha"});
        fields["phase"].text();
        fields["file"].text();
        const std::string sha256 = fields["sha256"].text();
        fields["scale"].number();
        fields.get("alpha", 0.0, [](const Node &alpha) { return alpha.is_null() ? 0.0 : alpha.number(); });
        limits::check_sha256(fields.path("sha256"), sha256);
        return true;
    };
    const auto read_guide = [](const Node &item) {
        const Fields fields(item, {"phase", "file", "sha256", "kind"});
        fields["phase"].text();
        fields["file"].text();
        const std::string sha256 = fields["sha256"].text();
        fields["kind"].text();
        limits::check_sha256(fields.path("sha256"), sha256);
        return true;
    };
    const Fields fields(node, {"model", "loras", "tools", "guides"});
    fields["model"].text();
    fields.get("loras", std::vector<bool>(), [&](const Node &item) { return item.list_of(read_lora); });
    fields.get("tools", Named<std::string>(), as_named_texts);
    fields.get("guides", std::vector<bool>(), [&](const Node &item) { return item.list_of(read_guide); });
}

} // namespace glance_trt
