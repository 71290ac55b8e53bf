#include "tensorrt/backend.hpp"

#include "device/runner.hpp"
#include "error.hpp"
#include "platform.hpp"
#include "records.hpp"
#include "text.hpp"

#include <algorithm>
#include <utility>
#include <vector>

namespace glance_trt {
namespace {

/// {10, 13, 3} of "10.13.3"; of a text from a manifest, so of any: at least one.
std::vector<std::uint64_t> numbers(const std::string &version) {
    std::vector<std::uint64_t> found;
    bool within = false;
    for (const char c : version) {
        const bool digit = c >= '0' && c <= '9';
        if (digit) {
            if (!within) {
                found.push_back(0);
            }
            found.back() = std::min<std::uint64_t>(found.back() * 10 + static_cast<std::uint64_t>(c - '0'), 1 << 30);
        }
        within = digit;
    }
    return found.empty() ? std::vector<std::uint64_t>{0} : found;
}

bool is_open(const std::string &wanted) {
    return !wanted.empty() && wanted.back() == '+';
}

/// "10.13+" wants at least that, of the same major version.
bool is_version(const std::string &here, const std::string &wanted) {
    if (!is_open(wanted)) {
        return here == wanted;
    }
    return numbers(here)[0] == numbers(wanted)[0] && numbers(here) >= numbers(wanted);
}

/// Whether a plan for "8.6 8.9", or for "8.0+", which is all from there on, has code for a GPU.
bool holds(const std::string &capabilities, const std::string &capability) {
    if (is_open(capabilities)) {
        return numbers(capability) >= numbers(capabilities);
    }
    return (" " + capabilities + " ").find(" " + capability + " ") != std::string::npos;
}

class TensorRt : public Backend {
  public:
    TensorRt(const tensorrt::Flavour &flavour, const Options &options) : flavour_(flavour), options_(options) {}

    std::optional<std::string> unrunnable(const EngineSet &engines) override {
        try {
            check(engines);
        } catch (const Error &error) {
            return error.what();
        }
        return std::nullopt;
    }

    std::unique_ptr<Runner> open(const Bundle &bundle, const std::string &target) override {
        const EngineSet &engines = bundle.manifest().engines[target];
        auto device = std::make_unique<CudaDevice>(options_.device);
        DeviceRunner::Engines opened = this->opened(bundle, engines, *device);
        return std::make_unique<DeviceRunner>(std::move(device), std::move(opened), bundle.manifest().graphs);
    }

  private:
    DeviceRunner::Engines opened(const Bundle &bundle, const EngineSet &engines, CudaDevice &device) const {
        const Entered entered(device);
        DeviceRunner::Engines result;
        for (const auto &[graph, engine] : engines.graphs) {
            const std::string &sha256 = bundle.manifest().files[engine.file].sha256;
            check_trust(bundle.path(engine.file), sha256);
            result[graph] = flavour_.open({graph, bundle.manifest().graphs[graph], bundle.read(engine.file), sha256,
                                           is_open(engines.required(flavour_.module)), engines.weight_streaming_budget,
                                           options_.cache},
                                          device);
        }
        return result;
    }

    void check(const EngineSet &engines) const {
        const std::string version = flavour_.version(), platform = this_platform();
        if (const std::string &there = engines.required("platform"); !there.empty() && there != platform) {
            throw Error(Kind::target, "built for " + there + ", and this is " + platform + "; " + compile_anew);
        }
        if (const std::string &there = engines.required(flavour_.module);
            !there.empty() && !is_version(version, there)) {
            throw Error(Kind::target, std::string("built for ") + flavour_.title + " " + there + ", and this is " +
                                          version + "; load that version, or " + compile_anew);
        }
        const std::string capability = compute_capability(options_.device);
        if (const std::string &there = engines.required("compute_capability");
            !there.empty() && !holds(there, capability)) {
            throw Error(Kind::target, "built for GPUs of compute capability " + there + ", and this one has " +
                                          capability + "; " + compile_anew);
        }
    }

    void check_trust(const std::string &path, const std::string &sha256) const {
        if (!options_.trust && !Record(options_.cache, trusted_record).contains(sha256)) {
            throw Error(Kind::target, path +
                                          ": a plan is native code, and this one was not built here by you. If you "
                                          "trust where it comes from, set the option trust; else " +
                                          compile_anew);
        }
    }

    const tensorrt::Flavour &flavour_;
    const Options &options_;
};

} // namespace

std::unique_ptr<Backend> make_tensorrt(const tensorrt::Flavour &flavour, const Options &options) {
    return std::make_unique<TensorRt>(flavour, options);
}

} // namespace glance_trt
