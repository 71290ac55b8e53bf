// A bundle without files, whose engines are made up: they compute a little, and fail when they are told to.
#pragma once

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
    return load_manifest(R"({
        "format": 1, "name": "fake", "family": "fake", "provenance": {"model": "fake"},
        "image": {"height": 8, "width": 16, "latent_channels": 2, "latent_scale": 2, "sizes": [[16, 32]], "tile": [16, 4]},
        "tokenizers": {"words": {"file": "tokenizer.json", "max_length": 4, "pad_token_id": 0}},
        "guidance": {"scale": 2},
        "schedules": {"usual": {"steps": [
            {"phase": "slow", "timestep": 900, "coefficients": [1, 0.5, 0.25]},
            {"phase": "slow", "timestep": 500, "coefficients": [1, 0.5, 0.25]},
            {"phase": "slow", "timestep": 100, "coefficients": [1, 0.5, 0.25]}]}},
        "graphs": {
            "text_encoder": {
                "inputs": [{"name": "ids", "dtype": "int64", "shape": ["b", 4], "source": "tokens.words"}],
                "outputs": [{"name": "embeds", "dtype": "float32", "shape": ["b", 4]}], "files": {}},
            "denoiser.slow": {
                "inputs": [
                    {"name": "x", "dtype": "float32", "shape": ["b", 2, "h", "w"], "source": "latents"},
                    {"name": "t", "dtype": "float32", "shape": [], "source": "table.timestep"},
                    {"name": "scale", "dtype": "float32", "shape": [], "source": "guidance_scale"},
                    {"name": "embeds", "dtype": "float32", "shape": ["b", 4], "source": "condition.embeds"},
                    {"name": "other", "dtype": "float32", "shape": ["b", 4], "source": "negative.embeds"}],
                "outputs": [{"name": "y", "dtype": "float32", "shape": ["b", 2, "h", "w"]}], "files": {}},
            "decoder": {
                "inputs": [{"name": "x", "dtype": "float32", "shape": ["b", 2, "h", "w"], "source": "latents"}],
                "outputs": [{"name": "images", "dtype": "uint8", "shape": ["b", "2*h", "2*w", 3]}], "files": {}}},
        "engines": {}, "files": {"tokenizer.json": {"size": 0, "sha256":
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}})",
                         "fake");
}

class FakeRunner : public Runner {
  public:
    Tensors run(const std::string &graph, const Tensors &inputs) const override {
        check_inputs(graph, manifest_.graphs[graph].inputs, inputs);
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
