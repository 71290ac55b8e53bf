#include "calls.hpp"

namespace glance_trt {

Call call_of(const Manifest &manifest, const std::string &name, const std::string &value, std::size_t step) {
    const Graph &graph = manifest.graphs[name];
    Call call = {name, {}, graph.outputs[0].name, value};
    for (const Port &port : graph.inputs) {
        const auto [kind, rest] = port.source_parts();
        call.inputs.emplace_back(port.name, kind == "table" ? rest + "." + std::to_string(step) : port.source);
    }
    return call;
}

std::vector<Call> calls_of(const Manifest &manifest, const Settings &settings) {
    const std::vector<Step> &steps = settings.schedule->steps;
    std::vector<Call> calls;
    for (std::size_t i = settings.first_step; i < steps.size(); ++i) {
        calls.push_back(call_of(manifest, "denoiser." + steps[i].phase, latents_value, i));
    }
    return calls;
}

Tensors values_of(const Settings &settings, const Tensors &conditions, const Tensors &negative, std::size_t count) {
    Tensors values;
    for (const auto &[name, tensor] : conditions) {
        values["condition." + name] = tensor.repeated(count);
    }
    for (const auto &[name, tensor] : negative) {
        values["negative." + name] = tensor.repeated(count);
    }
    values["guidance_scale"] = Tensor("float32", {}, &settings.guidance_scale, sizeof(float));
    const std::vector<Step> &steps = settings.schedule->steps;
    for (std::size_t i = settings.first_step; i < steps.size(); ++i) {
        const std::string number = "." + std::to_string(i);
        values["timestep" + number] = Tensor("float32", {}, &steps[i].timestep, sizeof(float));
        const auto columns = static_cast<std::int64_t>(steps[i].coefficients.size());
        values["coefficients" + number] = Tensor("float32", {columns}, steps[i].coefficients);
    }
    return values;
}

} // namespace glance_trt
