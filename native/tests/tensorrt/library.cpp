// Stands in for TensorRT's library: a plan is "plan of GRAPH", and an engine computes as `fake::FakeRunner` does, in
// the stream, on memory that the stand-in for the driver has given.
#include "../fake.hpp"
#include "driver.hpp"

#include <NvInferRuntime.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>

#define STANDIN extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;
using glance_trt::Port;
using glance_trt::Shape;
using glance_trt::Tensor;
using glance_trt::Tensors;

constexpr std::size_t scratch_bytes = 4096;

const glance_trt::Manifest &manifest() {
    static const glance_trt::Manifest made = fake::manifest();
    return made;
}

/// A dimension by its name: the batch is 1 or 2, in the second profile 3 or 4; images are 4 to 32 pixels.
std::int64_t bound(const std::string &name, std::int32_t profile, OptProfileSelector select) {
    const bool least = select == OptProfileSelector::kMIN;
    return name == "b" ? 2 * profile + (least ? 1 : 2) : least ? 2 : 16;
}

class Config : public IRuntimeConfig {
  public:
    void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept override {
        own_memory = strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED;
    }
    bool own_memory = false;
#ifdef TRT_MAJOR_RTX
    class Text : public IHostMemory {
      public:
        void *data() const noexcept override { return const_cast<char *>(text); }
        std::size_t size() const noexcept override { return 7; }
        const char *text = "kernels";
    };
    class Cache : public IRuntimeCache {
      public:
        bool deserialize(void const *content, std::size_t size) noexcept override {
            return std::string(static_cast<const char *>(content), size) == "kernels";
        }
        IHostMemory *serialize() const noexcept override { return new Text; }
    };
    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy) noexcept override {}
    IRuntimeCache *createRuntimeCache() const noexcept override {
        return new Cache;
    }
    bool setRuntimeCache(IRuntimeCache const &) noexcept override {
        return true;
    }
#endif
};

class Context : public IExecutionContext {
  public:
    Context(std::string graph, bool own_memory) : graph_(std::move(graph)), own_memory_(own_memory) {}

    bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) noexcept override { return profile < 2; }
    bool setInputShape(char const *name, Dims const &dims) noexcept override {
        shapes_[name] = {dims.d, dims.d + dims.nbDims};
        return true;
    }
    std::int32_t inferShapes(std::int32_t, char const **) noexcept override {
        const glance_trt::Graph &graph = manifest().graphs[graph_];
        std::map<std::string, std::int64_t> sizes;
        for (const Port &port : graph.inputs) {
            for (std::size_t i = 0; i < port.shape.size(); ++i) {
                sizes[port.shape[i].name] = shapes_.at(port.name)[i];
                sizes["2*" + port.shape[i].name] = 2 * shapes_.at(port.name)[i];
            }
        }
        for (const Port &port : graph.outputs) {
            for (const auto &dimension : port.shape) {
                shapes_[port.name].push_back(dimension.size ? dimension.size : sizes.at(dimension.name));
            }
        }
        return 0;
    }
    Dims getTensorShape(char const *name) const noexcept override {
        Dims dims{};
        for (const std::int64_t size : shapes_.at(name)) {
            dims.d[dims.nbDims++] = size;
        }
        return dims;
    }
    std::size_t updateDeviceMemorySizeForShapes() noexcept override { return scratch_bytes; }
    void setDeviceMemoryV2(void *memory, std::int64_t size) noexcept override {
        scratch_ = size == scratch_bytes ? memory : nullptr;
    }
    bool setTensorAddress(char const *name, void *data) noexcept override {
        addresses_[name] = data;
        return reinterpret_cast<std::uintptr_t>(data) % 256 == 0;
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (!own_memory_ || !scratch_) {
            return false;
        }
        standin_enqueue(stream, [graph = graph_, shapes = shapes_, addresses = addresses_, scratch = scratch_] {
            std::memset(scratch, 0xAB, scratch_bytes);
            const glance_trt::Graph &ports = manifest().graphs[graph];
            for (const Port &port : ports.outputs) { // an engine may write before it has read all
                const glance_trt::Spec spec = {port.dtype, shapes.at(port.name)};
                std::memset(addresses.at(port.name), 0xAB, spec.bytes());
            }
            Tensors inputs;
            for (const Port &port : ports.inputs) {
                const glance_trt::Spec spec = {port.dtype, shapes.at(port.name)};
                inputs[port.name] = Tensor(spec.dtype, spec.shape, addresses.at(port.name), spec.bytes());
            }
            for (const auto &[port, output] : fake::FakeRunner().run(graph, inputs)) {
                std::memcpy(addresses.at(port), output.data<char>(), output.bytes());
            }
        });
        return true;
    }

  private:
    std::string graph_;
    bool own_memory_;
    std::map<std::string, Shape> shapes_;
    std::map<std::string, void *> addresses_;
    void *scratch_ = nullptr;
};

class Engine : public ICudaEngine {
  public:
    explicit Engine(std::string graph) : graph_(std::move(graph)) {}

    std::int32_t getNbIOTensors() const noexcept override {
        return static_cast<std::int32_t>(graph().inputs.size() + graph().outputs.size());
    }
    TensorIOMode getTensorIOMode(char const *name) const noexcept override {
        return find(graph().inputs, name)    ? TensorIOMode::kINPUT
               : find(graph().outputs, name) ? TensorIOMode::kOUTPUT
                                             : TensorIOMode::kNONE;
    }
    DataType getTensorDataType(char const *name) const noexcept override {
        const Port *input = find(graph().inputs, name);
        const std::string &dtype = (input ? input : find(graph().outputs, name))->dtype;
        return dtype == "int64" ? DataType::kINT64 : dtype == "uint8" ? DataType::kUINT8 : DataType::kFLOAT;
    }
    std::int32_t getNbOptimizationProfiles() const noexcept override { return 2; }
    Dims getProfileShape(char const *name, std::int32_t profile, OptProfileSelector select) const noexcept override {
        Dims dims{};
        for (const auto &dimension : find(graph().inputs, name)->shape) {
            dims.d[dims.nbDims++] = dimension.size ? dimension.size : bound(dimension.name, profile, select);
        }
        return dims;
    }
    std::int64_t getStreamableWeightsSize() const noexcept override { return 0; }
    std::int64_t getWeightStreamingAutomaticBudget() const noexcept override { return 0; }
    bool setWeightStreamingBudgetV2(std::int64_t) noexcept override { return false; }
    IRuntimeConfig *createRuntimeConfig() noexcept override { return new Config; }
    IExecutionContext *createExecutionContext(IRuntimeConfig *config) noexcept override {
        return new Context(graph_, static_cast<Config *>(config)->own_memory);
    }

  private:
    const glance_trt::Graph &graph() const { return manifest().graphs[graph_]; }
    static const Port *find(const std::vector<Port> &ports, const std::string &name) {
        for (const Port &port : ports) {
            if (port.name == name) {
                return &port;
            }
        }
        return nullptr;
    }

    std::string graph_;
};

class Runtime : public IRuntime {
  public:
    explicit Runtime(ILogger &logger) : logger_(logger) {}

    void setEngineHostCodeAllowed(bool) noexcept override {}
    ICudaEngine *deserializeCudaEngine(void const *plan, std::size_t size) noexcept override {
        const std::string text(static_cast<const char *>(plan), size), start = "plan of ";
        if (text.rfind(start, 0) != 0) {
            logger_.log(ILogger::Severity::kERROR, "the magic tag is missing");
            return nullptr;
        }
        return new Engine(text.substr(start.size()));
    }

  private:
    ILogger &logger_;
};

} // namespace

STANDIN std::int32_t getInferLibMajorVersion() noexcept {
    return 10;
}
STANDIN std::int32_t getInferLibMinorVersion() noexcept {
    return 13;
}
STANDIN std::int32_t getInferLibPatchVersion() noexcept {
    return 3;
}
STANDIN std::int32_t getInferLibBuildVersion() noexcept {
    return 9;
}
STANDIN void *createInferRuntime_INTERNAL(void *logger, std::int32_t version) noexcept {
    return version == 101300 ? new Runtime(*static_cast<ILogger *>(logger)) : nullptr;
}
