// What a backend is: something that opens a target's engines, and runs graphs with them.
//
// A backend for engines on a device overrides `Runner::chain`, to leave what is between the calls on it.
#pragma once

#include "bundle.hpp"
#include "options.hpp"
#include "tensor.hpp"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace glance_trt {

/// What to do with engines that were built for something else.
constexpr const char *compile_anew = "compile it anew on this machine: glance-trt compile BUNDLE --engine TARGET";

/// One run of a graph: its ports, with the names of the values that they take, and of the one that its first output
/// gives.
struct Call {
    std::string graph;
    std::vector<std::pair<std::string, std::string>> inputs;
    std::string port, value;
};

/// Told of each call of a chain that is done; throws to end the chain.
using Watch = std::function<void(const Call &call)>;

/// Runs the graphs of one target. May be used from several threads at once.
class Runner {
  public:
    virtual ~Runner() = default;

    /// Run a graph; inputs and outputs are by their ports' names. Throws `Error` where an input does not fit, and where
    /// the engine fails.
    virtual Tensors run(const std::string &graph, const Tensors &inputs) const = 0;
    /// Run calls one after the other, each on the values that were given and those of the calls before. Gives the last
    /// one's.
    virtual Tensor chain(const std::vector<Call> &calls, Tensors values, const Watch &watch) const;
};

/// What opens engines of some kind. For one thread.
class Backend {
  public:
    virtual ~Backend() = default;

    /// Why this machine cannot run engines of a target, and what can be done; empty if it can.
    virtual std::optional<std::string> unrunnable(const EngineSet &engines) = 0;
    /// Open all engines of a target whose files have been checked.
    virtual std::unique_ptr<Runner> open(const Bundle &bundle, const std::string &target) = 0;
};

/// A target of a bundle that was opened.
struct Opened {
    std::string target;
    std::unique_ptr<Runner> runner;
};

/// Check the files of the target that is asked for, or else of the first that runs here, and open its engines.
Opened open_target(const Bundle &bundle, const Options &options);

} // namespace glance_trt
