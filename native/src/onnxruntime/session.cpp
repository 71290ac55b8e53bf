#include "onnxruntime/session.hpp"

#include "error.hpp"
#include "inputs.hpp"
#include "onnxruntime/shapes.hpp"

#include <array>
#include <utility>

namespace glance_trt::onnxruntime {
namespace {

void ORT_API_CALL forward(void *log, OrtLoggingLevel level, const char * /*category*/, const char * /*id*/,
                          const char * /*location*/, const char *message) {
    const auto &to = *static_cast<const Log *>(log);
    if (to) {
        to(level >= ORT_LOGGING_LEVEL_ERROR ? Level::error : Level::warning, std::string("ONNX Runtime: ") + message);
    }
}

/// The options for a graph that ONNX Runtime has optimised for the CPU when it was built. As in the Python package's
/// runner, which says why; its option enable_mem_reuse is not part of the C API.
void set_optimized(const Library &library, OrtSessionOptions *options) {
    const OrtApi &api = library.api();
    library.check(api.SetSessionGraphOptimizationLevel(options, ORT_DISABLE_ALL));
    library.check(api.DisableMemPattern(options));
    library.check(api.AddSessionConfigEntry(options, "session.force_spinning_stop", "1"));
    library.check(api.AddSessionConfigEntry(options, "session.intra_op.spin_duration_us", "100"));
}

/// float32 means float32, as in plans.
void add_cuda(const Library &library, OrtSessionOptions *options, int device) {
    const OrtApi &api = library.api();
    Owned<OrtCUDAProviderOptionsV2> cuda(api.ReleaseCUDAProviderOptions);
    library.check(api.CreateCUDAProviderOptions(cuda.out()));
    const std::string number = std::to_string(device);
    const std::array<const char *, 2> keys = {"device_id", "use_tf32"}, values = {number.c_str(), "0"};
    library.check(api.UpdateCUDAProviderOptions(cuda.get(), keys.data(), values.data(), keys.size()));
    library.check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()));
}

Owned<OrtSessionOptions> made(const Library &library, const SessionOptions &wanted, const Log &log) {
    const OrtApi &api = library.api();
    Owned<OrtSessionOptions> options(api.ReleaseSessionOptions);
    library.check(api.CreateSessionOptions(options.out()));
    library.check(api.SetUserLoggingFunction(options.get(), forward, const_cast<Log *>(&log)));
    library.check(api.SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_ERROR));
    library.check(api.SetIntraOpNumThreads(options.get(), wanted.threads));
    library.check(api.AddSessionConfigEntry(options.get(), "session.model_external_initializers_file_folder_path",
                                            wanted.folder.c_str()));
    if (wanted.provider.empty()) {
        set_optimized(library, options.get());
    } else if (wanted.provider == "CUDAExecutionProvider") {
        add_cuda(library, options.get(), wanted.device);
    }
    return options;
}

} // namespace

Session::Session(std::shared_ptr<const Library> library, std::string name, const Graph &graph, std::string file,
                 std::string content, const SessionOptions &wanted)
    : library_(std::move(library)), name_(std::move(name)), file_(std::move(file)), inputs_(graph.inputs),
      log_(wanted.log), memory_(library_->api().ReleaseMemoryInfo), run_options_(library_->api().ReleaseRunOptions),
      session_(library_->api().ReleaseSession) {
    for (const Port &port : graph.outputs) {
        outputs_.push_back(port.name);
    }
    const OrtApi &api = library_->api();
    library_->check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, memory_.out()));
    library_->check(api.CreateRunOptions(run_options_.out()));
    // Each session has its own arena; shrinking it after every run keeps the peak of a whole image at that of its
    // largest graph, for 1 to 3 % of a step's time.
    if (wanted.provider.empty()) {
        library_->check(api.AddRunConfigEntry(run_options_.get(), "memory.enable_memory_arena_shrinkage", "cpu:0"));
    }
    if (wanted.provider.empty()) {
        forget_input_shapes(content);
    }
    try {
        const Owned<OrtSessionOptions> options = made(*library_, wanted, log_);
        library_->check(api.CreateSessionFromArray(library_->environment(), content.data(), content.size(),
                                                   options.get(), session_.out()));
        check_ports(file_, graph, inputs_of(*library_, session_.get()), outputs_of(*library_, session_.get()));
    } catch (const Failure &error) {
        throw Error(Kind::bundle, file_ + ": ONNX Runtime " + library_->version() + " cannot load it: " + error.what() +
                                      ". It is damaged, or was built for another version: check it with glance-trt "
                                      "verify, or compile it anew on this machine: glance-trt compile BUNDLE --engine "
                                      "TARGET");
    }
}

Tensors Session::run(const Tensors &inputs) const {
    check_inputs(name_, inputs_, specs_of(inputs));
    try {
        std::vector<Owned<OrtValue>> values;
        for (const Port &port : inputs_) {
            values.push_back(value(inputs.at(port.name)));
        }
        const std::vector<Owned<OrtValue>> results = evaluate(values);
        Tensors outputs;
        for (std::size_t i = 0; i < results.size(); ++i) {
            outputs[outputs_[i]] = tensor(results[i].get());
        }
        return outputs;
    } catch (const Failure &error) {
        throw Error(Kind::target, name_ + ": ONNX Runtime could not run " + file_ + ": " + error.what());
    }
}

std::string Session::metadata(const std::string &key) const {
    const OrtApi &api = library_->api();
    OrtAllocator *allocator = nullptr; // the default one, which is nobody's to release
    library_->check(api.GetAllocatorWithDefaultOptions(&allocator));
    Owned<OrtModelMetadata> metadata(api.ReleaseModelMetadata);
    library_->check(api.SessionGetModelMetadata(session_.get(), metadata.out()));
    char *value = nullptr;
    library_->check(api.ModelMetadataLookupCustomMetadataMap(metadata.get(), allocator, key.c_str(), &value));
    std::string result = value ? value : "";
    allocator->Free(allocator, value);
    return result;
}

Owned<OrtValue> Session::value(const Tensor &tensor) const {
    const OrtApi &api = library_->api();
    Owned<OrtValue> result(api.ReleaseValue);
    // An input is not written to.
    library_->check(api.CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<char *>(tensor.data<char>()),
                                                       tensor.bytes(), tensor.shape().data(), tensor.shape().size(),
                                                       type_of(tensor.dtype()), result.out()));
    return result;
}

Tensor Session::tensor(OrtValue *value) const {
    const OrtApi &api = library_->api();
    Owned<OrtTensorTypeAndShapeInfo> info(api.ReleaseTensorTypeAndShapeInfo);
    library_->check(api.GetTensorTypeAndShape(value, info.out()));
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::size_t rank = 0, elements = 0;
    library_->check(api.GetTensorElementType(info.get(), &type));
    library_->check(api.GetDimensionsCount(info.get(), &rank));
    library_->check(api.GetTensorShapeElementCount(info.get(), &elements));
    Shape shape(rank);
    library_->check(api.GetDimensions(info.get(), shape.data(), rank));
    const std::string dtype = dtype_of(type);
    void *content = nullptr;
    library_->check(api.GetTensorMutableData(value, &content));
    return {dtype, std::move(shape), content, elements * element_bytes(dtype)};
}

std::vector<Owned<OrtValue>> Session::evaluate(const std::vector<Owned<OrtValue>> &inputs) const {
    std::vector<const char *> input_names, output_names;
    std::vector<const OrtValue *> values;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        input_names.push_back(inputs_[i].name.c_str());
        values.push_back(inputs[i].get());
    }
    for (const std::string &output : outputs_) {
        output_names.push_back(output.c_str());
    }
    std::vector<OrtValue *> results(outputs_.size());
    OrtStatus *status = library_->api().Run(session_.get(), run_options_.get(), input_names.data(), values.data(),
                                            values.size(), output_names.data(), output_names.size(), results.data());
    std::vector<Owned<OrtValue>> owned;
    for (OrtValue *result : results) {
        owned.emplace_back(library_->api().ReleaseValue);
        *owned.back().out() = result;
    }
    library_->check(status);
    return owned;
}

} // namespace glance_trt::onnxruntime
