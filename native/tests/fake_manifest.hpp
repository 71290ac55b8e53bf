// The manifest of a bundle whose only file is tokenizer.json, of no bytes.
#pragma once

constexpr const char *fake_manifest = R"({
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
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}})";
