#include "onnxruntime/backend.hpp"

#include "error.hpp"
#include "onnxruntime/library.hpp"
#include "onnxruntime/session.hpp"
#include "platform.hpp"
#include "text.hpp"

#include <algorithm>
#include <future>
#include <map>

namespace glance_trt {
namespace {

using onnxruntime::Library;
using onnxruntime::Session;

constexpr const char *cuda = "CUDAExecutionProvider"; // it compiles nothing, and loads no code from a graph

class OnnxRuntimeRunner : public Runner {
  public:
    using Sessions = std::map<std::string, std::unique_ptr<const Session>>;

    explicit OnnxRuntimeRunner(Sessions sessions) : sessions_(std::move(sessions)) {}

    Tensors run(const std::string &graph, const Tensors &inputs) const override {
        return sessions_.at(graph)->run(inputs);
    }

  private:
    Sessions sessions_;
};

class OnnxRuntime : public Backend {
  public:
    explicit OnnxRuntime(const Options &options) : options_(options) {}

    std::optional<std::string> unrunnable(const EngineSet &engines) override {
        try {
            return engines.backend == "onnxruntime" ? unmet(engines.required("onnxruntime"), engines.required("cpu"))
                                                    : without_provider(engines.required("provider"));
        } catch (const Error &error) {
            return error.what();
        }
    }

    std::unique_ptr<Runner> open(const Bundle &bundle, const std::string &target) override {
        const EngineSet &engines = bundle.manifest().engines[target];
        onnxruntime::SessionOptions options;
        options.folder = bundle.directory();
        options.threads = options_.threads;
        options.device = options_.device;
        options.log = options_.log;
        if (engines.backend != "onnxruntime") {
            options.provider = engines.required("provider");
            check_trust(target, options.provider);
        }
        return std::make_unique<OnnxRuntimeRunner>(sessions(bundle, engines, options));
    }

  private:
    const std::shared_ptr<const Library> &library() {
        if (!library_) {
            library_ = Library::load(options_.onnxruntime);
        }
        return library_;
    }

    /// Why engines that were built for this cannot run here; what is empty is not looked at.
    std::optional<std::string> unmet(const std::string &version, const std::string &cpu) {
        const auto differs = [](const std::string &key, const std::string &there, const std::string &here) {
            return "built for " + key + " " + there + ", but this is " + here + "; ";
        };
        if (!version.empty() && version != library()->version()) {
            return differs("onnxruntime", version, library()->version()) + "load that version, or " + compile_anew;
        }
        if (!cpu.empty() && cpu != cpu_family()) {
            return differs("cpu", cpu, cpu_family()) + compile_anew;
        }
        return std::nullopt;
    }

    std::optional<std::string> without_provider(const std::string &provider) {
        const std::vector<std::string> present = library()->providers();
        if (std::find(present.begin(), present.end(), provider) == present.end()) {
            return "this ONNX Runtime has no " + (provider.empty() ? "none" : provider) + ", but " + joined(present) +
                   "; load one that has it";
        }
        if (provider != cuda && provider != "CPUExecutionProvider") {
            return "this library opens portable graphs with " + std::string(cuda) + ", not " + provider;
        }
        return std::nullopt;
    }

    void check_trust(const std::string &target, const std::string &provider) const {
        if (provider != cuda && !options_.trust) {
            throw Error(Kind::target, target +
                                          ": its graphs go to TensorRT through ONNX Runtime, and a graph can hold a "
                                          "plan, which is native code. If you trust where it comes from, set the "
                                          "option trust");
        }
    }

    /// Opens all graphs side by side: most of it is planning and packing, in one thread per session.
    OnnxRuntimeRunner::Sessions sessions(const Bundle &bundle, const EngineSet &engines,
                                         const onnxruntime::SessionOptions &options) {
        std::map<std::string, std::future<std::unique_ptr<const Session>>> opening;
        const auto policy = options.threads == 1 ? std::launch::deferred : std::launch::async;
        for (const auto &item : engines.graphs) {
            const std::string &graph = item.first, &file = item.second.file;
            opening[graph] = std::async(policy, [&, loaded = library()] {
                auto session = std::make_unique<const Session>(loaded, graph, bundle.manifest().graphs[graph], file,
                                                               bundle.read(file), options);
                if (options.provider.empty()) {
                    check_built_for(*session, file);
                }
                return session;
            });
        }
        OnnxRuntimeRunner::Sessions opened;
        for (auto &[graph, session] : opening) {
            opened[graph] = session.get();
        }
        return opened;
    }

    void check_built_for(const Session &session, const std::string &file) {
        const auto said = [&session](const std::string &key) {
            const std::string value = session.metadata(key);
            return value.empty() ? "unknown" : value;
        };
        if (const auto reason = unmet(said("onnxruntime"), said("cpu"))) {
            throw Error(Kind::target, file + ": " + *reason);
        }
    }

    const Options &options_;
    std::shared_ptr<const Library> library_;
};

} // namespace

std::unique_ptr<Backend> make_onnxruntime(const Options &options) {
    return std::make_unique<OnnxRuntime>(options);
}

} // namespace glance_trt
