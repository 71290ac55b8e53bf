// What a graph is fed, against what the manifest says of it.
#pragma once

#include "schema.hpp"
#include "tensor.hpp"

#include <string>
#include <vector>

namespace glance_trt {

/// Values fit a graph's inputs. Throws `Error` of the kind input, which starts with the graph's name.
void check_inputs(const std::string &graph, const std::vector<Port> &ports, const Specs &values);

} // namespace glance_trt
