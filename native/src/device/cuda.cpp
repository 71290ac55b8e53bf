#include "device/cuda.hpp"

#include "error.hpp"

#include <dlfcn.h>

namespace glance_trt {
namespace {

constexpr const char *driver_name = "libcuda.so.1";
constexpr int capability_major = 75, capability_minor = 76; // of CUdevice_attribute

} // namespace

/// The functions that are used here. Handles of contexts, streams and events are pointers to what only the driver
/// knows; devices are numbers.
class CudaDriver {
  public:
    /// Throws `Error` of the kind target.
    static std::shared_ptr<const CudaDriver> load() {
        void *library = dlopen(driver_name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        if (!library) {
            throw Error(Kind::target, std::string("there is no NVIDIA driver here (") + driver_name + " is not found)");
        }
        auto driver = std::make_shared<CudaDriver>();
        driver->find(library, "cuInit", driver->init);
        driver->find(library, "cuGetErrorName", driver->error_name);
        driver->find(library, "cuDeviceGet", driver->device_get);
        driver->find(library, "cuDeviceGetAttribute", driver->device_get_attribute);
        driver->find(library, "cuDevicePrimaryCtxRetain", driver->context_retain);
        driver->find(library, "cuDevicePrimaryCtxRelease_v2", driver->context_release);
        driver->find(library, "cuCtxPushCurrent_v2", driver->context_push);
        driver->find(library, "cuCtxPopCurrent_v2", driver->context_pop);
        driver->find(library, "cuStreamCreate", driver->stream_create);
        driver->find(library, "cuStreamSynchronize", driver->stream_synchronize);
        driver->find(library, "cuStreamDestroy_v2", driver->stream_destroy);
        driver->find(library, "cuEventCreate", driver->event_create);
        driver->find(library, "cuEventRecord", driver->event_record);
        driver->find(library, "cuEventSynchronize", driver->event_synchronize);
        driver->find(library, "cuEventDestroy_v2", driver->event_destroy);
        driver->find(library, "cuMemAlloc_v2", driver->memory_allocate);
        driver->find(library, "cuMemFree_v2", driver->memory_free);
        driver->find(library, "cuMemHostAlloc", driver->host_allocate);
        driver->find(library, "cuMemFreeHost", driver->host_free);
        driver->find(library, "cuMemcpyAsync", driver->copy);
        driver->check(0, "cuInit", driver->init(0));
        return driver;
    }

    void check(int ordinal, const char *function, int code) const {
        if (code != 0) {
            const char *name = nullptr;
            error_name(code, &name);
            throw Error(Kind::target, "GPU " + std::to_string(ordinal) + ": " + function + ": " +
                                          (name ? name : std::to_string(code)));
        }
    }

    int device(int ordinal) const {
        int device = 0;
        if (const int code = device_get(&device, ordinal)) {
            throw Error(Kind::target, "the NVIDIA driver here finds no GPU " + std::to_string(ordinal) +
                                          " that it can use (CUDA error " + std::to_string(code) + ")");
        }
        return device;
    }

    int (*init)(unsigned flags) = nullptr;
    int (*error_name)(int code, const char **name) = nullptr;
    int (*device_get)(int *device, int ordinal) = nullptr;
    int (*device_get_attribute)(int *value, int attribute, int device) = nullptr;
    int (*context_retain)(void **context, int device) = nullptr;
    int (*context_release)(int device) = nullptr;
    int (*context_push)(void *context) = nullptr;
    int (*context_pop)(void **context) = nullptr;
    int (*stream_create)(void **stream, unsigned flags) = nullptr;
    int (*stream_synchronize)(void *stream) = nullptr;
    int (*stream_destroy)(void *stream) = nullptr;
    int (*event_create)(void **event, unsigned flags) = nullptr;
    int (*event_record)(void *event, void *stream) = nullptr;
    int (*event_synchronize)(void *event) = nullptr;
    int (*event_destroy)(void *event) = nullptr;
    int (*memory_allocate)(Address *address, std::size_t bytes) = nullptr;
    int (*memory_free)(Address address) = nullptr;
    int (*host_allocate)(void **address, std::size_t bytes, unsigned flags) = nullptr;
    int (*host_free)(void *address) = nullptr;
    int (*copy)(Address to, Address from, std::size_t bytes, void *stream) = nullptr;

  private:
    template <class Function>
    static void find(void *library, const char *name, Function &function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) {
            throw Error(Kind::target, std::string("the NVIDIA driver here is too old: it has no ") + name);
        }
    }
};

namespace {

constexpr unsigned non_blocking = 1;   // CU_STREAM_NON_BLOCKING: it does not wait for the legacy default stream
constexpr unsigned without_timing = 2; // CU_EVENT_DISABLE_TIMING

} // namespace

std::string compute_capability(int ordinal) {
    const auto driver = CudaDriver::load();
    const int device = driver->device(ordinal);
    int major = 0, minor = 0;
    driver->check(ordinal, "cuDeviceGetAttribute", driver->device_get_attribute(&major, capability_major, device));
    driver->check(ordinal, "cuDeviceGetAttribute", driver->device_get_attribute(&minor, capability_minor, device));
    return std::to_string(major) + "." + std::to_string(minor);
}

CudaDevice::CudaDevice(int ordinal)
    : driver_(CudaDriver::load()), ordinal_(ordinal), device_(driver_->device(ordinal)) {
    // The primary context is the one that the CUDA runtime uses, so an application's pointers mean the same here.
    check("cuDevicePrimaryCtxRetain", driver_->context_retain(&context_, device_));
    try {
        const Entered entered(*this);
        check("cuStreamCreate", driver_->stream_create(&stream_, non_blocking));
        for (void *&mark : marks_) {
            check("cuEventCreate", driver_->event_create(&mark, without_timing));
        }
    } catch (const Error &) {
        driver_->context_release(device_);
        throw;
    }
}

CudaDevice::~CudaDevice() {
    if (driver_->context_push(context_) == 0) {
        for (void *mark : marks_) {
            driver_->event_destroy(mark);
        }
        driver_->stream_destroy(stream_);
        leave();
    }
    driver_->context_release(device_);
}

void CudaDevice::enter() {
    check("cuCtxPushCurrent", driver_->context_push(context_));
}

void CudaDevice::leave() noexcept {
    void *context = nullptr;
    driver_->context_pop(&context);
}

Address CudaDevice::allocate(Place place, std::size_t bytes) {
    if (place == Place::device) {
        Address address = 0;
        check("cuMemAlloc", driver_->memory_allocate(&address, bytes));
        return address;
    }
    void *memory = nullptr;
    check("cuMemHostAlloc", driver_->host_allocate(&memory, bytes, 0));
    return reinterpret_cast<std::uintptr_t>(memory);
}

void CudaDevice::free(Place place, Address address) noexcept {
    place == Place::device ? driver_->memory_free(address) : driver_->host_free(pointer(address));
}

void CudaDevice::copy(Address to, Address from, std::size_t bytes) {
    check("cuMemcpyAsync", driver_->copy(to, from, bytes, stream_));
}

void CudaDevice::mark(std::size_t number) {
    check("cuEventRecord", driver_->event_record(marks_.at(number), stream_));
}

void CudaDevice::wait(std::size_t number) {
    check("cuEventSynchronize", driver_->event_synchronize(marks_.at(number)));
}

void CudaDevice::synchronize() {
    check("cuStreamSynchronize", driver_->stream_synchronize(stream_));
}

void CudaDevice::check(const char *function, int code) const {
    driver_->check(ordinal_, function, code);
}

} // namespace glance_trt
