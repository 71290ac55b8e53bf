#include "onnxruntime/shapes.hpp"

#include <cstdint>
#include <functional>

namespace glance_trt::onnxruntime {
namespace {

// Numbers of fields, of onnx.proto.
constexpr std::uint64_t graph_of_model = 7, input_of_graph = 11, type_of_value = 2, tensor_of_type = 1,
                        shape_of_tensor = 2;
constexpr char unused_field = 15 << 3 | 2; // of a tensor's type; a reader skips it

constexpr std::uint64_t length_delimited = 2;

/// Reads the fields of one message, from `first` up to `last`.
class Message {
  public:
    Message(std::string &bytes, std::size_t first, std::size_t last) : bytes_(bytes), place_(first), last_(last) {}

    /// Calls back with the message in each field of that number, and the place of the field's tag.
    void each(std::uint64_t number, const std::function<void(Message, std::size_t tag)> &use) {
        while (place_ < last_) {
            const std::size_t start = place_;
            const std::uint64_t tag = varint();
            switch (tag & 7) {
            case 0:
                varint();
                break;
            case 1:
                skip(8);
                break;
            case length_delimited: {
                const std::uint64_t length = varint();
                const std::size_t first = place_;
                skip(length);
                if (place_ <= last_ && tag >> 3 == number) {
                    use(Message(bytes_, first, place_), start);
                }
                break;
            }
            case 5:
                skip(4);
                break;
            default:
                place_ = last_; // nothing that a model has
            }
        }
    }

  private:
    std::uint64_t varint() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 64 && place_ < last_; shift += 7) {
            const auto byte = static_cast<unsigned char>(bytes_[place_++]);
            value |= std::uint64_t{byte & 0x7FU} << shift;
            if (byte < 0x80) {
                return value;
            }
        }
        place_ = last_ + 1; // cut, or too long: no message
        return 0;
    }

    void skip(std::uint64_t count) { place_ = count <= last_ - place_ ? place_ + count : last_ + 1; }

    std::string &bytes_;
    std::size_t place_, last_;
};

} // namespace

void forget_input_shapes(std::string &model) {
    Message(model, 0, model.size()).each(graph_of_model, [&](Message graph, std::size_t) {
        graph.each(input_of_graph, [&](Message input, std::size_t) {
            input.each(type_of_value, [&](Message type, std::size_t) {
                type.each(tensor_of_type, [&](Message tensor, std::size_t) {
                    tensor.each(shape_of_tensor, [&](Message, std::size_t tag) { model[tag] = unused_field; });
                });
            });
        });
    });
}

} // namespace glance_trt::onnxruntime
