#include "tensor.hpp"

#include <utility>

namespace glance_trt {

std::size_t element_bytes(const std::string &dtype) {
    return dtype == "float32"                          ? 4
           : dtype == "float16" || dtype == "bfloat16" ? 2
           : dtype == "int64"                          ? 8
           : dtype == "uint8"                          ? 1
                                                       : 0;
}

std::string shown(const Shape &shape) {
    std::string text;
    for (const std::int64_t size : shape) {
        text += (text.empty() ? "" : ",") + std::to_string(size);
    }
    return "(" + text + ")";
}

std::size_t Spec::bytes() const {
    std::size_t bytes = element_bytes(dtype);
    for (const std::int64_t size : shape) {
        bytes *= static_cast<std::size_t>(size);
    }
    return bytes;
}

Specs specs_of(const Tensors &tensors) {
    Specs specs;
    for (const auto &[name, tensor] : tensors) {
        specs[name] = tensor.spec();
    }
    return specs;
}

Tensor::Tensor(std::string dtype, Shape shape, const void *content, std::size_t bytes)
    : spec_{std::move(dtype), std::move(shape)} {
    const auto *first = static_cast<const std::byte *>(content);
    content_ = std::make_shared<const std::vector<std::byte>>(first, first + bytes);
}

Tensor Tensor::repeated(std::size_t count) const {
    if (count == 1) {
        return *this;
    }
    std::vector<std::byte> content;
    content.reserve(count * content_->size());
    for (std::size_t i = 0; i < count; ++i) {
        content.insert(content.end(), content_->begin(), content_->end());
    }
    Shape shape = spec_.shape;
    shape[0] = static_cast<std::int64_t>(count);
    return {spec_.dtype, std::move(shape), content};
}

} // namespace glance_trt
