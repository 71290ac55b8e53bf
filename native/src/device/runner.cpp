#include "device/runner.hpp"

#include "error.hpp"
#include "inputs.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace glance_trt {
namespace {

constexpr std::size_t alignment = 256;    // bytes; of CUDA's own allocations, and what TensorRT asks of every address
constexpr std::size_t most_bindings = 64; // one for each graph and shapes in use, some megabytes each

std::size_t aligned(std::size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
}

/// Values one behind the other in one block.
class Line {
  public:
    std::size_t add(std::size_t bytes) {
        const std::size_t place = end_;
        end_ += aligned(bytes);
        return place;
    }
    std::size_t end() const { return end_; }

  private:
    std::size_t end_ = 0;
};

/// Waits for a device however the scope is left, since what it works on is used again.
class Settled {
  public:
    explicit Settled(Device &device) : device_(device) {}
    ~Settled() {
        try {
            device_.synchronize();
        } catch (const Error &) { // another error is under way, or the next call meets this one again
        }
    }
    Settled(const Settled &) = delete;
    Settled &operator=(const Settled &) = delete;

  private:
    Device &device_;
};

char *host(Address address) {
    return static_cast<char *>(pointer(address));
}

} // namespace

Memory::~Memory() {
    if (address_) {
        device_.free(place_, address_);
    }
}

Address Memory::reserve(std::size_t bytes) {
    if (bytes > bytes_) {
        device_.synchronize();
        if (address_) {
            device_.free(place_, std::exchange(address_, 0));
            bytes_ = 0;
        }
        address_ = device_.allocate(place_, bytes);
        bytes_ = bytes;
    }
    return address_;
}

struct DeviceRunner::State {
    State(Device &device, Engines opened)
        : engines(std::move(opened)), values(device, Place::device), scratch(device, Place::device),
          sent(device, Place::pinned), returned(device, Place::pinned) {}

    Engines engines;
    std::map<std::pair<std::string, std::map<std::string, Shape>>, std::unique_ptr<Binding>> bindings;
    Memory values, scratch, sent, returned;
};

/// A chain over inputs of certain shapes, and where everything lies.
class DeviceRunner::Program {
  public:
    Program(const DeviceRunner &runner, const Tensors &given) : runner_(runner), state_(*runner.state_) {
        if (state_.bindings.size() > most_bindings) {
            state_.bindings.clear();
        }
        for (const auto &[name, tensor] : given) {
            specs_[name] = tensor.spec();
            slots_[name] = {line_.add(tensor.bytes()), tensor.bytes()};
        }
        given_slots_ = slots_;
        given_ = line_.end();
    }

    /// One more run of a graph.
    void add(const Call &call) {
        const Graph &graph = runner_.graphs_[call.graph];
        Specs inputs;
        std::map<std::string, Shape> shapes;
        Run run;
        for (const auto &[port, value] : call.inputs) {
            inputs[port] = specs_.at(value);
            shapes[port] = inputs[port].shape;
            run.places[port] = slots_.at(value).place;
        }
        check_inputs(call.graph, graph.inputs, inputs);
        auto &binding = state_.bindings[{call.graph, shapes}];
        if (!binding) {
            binding = state_.engines.at(call.graph)->bind(shapes);
        }
        run.binding = binding.get();
        scratch_ = std::max(scratch_, binding->scratch());
        for (const auto &[port, spec] : binding->outputs()) {
            const std::string value = port == call.port ? call.value : call.graph + "." + port;
            specs_[value] = spec;
            run.places[port] = place_for(value, spec.bytes());
        }
        runs_.push_back(std::move(run));
    }

    /// Run all, and tell of each call when it is done.
    void execute(const Tensors &given, const std::vector<Call> &calls, const Watch &watch) {
        Device &device = *runner_.device_;
        const Address values = state_.values.reserve(line_.end()), scratch = state_.scratch.reserve(scratch_);
        const Address sent = state_.sent.reserve(given_);
        for (const auto &[name, tensor] : given) {
            std::memcpy(host(sent) + given_slots_.at(name).place, tensor.data<char>(), tensor.bytes());
        }
        device.copy(values, sent, given_);
        for (std::size_t i = 0; i < runs_.size(); ++i) {
            std::map<std::string, Address> places;
            for (const auto &[port, place] : runs_[i].places) {
                places[port] = values + place;
            }
            runs_[i].binding->enqueue(places, scratch);
            device.mark(i % 2);
            if (i > 0) { // so that there is always work in the stream, and one can still end it after a step
                device.wait((i - 1) % 2);
                watch(calls[i - 1]);
            }
        }
        device.synchronize();
        watch(calls.back());
    }

    /// Values as the last call has left them.
    Tensors read(const std::vector<std::string> &names) {
        Line line;
        std::map<std::string, std::size_t> places;
        for (const std::string &name : names) {
            places[name] = line.add(specs_.at(name).bytes());
        }
        const Address returned = state_.returned.reserve(line.end()), values = state_.values.reserve(0);
        for (const auto &[name, place] : places) {
            runner_.device_->copy(returned + place, values + slots_.at(name).place, specs_.at(name).bytes());
        }
        runner_.device_->synchronize();
        Tensors tensors;
        for (const auto &[name, place] : places) {
            const Spec &spec = specs_.at(name);
            tensors[name] = Tensor(spec.dtype, spec.shape, host(returned) + place, spec.bytes());
        }
        return tensors;
    }

  private:
    struct Run {
        Binding *binding = nullptr;
        std::map<std::string, std::size_t> places; // by port
    };

    struct Slot {
        std::size_t place = 0, bytes = 0;
    };
    using Slots = std::map<std::string, Slot>;

    /// Of a value that is put out: not where it lies now, which the call may read, but where it lay before that.
    std::size_t place_for(const std::string &value, std::size_t bytes) {
        Slot slot = spare_[value];
        if (slot.bytes < bytes) {
            slot = {line_.add(bytes), bytes};
        }
        spare_[value] = std::exchange(slots_[value], slot);
        return slot.place;
    }

    const DeviceRunner &runner_;
    State &state_;
    Line line_;
    Specs specs_;
    Slots slots_, given_slots_, spare_;
    std::size_t given_ = 0, scratch_ = 0;
    std::vector<Run> runs_;
};

DeviceRunner::DeviceRunner(std::unique_ptr<Device> device, Engines engines, Named<Graph> graphs)
    : device_(std::move(device)), graphs_(std::move(graphs)),
      state_(std::make_unique<State>(*device_, std::move(engines))) {}

DeviceRunner::~DeviceRunner() {
    try {
        const Entered entered(*device_);
        state_.reset();
    } catch (const Error &) { // of a driver that has gone
        static_cast<void>(state_.release());
    }
}

Tensors DeviceRunner::run(const std::string &graph, const Tensors &inputs) const {
    Call call = {graph, {}, "", ""};
    for (const auto &[port, tensor] : inputs) {
        call.inputs.emplace_back(port, port);
    }
    std::vector<std::string> names;
    for (const Port &port : graphs_[graph].outputs) {
        names.push_back(graph + "." + port.name);
    }
    const Tensors found = run({call}, inputs, names, [](const Call &) {});
    Tensors outputs;
    for (const Port &port : graphs_[graph].outputs) {
        outputs[port.name] = found.at(graph + "." + port.name);
    }
    return outputs;
}

Tensor DeviceRunner::chain(const std::vector<Call> &calls, Tensors values, const Watch &watch) const {
    const std::string &last = calls.back().value;
    return run(calls, values, {last}, watch).at(last);
}

Tensors DeviceRunner::run(const std::vector<Call> &calls, const Tensors &given, const std::vector<std::string> &wanted,
                          const Watch &watch) const {
    const std::lock_guard<std::mutex> turn(turn_);
    const Entered entered(*device_);
    const Settled settled(*device_);
    Program program(*this, given);
    for (const Call &call : calls) {
        program.add(call);
    }
    program.execute(given, calls, watch);
    return program.read(wanted);
}

} // namespace glance_trt
