// A bundle without files, whose engines are made up: they compute a little, and fail when they are told to.
#pragma once

#include "fake_manifest.hpp"

#include "error.hpp"
#include "inputs.hpp"
#include "pipeline.hpp"

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace fake {

using namespace glance_trt;

constexpr std::int64_t failing_token = 13, exhausting_token = 14;

inline Manifest manifest() {
    return load_manifest(fake_manifest, "fake");
}

class FakeRunner : public Runner {
  public:
    Tensors run(const std::string &graph, const Tensors &inputs) const override {
        check_inputs(graph, manifest_.graphs[graph].inputs, specs_of(inputs));
        return graph == "text_encoder" ? encode(inputs.at("ids"))
               : graph == "decoder"    ? decode(inputs.at("x"))
                                       : denoise(inputs);
    }

  private:
    static std::size_t count_of(const Tensor &tensor) { return tensor.bytes() / element_bytes(tensor.dtype()); }

    static Tensors encode(const Tensor &ids) {
        std::vector<float> embeds;
        for (std::size_t i = 0; i < count_of(ids); ++i) {
            const std::int64_t id = ids.data<std::int64_t>()[i];
            if (id == failing_token) {
                throw Error(Kind::target, "text_encoder: told to fail");
            }
            if (id == exhausting_token) {
                throw std::bad_alloc();
            }
            embeds.push_back(static_cast<float>(id) / 100);
        }
        return {{"embeds", Tensor("float32", ids.shape(), embeds)}};
    }

    static Tensors denoise(const Tensors &inputs) {
        const Tensor &x = inputs.at("x");
        const std::size_t each = count_of(x) / static_cast<std::size_t>(x.shape()[0]);
        const float scale = *inputs.at("scale").data<float>(), time = *inputs.at("t").data<float>();
        std::vector<float> y;
        for (std::size_t i = 0; i < count_of(x); ++i) {
            const std::size_t row = i / each * 4;
            const float with = inputs.at("embeds").data<float>()[row], without = inputs.at("other").data<float>()[row];
            y.push_back(0.5F * x.data<float>()[i] + without + scale * (with - without) + time / 10000);
        }
        return {{"y", Tensor("float32", x.shape(), y)}};
    }

    static Tensors decode(const Tensor &x) {
        const std::int64_t batch = x.shape()[0], height = x.shape()[2] * 2, width = x.shape()[3] * 2;
        std::vector<std::uint8_t> pixels;
        for (std::int64_t i = 0; i < batch * height * width * 3; ++i) {
            const float value = x.data<float>()[static_cast<std::size_t>(i) * count_of(x) /
                                                static_cast<std::size_t>(batch * height * width * 3)];
            pixels.push_back(static_cast<std::uint8_t>(128 + static_cast<int>(value * 20)));
        }
        return {{"images", Tensor("uint8", {batch, height, width, 3}, pixels)}};
    }

    const Manifest manifest_ = manifest();
};

inline Pipeline pipeline(Log log = {}) {
    return {manifest(), std::make_unique<FakeRunner>(), [](const std::string &) { return std::string(); },
            std::move(log)};
}

} // namespace fake
