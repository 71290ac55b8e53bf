// A CUDA device, through the driver alone, which is loaded at run time: it is where a GPU is.
#pragma once

#include "device/device.hpp"

#include <array>
#include <memory>
#include <string>

namespace glance_trt {

class CudaDriver;

/// Of a GPU, such as "8.9". Throws `Error` of the kind target where there is no driver or no such GPU.
std::string compute_capability(int ordinal);

class CudaDevice : public Device {
  public:
    /// ordinal: of the GPU, as CUDA counts those that it sees. Throws as above.
    explicit CudaDevice(int ordinal);
    ~CudaDevice() override;

    /// The handle of its stream.
    void *stream() const { return stream_; }

    void enter() override;
    void leave() noexcept override;
    Address allocate(Place place, std::size_t bytes) override;
    void free(Place place, Address address) noexcept override;
    void copy(Address to, Address from, std::size_t bytes) override;
    void mark(std::size_t number) override;
    void wait(std::size_t number) override;
    void synchronize() override;

  private:
    void check(const char *function, int code) const;

    const std::shared_ptr<const CudaDriver> driver_;
    int ordinal_, device_ = 0;
    void *context_ = nullptr, *stream_ = nullptr;
    std::array<void *, 2> marks_{};
};

} // namespace glance_trt
