// An image by the Python package, inside of a C++ process: embed BUNDLE PROMPT SEED OUTPUT.png
//
//   cmake -S examples/embed_python -B build/embed -DPython_EXECUTABLE=$PWD/.venv/bin/python
//
// The interpreter is that of this Python, whose libpython is linked, and the packages are those of its virtual
// environment, which needs glance-trt with what the bundle's target takes. Its path is compiled in. Without the option,
// CMake takes the virtual environment that is active, or else the first python3 of the PATH. pybind11 is Debian's
// pybind11-dev, or pip's with -Dpybind11_DIR=$(python -m pybind11 --cmakedir).
#include "../png.hpp"

#include <cstdio>
#include <exception>
#include <string>

#include <pybind11/embed.h>

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

void generate(const std::string &folder, const std::string &prompt, std::uint64_t seed, const std::string &output) {
    const py::object pipeline = py::module_::import("glance_trt").attr("Pipeline").attr("open")(folder);
    // On a GPU the images stay there, and other libraries take them by DLPack; here they are an array of the host.
    const py::buffer images = pipeline.attr("pixels")(prompt, "seed"_a = seed); // uint8 [1, height, width, 3]
    const py::buffer_info view = images.request();                              // the array's own memory, no copy
    save_png(output, static_cast<const std::uint8_t *>(view.ptr), static_cast<std::size_t>(view.shape[1]),
             static_cast<std::size_t>(view.shape[2]));
    pipeline.attr("close")();
}

} // namespace

int main(int count, char **arguments) {
    if (count != 5) {
        std::fprintf(stderr, "usage: %s BUNDLE PROMPT SEED OUTPUT.png\n", arguments[0]);
        return 2;
    }
    PyConfig config;
    PyConfig_InitIsolatedConfig(&config); // neither environment variables nor signals are Python's here
    PyConfig_SetBytesString(&config, &config.executable, PYTHON);
    try {
        const py::scoped_interpreter interpreter(&config, 0, nullptr, false);
        try {
            generate(arguments[1], arguments[2], std::stoull(arguments[3]), arguments[4]);
            return 0;
        } catch (const py::error_already_set &error) { // caught while there still is an interpreter
            std::fprintf(stderr, "error: %s\n", std::string(py::str(error.value())).c_str());
        }
    } catch (const std::exception &error) {
        std::fprintf(stderr, "error: %s\n", error.what());
    }
    return 1;
}
