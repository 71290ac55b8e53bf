#include "onnxruntime/ports.hpp"

#include "error.hpp"

#include <algorithm>
#include <array>
#include <utility>

namespace glance_trt::onnxruntime {
namespace {

const std::array<std::pair<ONNXTensorElementDataType, const char *>, 5> dtypes = {{
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "bfloat16"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "int64"},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8"},
}};

using GetCount = OrtStatus *(ORT_API_CALL *)(const OrtSession *, std::size_t *);
using GetName = OrtStatus *(ORT_API_CALL *)(const OrtSession *, std::size_t, OrtAllocator *, char **);
using GetType = OrtStatus *(ORT_API_CALL *)(const OrtSession *, std::size_t, OrtTypeInfo **);

EnginePort read_port(const Library &library, std::string name, const OrtTypeInfo *type) {
    const OrtApi &api = library.api();
    const OrtTensorTypeAndShapeInfo *info = nullptr; // part of the type
    library.check(api.CastTypeInfoToTensorInfo(type, &info));
    if (!info) {
        throw Failure("its port " + name + " is no tensor");
    }
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    library.check(api.GetTensorElementType(info, &element));
    return {std::move(name), dtype_of(element)};
}

std::vector<EnginePort> read_ports(const Library &library, const OrtSession *session, GetCount get_count,
                                   GetName get_name, GetType get_type) {
    OrtAllocator *allocator = nullptr; // the default one, which is nobody's to release
    library.check(library.api().GetAllocatorWithDefaultOptions(&allocator));
    std::size_t count = 0;
    library.check(get_count(session, &count));
    std::vector<EnginePort> ports;
    for (std::size_t i = 0; i < count; ++i) {
        char *text = nullptr;
        library.check(get_name(session, i, allocator, &text));
        std::string name = text;
        allocator->Free(allocator, text);
        Owned<OrtTypeInfo> type(library.api().ReleaseTypeInfo);
        library.check(get_type(session, i, type.out()));
        ports.push_back(read_port(library, std::move(name), type.get()));
    }
    return ports;
}

/// Each port that is listed is there, of the same dtype.
void check_listed(const std::string &file, const char *kind, const std::vector<Port> &listed,
                  const std::vector<EnginePort> &found) {
    for (const Port &port : listed) {
        const auto same = [&port](const EnginePort &other) { return other.name == port.name; };
        const auto there = std::find_if(found.begin(), found.end(), same);
        if (there == found.end()) {
            throw Error(Kind::bundle, file + ": has no " + kind + " '" + port.name +
                                          "', which the manifest lists; build the bundle again");
        }
        if (there->dtype != port.dtype) {
            throw Error(Kind::bundle, file + ": its " + kind + " '" + port.name + "' is " + there->dtype + ", and " +
                                          port.dtype + " in the manifest; build the bundle again");
        }
    }
}

} // namespace

std::string dtype_of(ONNXTensorElementDataType type) {
    for (const auto &[known, name] : dtypes) {
        if (known == type) {
            return name;
        }
    }
    return "of a type that no port has";
}

ONNXTensorElementDataType type_of(const std::string &dtype) {
    for (const auto &[type, name] : dtypes) {
        if (dtype == name) {
            return type;
        }
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

std::vector<EnginePort> inputs_of(const Library &library, const OrtSession *session) {
    const OrtApi &api = library.api();
    return read_ports(library, session, api.SessionGetInputCount, api.SessionGetInputName, api.SessionGetInputTypeInfo);
}

std::vector<EnginePort> outputs_of(const Library &library, const OrtSession *session) {
    const OrtApi &api = library.api();
    return read_ports(library, session, api.SessionGetOutputCount, api.SessionGetOutputName,
                      api.SessionGetOutputTypeInfo);
}

void check_ports(const std::string &file, const Graph &graph, const std::vector<EnginePort> &inputs,
                 const std::vector<EnginePort> &outputs) {
    check_listed(file, "input", graph.inputs, inputs);
    check_listed(file, "output", graph.outputs, outputs);
    if (inputs.size() != graph.inputs.size()) {
        throw Error(Kind::bundle, file + ": takes " + std::to_string(inputs.size()) +
                                      " inputs, and the manifest lists " + std::to_string(graph.inputs.size()) +
                                      "; build the bundle again");
    }
}

} // namespace glance_trt::onnxruntime
