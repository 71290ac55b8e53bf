// Edits of ONNX models, which are protocol buffers.
#pragma once

#include <string>

namespace glance_trt::onnxruntime {

/// Leaves the shapes of a model's inputs out, in place. What is no model stays as it is.
///
/// ONNX Runtime 1.31 plans the reuse of buffers by comparing the symbolic shapes of all of them as text, which is most
/// of the time that it takes to open a step of a thousand nodes, and saves no memory that its arena does not save.
/// Python's option to leave that out, enable_mem_reuse, is not part of the C API, but where the shapes of the inputs
/// are not known, few others are, and there is nothing to compare. Graphs that are optimised already compute the same
/// without.
void forget_input_shapes(std::string &model);

} // namespace glance_trt::onnxruntime
