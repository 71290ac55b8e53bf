// Stands in for the CUDA driver, libcuda.so.1: a device of compute capability 8.9 whose memory is the host's, and
// whose streams are as lazy as can be. What is put into one runs when it is waited for, so that what is freed or
// overwritten too early shows.
#include "driver.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#define STANDIN extern "C" __attribute__((visibility("default")))

namespace {

constexpr int no_error = 0, out_of_memory = 2, invalid_device = 101, invalid_context = 201;

struct Stream {
    std::vector<std::function<void()>> work;
    std::size_t done = 0;

    void run(std::size_t until) {
        for (; done < until; ++done) {
            work[done]();
            work[done] = nullptr;
        }
    }
};

struct Event {
    Stream *stream = nullptr;
    std::size_t place = 0;
};

thread_local int entered = 0;
int context;

int in_context(const std::function<void()> &act) {
    if (entered == 0) {
        return invalid_context;
    }
    act();
    return no_error;
}

} // namespace

void standin_enqueue(void *stream, const std::function<void()> &work) {
    static_cast<Stream *>(stream)->work.push_back(work);
}

STANDIN int cuInit(unsigned) {
    return no_error;
}
STANDIN int cuGetErrorName(int code, const char **name) {
    *name = code == out_of_memory     ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == invalid_context ? "CUDA_ERROR_INVALID_CONTEXT"
                                      : nullptr;
    return no_error;
}
STANDIN int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? no_error : invalid_device;
}
STANDIN int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? 8 : 9;
    return no_error;
}
STANDIN int cuDevicePrimaryCtxRetain(void **out, int) {
    *out = &context;
    return no_error;
}
STANDIN int cuDevicePrimaryCtxRelease_v2(int) {
    return no_error;
}
STANDIN int cuCtxPushCurrent_v2(void *pushed) {
    ++entered;
    return pushed == &context ? no_error : invalid_context;
}
STANDIN int cuCtxPopCurrent_v2(void **popped) {
    *popped = &context;
    return --entered < 0 ? invalid_context : no_error;
}
STANDIN int cuStreamCreate(void **stream, unsigned) {
    return in_context([&] { *stream = new Stream; });
}
STANDIN int cuStreamSynchronize(void *stream) {
    return in_context([&] { static_cast<Stream *>(stream)->run(static_cast<Stream *>(stream)->work.size()); });
}
STANDIN int cuStreamDestroy_v2(void *stream) {
    return in_context([&] { delete static_cast<Stream *>(stream); });
}
STANDIN int cuEventCreate(void **event, unsigned) {
    return in_context([&] { *event = new Event; });
}
STANDIN int cuEventRecord(void *event, void *stream) {
    auto *recorded = static_cast<Stream *>(stream);
    return in_context([&] { *static_cast<Event *>(event) = {recorded, recorded->work.size()}; });
}
STANDIN int cuEventSynchronize(void *event) {
    const Event &recorded = *static_cast<Event *>(event);
    return in_context([&] { recorded.stream->run(recorded.place); });
}
STANDIN int cuEventDestroy_v2(void *event) {
    return in_context([&] { delete static_cast<Event *>(event); });
}
STANDIN int cuMemAlloc_v2(std::uint64_t *address, std::size_t bytes) {
    if (bytes > std::size_t{1} << 40) {
        return out_of_memory;
    }
    return in_context(
        [&] { *address = reinterpret_cast<std::uintptr_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)); });
}
STANDIN int cuMemFree_v2(std::uint64_t address) {
    return in_context([&] { std::free(reinterpret_cast<void *>(static_cast<std::uintptr_t>(address))); });
}
STANDIN int cuMemHostAlloc(void **address, std::size_t bytes, unsigned) {
    return in_context([&] { *address = std::malloc(bytes); });
}
STANDIN int cuMemFreeHost(void *address) {
    return in_context([&] { std::free(address); });
}
STANDIN int cuMemcpyAsync(std::uint64_t to, std::uint64_t from, std::size_t bytes, void *stream) {
    return in_context([&] {
        standin_enqueue(stream, [=] {
            std::memcpy(reinterpret_cast<void *>(static_cast<std::uintptr_t>(to)),
                        reinterpret_cast<const void *>(static_cast<std::uintptr_t>(from)), bytes);
        });
    });
}
