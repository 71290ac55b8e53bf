// A device whose memory is not the host's, and the engines on it, as protocols: the tests run chains over them on the
// host.
#pragma once

#include "tensor.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace glance_trt {

/// Of memory of the device, or of the host's that its copies can run from.
using Address = std::uint64_t;

inline void *pointer(Address address) {
    return reinterpret_cast<void *>(static_cast<std::uintptr_t>(address));
}

enum class Place { device, pinned };

/// A device and one stream on it. What is put into the stream runs later, in that order. Throws `Error` of the kind
/// target.
class Device {
  public:
    virtual ~Device() = default;

    /// Make it the calling thread's until `leave`. All other functions are called in between.
    virtual void enter() = 0;
    virtual void leave() noexcept = 0;

    virtual Address allocate(Place place, std::size_t bytes) = 0;
    virtual void free(Place place, Address address) noexcept = 0;

    /// Put a copy into the stream, between any two addresses.
    virtual void copy(Address to, Address from, std::size_t bytes) = 0;
    /// Put a mark into the stream, number 0 or 1; the one that had the number before is gone.
    virtual void mark(std::size_t number) = 0;
    /// Wait until the stream has come to a mark.
    virtual void wait(std::size_t number) = 0;
    virtual void synchronize() = 0;
};

/// A device that is the calling thread's.
class Entered {
  public:
    explicit Entered(Device &device) : device_(device) { device.enter(); }
    ~Entered() { device_.leave(); }
    Entered(const Entered &) = delete;
    Entered &operator=(const Entered &) = delete;

  private:
    Device &device_;
};

/// An engine made ready for inputs of certain shapes.
class Binding {
  public:
    virtual ~Binding() = default;

    /// What it puts out.
    virtual const Specs &outputs() const = 0;
    /// Bytes of memory that it needs while it runs.
    virtual std::size_t scratch() const = 0;
    /// Put one run into the stream, with the addresses of its inputs and outputs, and of the scratch memory.
    virtual void enqueue(const std::map<std::string, Address> &places, Address scratch) = 0;
};

/// An engine of a device that outlives it.
class DeviceEngine {
  public:
    virtual ~DeviceEngine() = default;

    /// Throws `Error` of the kind input for shapes that it does not take.
    virtual std::unique_ptr<Binding> bind(const std::map<std::string, Shape> &inputs) = 0;
};

} // namespace glance_trt
