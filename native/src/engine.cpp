#include "engine.hpp"

#include "error.hpp"
#include "onnxruntime/backend.hpp"
#include "tensorrt/backend.hpp"
#include "text.hpp"

#include <map>

namespace glance_trt {
namespace {

/// TensorRT's, where its header was found when this library was built.
const std::vector<const tensorrt::Flavour *> flavours = {
#ifdef GLANCE_WITH_TENSORRT
    &tensorrt::tensorrt,
#endif
#ifdef GLANCE_WITH_TENSORRT_RTX
    &tensorrt::tensorrt_rtx,
#endif
};

/// The backends that this library was built with, made when they are first asked for.
class Backends {
  public:
    explicit Backends(const Options &options) : options_(options) {}

    /// Null where the library has none of that name.
    Backend *find(const std::string &name) {
        if (name == "onnxruntime" || name == "onnxruntime-gpu") {
            return made("onnxruntime", [&] { return make_onnxruntime(options_); });
        }
        for (const tensorrt::Flavour *flavour : flavours) {
            if (name == flavour->backend) {
                return made(name, [&] { return make_tensorrt(*flavour, options_); });
            }
        }
        return nullptr;
    }

    std::optional<std::string> unrunnable(const EngineSet &engines) {
        if (Backend *backend = find(engines.backend)) {
            return backend->unrunnable(engines);
        }
        std::vector<std::string> names = {"onnxruntime", "onnxruntime-gpu"};
        for (const tensorrt::Flavour *flavour : flavours) {
            names.emplace_back(flavour->backend);
        }
        return "this library was built to run engines of " + joined(names) + ", not of " + engines.backend +
               "; build it with TensorRT's headers (-DTENSORRT_ROOT), or compile a target for the CPU: glance-trt "
               "compile BUNDLE --engine cpu";
    }

  private:
    template <class Make>
    Backend *made(const std::string &name, const Make &make) {
        auto &backend = made_[name];
        if (!backend) {
            backend = make();
        }
        return backend.get();
    }

    const Options &options_;
    std::map<std::string, std::unique_ptr<Backend>> made_;
};

std::string choose(const Bundle &bundle, const std::optional<std::string> &target, Backends &backends) {
    const auto &engines = bundle.manifest().engines;
    if (!target) {
        std::string reasons;
        for (const auto &[name, item] : engines) {
            const auto reason = backends.unrunnable(item);
            if (!reason) {
                return name;
            }
            reasons += "\n  " + name + ": " + *reason;
        }
        throw Error(Kind::target,
                    bundle.directory() + ": none of its targets runs here:" + (reasons.empty() ? " none" : reasons));
    }
    if (!engines.find(*target)) {
        throw Error(Kind::target, "target " + shown(*target) + ": this bundle has engines for " +
                                      (engines.empty() ? "none" : joined(engines.names())) +
                                      "; add them with: glance-trt compile BUNDLE --engine TARGET");
    }
    if (const auto reason = backends.unrunnable(engines[*target])) {
        throw Error(Kind::target, *target + ": " + *reason);
    }
    return *target;
}

} // namespace

Tensor Runner::chain(const std::vector<Call> &calls, Tensors values, const Watch &watch) const {
    for (const Call &call : calls) {
        Tensors inputs;
        for (const auto &[port, value] : call.inputs) {
            inputs[port] = values.at(value);
        }
        values[call.value] = run(call.graph, inputs).at(call.port);
        watch(call);
    }
    return values.at(calls.back().value);
}

Opened open_target(const Bundle &bundle, const Options &options) {
    Backends backends(options);
    const std::string target = choose(bundle, options.target, backends);
    const Record record(options.cache, hashed_record);
    const Checked checked = bundle.check(bundle.manifest().engine_files(target), &record, options.progress);
    auto runner = backends.find(bundle.manifest().engines[target].backend)->open(bundle, target);
    bundle.confirm(checked);
    return {target, std::move(runner)};
}

} // namespace glance_trt
