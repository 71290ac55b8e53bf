#include "tokenizing/frame.hpp"

#include "tokenizing/read.hpp"

namespace glance_trt {
namespace {

/// ["</s>", 2]
std::uint32_t id_of_pair(const Node &node) {
    const std::vector<Node> pair = node.list();
    if (pair.size() != 2) {
        node.fail("expected a token and its id");
    }
    return token_id(pair[1]);
}

Frame of_template(const Node &node) {
    Frame frame;
    bool after = false;
    const Node special = required(node, "special_tokens");
    for (const Node &piece : required(node, "single").list()) {
        if (const auto token = member(piece, "SpecialToken")) {
            const Node ids = required(required(special, required(*token, "id").text()), "ids");
            for (const Node &id : ids.list()) {
                (after ? frame.after : frame.before).push_back(token_id(id));
            }
            continue;
        }
        required(piece, "Sequence");
        if (after) {
            piece.fail("the text stands twice in the template");
        }
        after = true;
    }
    if (!after) {
        node.fail("the template has no place for the text");
    }
    return frame;
}

} // namespace

Frame read_frame(const Node &node) {
    const std::string &type = required(node, "type").text();
    if (type == "ByteLevel") { // which changes offsets only
        return {};
    }
    if (type == "RobertaProcessing" || type == "BertProcessing") {
        return {{id_of_pair(required(node, "cls"))}, {id_of_pair(required(node, "sep"))}};
    }
    if (type == "TemplateProcessing") {
        return of_template(node);
    }
    if (type == "Sequence") {
        Frame frame;
        for (const Node &part : required(node, "processors").list()) {
            const Frame outer = read_frame(part);
            frame.before.insert(frame.before.begin(), outer.before.begin(), outer.before.end());
            frame.after.insert(frame.after.end(), outer.after.begin(), outer.after.end());
        }
        return frame;
    }
    unsupported(node, type);
}

} // namespace glance_trt
