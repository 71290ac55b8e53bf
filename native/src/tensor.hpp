// Tensors of the host's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace glance_trt {

using Shape = std::vector<std::int64_t>;

/// Bytes per element of a dtype of the manifest; 0 for another.
std::size_t element_bytes(const std::string &dtype);
/// A shape as errors show it: (1,4,8,8).
std::string shown(const Shape &shape);

/// What a tensor is, but for its content.
struct Spec {
    std::string dtype;
    Shape shape;

    std::size_t bytes() const;
};

/// A tensor whose content does not change once it is made, so that copies share it, in any number of threads.
class Tensor {
  public:
    Tensor() = default;
    /// Content of `bytes` bytes, which are copied, in C order.
    Tensor(std::string dtype, Shape shape, const void *content, std::size_t bytes);
    template <class T>
    Tensor(std::string dtype, Shape shape, const std::vector<T> &content)
        : Tensor(std::move(dtype), std::move(shape), content.data(), content.size() * sizeof(T)) {}

    const Spec &spec() const { return spec_; }
    const std::string &dtype() const { return spec_.dtype; }
    const Shape &shape() const { return spec_.shape; }
    std::size_t bytes() const { return content_ ? content_->size() : 0; }
    template <class T>
    const T *data() const {
        return reinterpret_cast<const T *>(content_->data());
    }
    /// A batch of one image, `count` times over.
    Tensor repeated(std::size_t count) const;

  private:
    Spec spec_;
    std::shared_ptr<const std::vector<std::byte>> content_;
};

/// By name: of a port, or of a value.
using Tensors = std::map<std::string, Tensor>;
using Specs = std::map<std::string, Spec>;

Specs specs_of(const Tensors &tensors);

} // namespace glance_trt
