#include "checks.hpp"

#include "limits.hpp"
#include "text.hpp"

#include <algorithm>
#include <set>

namespace glance_trt {
namespace {

bool is_denoiser(const std::string &name) {
    return name.rfind("denoiser.", 0) == 0;
}

std::string at(const std::string &path, std::size_t index) {
    return path + "[" + std::to_string(index) + "]";
}

std::string shown_size(const Size &size) {
    return "[" + std::to_string(size.height) + ", " + std::to_string(size.width) + "]";
}

class Checks {
  public:
    explicit Checks(const Manifest &manifest) : manifest_(manifest), conditions_(manifest.conditions()) {}

    void run() const {
        limits::check_name("name", manifest_.name);
        limits::check_file_names("files", manifest_.files.names(), manifest_name);
        check_names("tokenizers", manifest_.tokenizers);
        check_names("schedules", manifest_.schedules);
        check_names("graphs", manifest_.graphs);
        check_names("engines", manifest_.engines);
        check_graphs();
        check_schedules();
        check_sizes();
        check_engines();
        check_references();
    }

  private:
    template <class T>
    static void check_names(const std::string &key, const Named<T> &items) {
        for (const auto &[name, item] : items) {
            limits::check_name(key, name);
        }
    }

    void check_graphs() const {
        for (const auto &[name, graph] : manifest_.graphs) {
            check_sources(name, graph);
        }
        for (const std::string name : {"text_encoder", "decoder"}) {
            if (!manifest_.graphs.find(name)) {
                throw Mismatch("graphs." + name + ": missing");
            }
        }
        std::vector<std::string> names;
        for (const Port &port : conditions_) {
            names.push_back(port.name);
        }
        limits::check_distinct("graphs: outputs of text encoders", names);
    }

    /// The sources that a graph's inputs may have: all that exists by the time it runs.
    std::vector<std::string> sources_for(const std::string &graph) const {
        std::vector<std::string> known;
        if (is_text_encoder(graph)) {
            for (const std::string &tokenizer : manifest_.tokenizers.names()) {
                known.push_back("tokens." + tokenizer);
                known.push_back("mask." + tokenizer);
            }
        } else if (graph == "decoder") {
            known = {"latents"};
        } else if (graph == "encoder") {
            known = {"image", "noise"};
        } else if (is_denoiser(graph)) {
            known = {"latents", "table.timestep", "table.coefficients", "guidance_scale"};
            for (const Port &port : conditions_) {
                known.push_back("condition." + port.name);
                known.push_back("negative." + port.name);
            }
        } else {
            throw Mismatch("graphs." + graph +
                           ": expected text_encoder, text_encoder_<number>, encoder, decoder or denoiser.<phase>");
        }
        return known;
    }

    void check_sources(const std::string &name, const Graph &graph) const {
        const std::vector<std::string> known = sources_for(name);
        const std::string inputs = "graphs." + name + ".inputs";
        std::set<std::string> kinds;
        for (std::size_t i = 0; i < graph.inputs.size(); ++i) {
            const Port &port = graph.inputs[i];
            if (std::find(known.begin(), known.end(), port.source) == known.end()) {
                throw Mismatch(at(inputs, i) + ".source: got " + shown(port.source) + ", expected one of " +
                               (known.empty() ? "none, for there is no tokenizer" : joined(known)));
            }
            if (const std::string dtype = dtype_of(port); port.dtype != dtype) {
                throw Mismatch(at(inputs, i) + ".dtype: " + port.source + " is " + dtype + ", got " + port.dtype);
            }
            kinds.insert(port.source_parts().first);
        }
        if (kinds.count("negative") && !kinds.count("guidance_scale")) {
            throw Mismatch(inputs + ": a negative condition, but no guidance_scale");
        }
        if (name == "encoder" && !kinds.count("image")) {
            throw Mismatch(inputs + ": none is the image");
        }
    }

    /// What a runtime feeds an input with.
    std::string dtype_of(const Port &input) const {
        const auto [kind, rest] = input.source_parts();
        if (kind == "condition" || kind == "negative") {
            const auto same = [name = rest](const Port &port) { return port.name == name; };
            return std::find_if(conditions_.begin(), conditions_.end(), same)->dtype;
        }
        return kind == "tokens" || kind == "mask" ? "int64" : kind == "image" ? "uint8" : "float32";
    }

    void check_schedules() const {
        if (manifest_.schedules.empty()) {
            throw Mismatch("schedules: empty");
        }
        for (const auto &[name, schedule] : manifest_.schedules) {
            for (std::size_t i = 0; i < schedule.steps.size(); ++i) {
                check_step(at("schedules." + name + ".steps", i), schedule.steps[i]);
            }
        }
    }

    void check_step(const std::string &path, const Step &step) const {
        const std::string name = "denoiser." + step.phase;
        const Graph *graph = manifest_.graphs.find(name);
        if (!graph) {
            throw Mismatch(path + ".phase: there is no graph " + shown(name));
        }
        if (manifest_.graphs.find("encoder") && step.mix.empty()) {
            throw Mismatch(path + ".mix: missing; the graph encoder makes it possible to start from an image");
        }
        const auto count = static_cast<std::int64_t>(step.coefficients.size());
        for (const Port &port : graph->inputs) {
            if (port.source == "table.coefficients" && !(port.shape.size() == 1 && port.shape[0].size == count)) {
                throw Mismatch(path + ".coefficients: " + std::to_string(count) + " numbers, for input '" + port.name +
                               "' of " + name + ", whose shape is " + shown_shape(port));
            }
        }
    }

    static std::string shown_shape(const Port &port) {
        std::vector<std::string> sizes;
        for (const Dimension &dimension : port.shape) {
            sizes.push_back(dimension.size ? std::to_string(dimension.size) : shown(dimension.name));
        }
        return "[" + joined(sizes) + "]";
    }

    void check_sizes() const {
        const Image &image = manifest_.image;
        const auto &schedules = manifest_.schedules;
        for (const auto &[name, schedule] : schedules) {
            for (std::size_t i = 0; i < schedule.sizes.size(); ++i) {
                if (!image.takes(schedule.sizes[i])) {
                    throw Mismatch(at("schedules." + name + ".sizes", i) + ": " + shown_size(schedule.sizes[i]) +
                                   " is no size of image");
                }
            }
        }
        std::vector<Size> sizes = {image.usual};
        sizes.insert(sizes.end(), image.sizes.begin(), image.sizes.end());
        for (const Size &size : sizes) {
            const auto fits = [&size](const auto &item) { return item.second.fits(size); };
            if (std::none_of(schedules.begin(), schedules.end(), fits)) {
                throw Mismatch("schedules: none is for " + shown_size(size) + ", a size of image");
            }
        }
        const auto for_all = [](const auto &item) { return item.second.sizes.empty(); };
        if (image.sides && std::none_of(schedules.begin(), schedules.end(), for_all)) {
            throw Mismatch("schedules: image.sides allows any size in a range, and none is for all sizes");
        }
    }

    void check_engines() const {
        for (const auto &[target, engines] : manifest_.engines) {
            std::set<std::string> names;
            for (const auto &graphs : {manifest_.graphs.names(), engines.graphs.names()}) {
                names.insert(graphs.begin(), graphs.end());
            }
            for (const std::string &name : names) {
                const bool exists = manifest_.graphs.find(name);
                if (exists != (engines.graphs.find(name) != nullptr)) {
                    throw Mismatch("engines." + target + ".graphs." + shown_key(name) + ": " +
                                   (exists ? "missing" : "no such graph") +
                                   "; a target has one engine for every graph");
                }
            }
        }
    }

    void check_references() const {
        for (const auto &[name, tokenizer] : manifest_.tokenizers) {
            check_listed("tokenizers." + name + ".file", tokenizer.file);
        }
        for (const auto &[name, graph] : manifest_.graphs) {
            for (const auto &[dtype, file] : graph.files) {
                check_listed("graphs." + name + ".files." + dtype, file);
            }
            check_all_listed("graphs." + name + ".weights", graph.weights);
        }
        for (const auto &[target, engines] : manifest_.engines) {
            for (const auto &[name, engine] : engines.graphs) {
                const std::string path = "engines." + target + ".graphs." + name;
                check_listed(path + ".file", engine.file);
                check_all_listed(path + ".weights", engine.weights);
            }
        }
    }

    void check_listed(const std::string &path, const std::string &file) const {
        if (!manifest_.files.find(file)) {
            throw Mismatch(path + ": " + shown(file) + " is not listed under files");
        }
    }

    void check_all_listed(const std::string &path, const std::vector<std::string> &files) const {
        for (std::size_t i = 0; i < files.size(); ++i) {
            check_listed(at(path, i), files[i]);
        }
    }

    const Manifest &manifest_;
    std::vector<Port> conditions_;
};

} // namespace

void check_parts(const Manifest &manifest) {
    Checks(manifest).run();
}

} // namespace glance_trt
