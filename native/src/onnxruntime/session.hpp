// An engine of ONNX Runtime: one graph, loaded.
#pragma once

#include "onnxruntime/library.hpp"
#include "onnxruntime/ports.hpp"
#include "progress.hpp"
#include "schema.hpp"
#include "tensor.hpp"

#include <memory>
#include <string>
#include <vector>

namespace glance_trt::onnxruntime {

/// How a session is opened.
struct SessionOptions {
    std::string provider;        // empty: the CPU's, for graphs that were optimised for it
    std::string folder;          // where the weights lie
    int threads = 0, device = 0; // 0 threads: as many as there are cores
    Log log;
};

/// May be used from several threads at once.
class Session {
  public:
    /// name: the graph's, for errors. file: the engine's, with its content. Throws `Error` of the kind bundle where
    /// ONNX Runtime cannot load it, or where it has not the graph's ports.
    Session(std::shared_ptr<const Library> library, std::string name, const Graph &graph, std::string file,
            std::string content, const SessionOptions &options);
    Session(const Session &) = delete; // ONNX Runtime knows the place of `log_`
    Session &operator=(const Session &) = delete;

    /// The graph's outputs. Throws `Error`: of the kind input where an input does not fit, of the kind target where the
    /// engine fails.
    Tensors run(const Tensors &inputs) const;
    /// What the engine's builder wrote into it; empty where it wrote nothing of that name.
    std::string metadata(const std::string &key) const;

  private:
    Owned<OrtValue> value(const Tensor &tensor) const;
    Tensor tensor(OrtValue *value) const;
    std::vector<Owned<OrtValue>> evaluate(const std::vector<Owned<OrtValue>> &inputs) const;

    std::shared_ptr<const Library> library_;
    std::string name_, file_;
    std::vector<Port> inputs_;
    std::vector<std::string> outputs_;
    Log log_;
    Owned<OrtMemoryInfo> memory_;
    Owned<OrtRunOptions> run_options_;
    Owned<OrtSession> session_;
};

} // namespace glance_trt::onnxruntime
