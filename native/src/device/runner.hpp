// Runs chains of engines on a device: what an image needs goes there in one copy, the result comes back in one, and
// between them everything stays there.
#pragma once

#include "device/device.hpp"
#include "engine.hpp"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace glance_trt {

/// Memory that grows where more is asked for, and then loses its content.
class Memory {
  public:
    Memory(Device &device, Place place) : device_(device), place_(place) {}
    ~Memory();
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    Address reserve(std::size_t bytes);

  private:
    Device &device_;
    Place place_;
    Address address_ = 0;
    std::size_t bytes_ = 0;
};

/// Calls from several threads take turns, so that engines share one block of scratch memory.
class DeviceRunner : public Runner {
  public:
    using Engines = std::map<std::string, std::unique_ptr<DeviceEngine>>;

    /// engines: by graph, made while the device was the thread's. graphs: the manifest's.
    DeviceRunner(std::unique_ptr<Device> device, Engines engines, Named<Graph> graphs);
    ~DeviceRunner() override;

    Tensors run(const std::string &graph, const Tensors &inputs) const override;
    Tensor chain(const std::vector<Call> &calls, Tensors values, const Watch &watch) const override;

  private:
    struct State;
    class Program;

    /// The wanted values after the last call.
    Tensors run(const std::vector<Call> &calls, const Tensors &given, const std::vector<std::string> &wanted,
                const Watch &watch) const;

    const std::unique_ptr<Device> device_;
    const Named<Graph> graphs_;
    std::unique_ptr<State> state_;
    mutable std::mutex turn_;
};

} // namespace glance_trt
