// Compiled once against each header that CMake finds. It renames the namespace nvinfer1, so that what the two headers
// define inline can be in one library.
#include "tensorrt/flavour.hpp"

#include "error.hpp"
#include "records.hpp"
#include "text.hpp"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include <dlfcn.h>

// The header's own createInferRuntime, which knows the version to ask for, calls the function below in place of the
// library's, which is loaded at run time.
#define createInferRuntime_INTERNAL GLANCE_CREATE_RUNTIME
#include <NvInferRuntime.h>

namespace glance_trt::tensorrt {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr const char *title = "TensorRT-RTX";
constexpr const char *library_stem = "libtensorrt_rtx.so.";
constexpr int library_major = TRT_MAJOR_RTX;
#else
constexpr const char *title = "TensorRT";
constexpr const char *library_stem = "libnvinfer.so.";
constexpr int library_major = NV_TENSORRT_MAJOR;
#endif

/// A function of the library; null where there is none, or no library.
template <class Function>
Function *symbol(const char *name) {
    const std::string file = library_stem + std::to_string(library_major);
    void *library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    return library ? reinterpret_cast<Function *>(dlsym(library, name)) : nullptr;
}

std::string version() {
    std::string text;
    for (const char *part : {"Major", "Minor", "Patch", "Build"}) {
        const std::string name = std::string("getInferLib") + part + "Version";
        const auto ask = symbol<std::int32_t()>(name.c_str());
        if (!ask) {
            const char *reason = dlerror();
            throw Error(Kind::target, std::string(title) + " cannot be loaded: " + (reason ? reason : name) +
                                          "; put the folder of its libraries into LD_LIBRARY_PATH");
        }
        text += (text.empty() ? "" : ".") + std::to_string(ask());
    }
    return text;
}

std::string dtype_of(nvinfer1::DataType type) {
    switch (type) {
    case nvinfer1::DataType::kFLOAT:
        return "float32";
    case nvinfer1::DataType::kHALF:
        return "float16";
    case nvinfer1::DataType::kBF16:
        return "bfloat16";
    case nvinfer1::DataType::kINT64:
        return "int64";
    case nvinfer1::DataType::kUINT8:
        return "uint8";
    default:
        return "a dtype of number " + std::to_string(static_cast<int>(type));
    }
}

nvinfer1::Dims dims_of(const Shape &shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy_n(shape.begin(), std::min<std::size_t>(shape.size(), nvinfer1::Dims::MAX_DIMS), dims.d);
    return dims;
}

Shape shape_of(const nvinfer1::Dims &dims) {
    return {dims.d, dims.d + std::max(0, dims.nbDims)};
}

/// The sizes that one optimization profile takes of an input.
struct Range {
    Shape smallest, largest;

    bool holds(const Shape &shape) const {
        bool fits = shape.size() == smallest.size();
        for (std::size_t i = 0; fits && i < shape.size(); ++i) {
            fits = smallest[i] <= shape[i] && shape[i] <= largest[i];
        }
        return fits;
    }

    std::string text() const {
        std::string sizes;
        for (std::size_t i = 0; i < smallest.size(); ++i) {
            sizes += (i ? "," : "") + std::to_string(smallest[i]);
            sizes += smallest[i] == largest[i] ? "" : ".." + std::to_string(largest[i]);
        }
        return "(" + sizes + ")";
    }
};

/// Keeps the last error instead of printing.
class Log : public nvinfer1::ILogger {
  public:
    void log(Severity severity, nvinfer1::AsciiChar const *message) noexcept override {
        if (severity <= Severity::kERROR) {
            try {
                const std::lock_guard<std::mutex> lock(writing_);
                last_ = message;
            } catch (...) { // no memory for it
            }
        }
    }
    std::string last() const {
        const std::lock_guard<std::mutex> lock(writing_);
        return last_;
    }

  private:
    mutable std::mutex writing_;
    std::string last_ = "it gives no reason";
};

class TensorRtBinding : public Binding {
  public:
    TensorRtBinding(std::string name, std::unique_ptr<nvinfer1::IExecutionContext> context, Specs outputs,
                    std::size_t scratch, const CudaDevice &device, const Log &log)
        : name_(std::move(name)), context_(std::move(context)), outputs_(std::move(outputs)), scratch_(scratch),
          device_(device), log_(log) {}

    const Specs &outputs() const override { return outputs_; }
    std::size_t scratch() const override { return scratch_; }

    void enqueue(const std::map<std::string, Address> &places, Address scratch) override {
        bool placed = true;
        for (const auto &[port, place] : places) {
            placed = context_->setTensorAddress(port.c_str(), pointer(place)) && placed;
        }
        context_->setDeviceMemoryV2(pointer(scratch), static_cast<std::int64_t>(scratch_));
        if (!placed || !context_->enqueueV3(static_cast<cudaStream_t>(device_.stream()))) {
            throw Error(Kind::target, name_ + ": could not run: " + log_.last());
        }
    }

  private:
    std::string name_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Specs outputs_;
    std::size_t scratch_;
    const CudaDevice &device_;
    const Log &log_;
};

#ifdef TRT_MAJOR_RTX
/// A file in the cache folder for the kernels that were compiled for one plan, for the next process.
class RuntimeCache {
  public:
    RuntimeCache(nvinfer1::IRuntimeConfig &config, const Plan &plan)
        : folder_(plan.cache), file_("runtime-cache/" + plan.sha256 + ".bin"), cache_(config.createRuntimeCache()) {
        if (!cache_) {
            return;
        }
        // What another version or another GPU wrote is refused by TensorRT-RTX itself, and made anew.
        if (const std::string kept = read_cached(folder_, file_); !kept.empty()) {
            cache_->deserialize(kept.data(), kept.size());
        }
        config.setRuntimeCache(*cache_);
    }
    ~RuntimeCache() {
        try {
            const std::unique_ptr<nvinfer1::IHostMemory> content(cache_ ? cache_->serialize() : nullptr);
            if (content) {
                write_cached(folder_, file_, {static_cast<const char *>(content->data()), content->size()});
            }
        } catch (const std::exception &) { // it only saves the next process its time
        }
    }
    RuntimeCache(const RuntimeCache &) = delete;
    RuntimeCache &operator=(const RuntimeCache &) = delete;

  private:
    std::optional<std::string> folder_;
    std::string file_;
    std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
};
#endif

class TensorRtEngine : public DeviceEngine {
  public:
    TensorRtEngine(const Plan &plan, CudaDevice &device)
        : name_(plan.name), device_(device), runtime_(nvinfer1::createInferRuntime(log_)) {
        if (!runtime_) {
            throw Error(Kind::target, name_ + ": " + title + " " + version() + " does not start: " + log_.last());
        }
        runtime_->setEngineHostCodeAllowed(plan.version_compatible);
        engine_.reset(runtime_->deserializeCudaEngine(plan.content.data(), plan.content.size()));
        if (!engine_) {
            throw Error(Kind::target, name_ + ": " + title + " " + version() + " cannot open its plan: " + log_.last());
        }
        check_ports(plan.graph.inputs, nvinfer1::TensorIOMode::kINPUT);
        check_ports(plan.graph.outputs, nvinfer1::TensorIOMode::kOUTPUT);
        if (static_cast<std::size_t>(engine_->getNbIOTensors()) !=
            plan.graph.inputs.size() + plan.graph.outputs.size()) {
            throw Error(Kind::bundle, name_ + ": its plan has other ports than the manifest; build the bundle again");
        }
        if (engine_->getStreamableWeightsSize() > 0) {
            engine_->setWeightStreamingBudgetV2(plan.weight_streaming_budget
                                                    ? *plan.weight_streaming_budget << 20
                                                    : engine_->getWeightStreamingAutomaticBudget());
        }
        config_.reset(engine_->createRuntimeConfig());
        if (!config_) {
            throw Error(Kind::target, name_ + ": no configuration: " + log_.last());
        }
        config_->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#ifdef TRT_MAJOR_RTX
        // By default a kernel for the shapes at hand is compiled in the background while a slower one runs.
        config_->setDynamicShapesKernelSpecializationStrategy(
            nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
        cache_ = std::make_unique<RuntimeCache>(*config_, plan);
#endif
    }

    std::unique_ptr<Binding> bind(const std::map<std::string, Shape> &inputs) override {
        const std::int32_t profile = profile_for(inputs);
        std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext(config_.get()));
        if (!context) {
            throw Error(Kind::target, name_ + ": no execution context: " + log_.last());
        }
        if (!context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(device_.stream()))) {
            throw Error(Kind::target,
                        name_ + ": optimization profile " + std::to_string(profile) + " cannot be set: " + log_.last());
        }
        for (const auto &[port, shape] : inputs) {
            if (!context->setInputShape(port.c_str(), dims_of(shape))) {
                throw Error(Kind::input, name_ + ": " + port + " " + shown(shape) + " is refused: " + log_.last());
            }
        }
        const char *unknown = nullptr;
        if (context->inferShapes(1, &unknown) != 0) {
            throw Error(Kind::target,
                        name_ + ": no shape for " + (unknown ? unknown : "an output") + ": " + log_.last());
        }
        Specs outputs;
        for (const std::string &port : outputs_) {
            outputs[port] = {dtype_of(engine_->getTensorDataType(port.c_str())),
                             shape_of(context->getTensorShape(port.c_str()))};
        }
        const std::size_t scratch = context->updateDeviceMemorySizeForShapes();
        return std::make_unique<TensorRtBinding>(name_, std::move(context), std::move(outputs), scratch, device_, log_);
    }

  private:
    void check_ports(const std::vector<Port> &ports, nvinfer1::TensorIOMode mode) {
        for (const Port &port : ports) {
            const char *name = port.name.c_str();
            if (engine_->getTensorIOMode(name) != mode) {
                throw Error(Kind::bundle, name_ + ": its plan has no " +
                                              (mode == nvinfer1::TensorIOMode::kINPUT ? "input " : "output ") +
                                              port.name + "; build the bundle again");
            }
            if (const std::string dtype = dtype_of(engine_->getTensorDataType(name)); dtype != port.dtype) {
                throw Error(Kind::bundle, name_ + ": its plan has " + port.name + " in " + dtype +
                                              ", and the manifest in " + port.dtype + "; build the bundle again");
            }
            if (mode == nvinfer1::TensorIOMode::kOUTPUT) {
                outputs_.push_back(port.name);
            }
        }
    }

    /// The first optimization profile that takes these shapes.
    std::int32_t profile_for(const std::map<std::string, Shape> &inputs) const {
        const std::int32_t profiles = engine_->getNbOptimizationProfiles();
        for (std::int32_t profile = 0; profile < profiles; ++profile) {
            if (std::all_of(inputs.begin(), inputs.end(),
                            [&](const auto &input) { return range(input.first, profile).holds(input.second); })) {
                return profile;
            }
        }
        for (const auto &[port, shape] : inputs) {
            std::vector<std::string> takes;
            bool fits = false;
            for (std::int32_t profile = 0; profile < profiles; ++profile) {
                const Range sizes = range(port, profile);
                fits = fits || sizes.holds(shape);
                if (std::find(takes.begin(), takes.end(), sizes.text()) == takes.end()) {
                    takes.push_back(sizes.text());
                }
            }
            if (!fits) {
                throw Error(Kind::input, name_ + ": got " + port + " " + shown(shape) + "; this engine takes " +
                                             joined(takes, " or ") +
                                             ". Stay within, or build with the ranges that you need");
            }
        }
        throw Error(Kind::input, name_ + ": none of its optimization profiles takes these shapes together. Build with "
                                         "the ranges that you need");
    }

    Range range(const std::string &port, std::int32_t profile) const {
        const auto sizes = [&](nvinfer1::OptProfileSelector selector) {
            return shape_of(engine_->getProfileShape(port.c_str(), profile, selector));
        };
        return {sizes(nvinfer1::OptProfileSelector::kMIN), sizes(nvinfer1::OptProfileSelector::kMAX)};
    }

    std::string name_;
    CudaDevice &device_;
    // In this order: each uses the one before it.
    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#ifdef TRT_MAJOR_RTX
    std::unique_ptr<RuntimeCache> cache_;
#endif
    std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
    std::vector<std::string> outputs_;
};

std::unique_ptr<DeviceEngine> open(const Plan &plan, CudaDevice &device) {
    return std::make_unique<TensorRtEngine>(plan, device);
}

} // namespace

#ifdef TRT_MAJOR_RTX
const Flavour tensorrt_rtx = {"tensorrt-rtx", title, "tensorrt_rtx", version, open};
#else
const Flavour tensorrt = {"tensorrt", title, "tensorrt", version, open};
#endif

} // namespace glance_trt::tensorrt

extern "C" void *createInferRuntime_INTERNAL(void *logger, std::int32_t version) noexcept {
    const auto create = glance_trt::tensorrt::symbol<void *(void *, std::int32_t)>("createInferRuntime_INTERNAL");
    return create ? create(logger, version) : nullptr;
}
