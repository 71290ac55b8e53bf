// The inputs and outputs of an engine, against what the manifest says of them.
#pragma once

#include "onnxruntime/library.hpp"
#include "schema.hpp"

#include <string>
#include <vector>

namespace glance_trt::onnxruntime {

struct EnginePort {
    std::string name, dtype;
};

/// A dtype of the manifest for a type of ONNX, and the other way round.
std::string dtype_of(ONNXTensorElementDataType type);
ONNXTensorElementDataType type_of(const std::string &dtype);

/// Throws `Failure`.
std::vector<EnginePort> inputs_of(const Library &library, const OrtSession *session);
std::vector<EnginePort> outputs_of(const Library &library, const OrtSession *session);

/// An engine has the ports that the manifest lists, and takes nothing more. Throws `Error` of the kind bundle, which
/// starts with `file`.
void check_ports(const std::string &file, const Graph &graph, const std::vector<EnginePort> &inputs,
                 const std::vector<EnginePort> &outputs);

} // namespace glance_trt::onnxruntime
