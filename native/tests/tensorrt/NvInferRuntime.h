// Stands in for the header of TensorRT, or where TRT_MAJOR_RTX is defined for that of TensorRT-RTX: their interface as
// far as src/tensorrt uses it, without their layout. So what is compiled against it runs with library.cpp alone, which
// computes on the host. It shows that the backend is right as far as it goes, and nothing of TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st *;

#ifndef TRT_MAJOR_RTX
#define NV_TENSORRT_MAJOR 10
#endif

namespace nvinfer1 {

using AsciiChar = char;

struct Dims {
    static constexpr std::int32_t MAX_DIMS = 8;
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kUINT8 = 5, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC = 0, kUSER_MANAGED = 2 };

class ILogger {
  public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
    virtual void log(Severity severity, AsciiChar const *message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IHostMemory {
  public:
    virtual ~IHostMemory() noexcept = default;
    virtual void *data() const noexcept = 0;
    virtual std::size_t size() const noexcept = 0;
};

#ifdef TRT_MAJOR_RTX
enum class DynamicShapesKernelSpecializationStrategy : std::int32_t { kLAZY = 0, kEAGER = 1 };

class IRuntimeCache {
  public:
    virtual ~IRuntimeCache() noexcept = default;
    virtual bool deserialize(void const *content, std::size_t size) noexcept = 0;
    virtual IHostMemory *serialize() const noexcept = 0;
};
#endif

class IRuntimeConfig {
  public:
    virtual ~IRuntimeConfig() noexcept = default;
    virtual void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept = 0;
#ifdef TRT_MAJOR_RTX
    virtual void
    setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;
    virtual IRuntimeCache *createRuntimeCache() const noexcept = 0;
    virtual bool setRuntimeCache(IRuntimeCache const &cache) noexcept = 0;
#endif
};

class IExecutionContext {
  public:
    virtual ~IExecutionContext() noexcept = default;
    virtual bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept = 0;
    virtual bool setInputShape(char const *name, Dims const &dims) noexcept = 0;
    virtual std::int32_t inferShapes(std::int32_t count, char const **names) noexcept = 0;
    virtual Dims getTensorShape(char const *name) const noexcept = 0;
    virtual std::size_t updateDeviceMemorySizeForShapes() noexcept = 0;
    virtual void setDeviceMemoryV2(void *memory, std::int64_t size) noexcept = 0;
    virtual bool setTensorAddress(char const *name, void *data) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
  public:
    virtual ~ICudaEngine() noexcept = default;
    virtual std::int32_t getNbIOTensors() const noexcept = 0;
    virtual TensorIOMode getTensorIOMode(char const *name) const noexcept = 0;
    virtual DataType getTensorDataType(char const *name) const noexcept = 0;
    virtual std::int32_t getNbOptimizationProfiles() const noexcept = 0;
    virtual Dims getProfileShape(char const *name, std::int32_t profile, OptProfileSelector select) const noexcept = 0;
    virtual std::int64_t getStreamableWeightsSize() const noexcept = 0;
    virtual std::int64_t getWeightStreamingAutomaticBudget() const noexcept = 0;
    virtual bool setWeightStreamingBudgetV2(std::int64_t budget) noexcept = 0;
    virtual IRuntimeConfig *createRuntimeConfig() noexcept = 0;
    virtual IExecutionContext *createExecutionContext(IRuntimeConfig *config) noexcept = 0;
};

class IRuntime {
  public:
    virtual ~IRuntime() noexcept = default;
    virtual void setEngineHostCodeAllowed(bool allowed) noexcept = 0;
    virtual ICudaEngine *deserializeCudaEngine(void const *plan, std::size_t size) noexcept = 0;
};

} // namespace nvinfer1

extern "C" void *createInferRuntime_INTERNAL(void *logger, std::int32_t version) noexcept;

namespace nvinfer1 {
namespace {

inline IRuntime *createInferRuntime(ILogger &logger) noexcept {
    return static_cast<IRuntime *>(createInferRuntime_INTERNAL(&logger, 101300));
}

} // namespace
} // namespace nvinfer1
