// A strict reader of safetensors checkpoints: one file, or shards and their index. Only headers are held in memory.
//
// The format: https://github.com/huggingface/safetensors#format. What two readers could understand differently is
// refused: a name that stands twice, a hole or an overlap, bytes that belong to no tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace safetensors {

using nlohmann::json;
namespace fs = std::filesystem;
using Shape = std::vector<std::uint64_t>;

/// A checkpoint that is malformed, or cannot be read.
struct Malformed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Tensor {
    std::string dtype;
    Shape shape;
    fs::path file;
    std::uint64_t offset;  // in the file, in bytes
    std::uint64_t size;    // in bytes
};

using Checkpoint = std::map<std::string, Tensor>;  // in the order of the names' UTF-8 bytes

/// Throws std::invalid_argument.
inline void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

/// A name as JSON of ASCII characters, so that it plays no tricks on a terminal.
inline std::string quoted(const std::string& name) { return json(name).dump(-1, ' ', true); }

/// What a function makes of a value; what it throws says where.
template <typename Function>
auto within(const std::string& place, Function function, const json& value) {
    try {
        return function(value);
    } catch (const std::exception& error) {
        throw std::invalid_argument(place + ": " + error.what());
    }
}

/// A message without what a terminal would obey, and no longer than a few lines.
inline std::string printable(std::string message) {
    message.resize(std::min<std::size_t>(message.size(), 500));
    std::replace_if(message.begin(), message.end(), [](unsigned char c) { return c < 0x20 || c > 0x7e; }, '?');
    return message;
}

/// A JSON document in which no key stands twice.
inline json parse(const std::string& text) {
    require(text.find('\0') == std::string::npos, "a NUL byte in JSON");  // where the library would stop reading
    std::vector<std::set<std::string>> open;                              // the keys so far of each open object
    return json::parse(text, [&open](int depth, json::parse_event_t event, const json& value) {
        require(depth <= 64, "JSON that is nested too deeply");
        if (event == json::parse_event_t::object_start) open.emplace_back();
        if (event == json::parse_event_t::object_end) open.pop_back();
        if (event == json::parse_event_t::key)
            require(open.back().insert(value.get<std::string>()).second, "the key " + quoted(value) + " stands twice");
        return true;
    });
}

inline json parse_file(const fs::path& path) {
    require(fs::is_regular_file(path), "no such file");
    std::ifstream file(path, std::ios::binary);
    return parse({std::istreambuf_iterator<char>(file), {}});
}

/// A list of whole numbers that 64 bits hold: neither 2.0 nor -1.
inline Shape numbers(const json& list) {
    const auto is_whole = [](const json& number) { return number.is_number_unsigned(); };
    require(list.is_array() && std::all_of(list.begin(), list.end(), is_whole), "expected a list of whole numbers");
    return list.get<Shape>();
}

/// The size of a tensor in bytes; elements of less than a byte are packed.
inline std::uint64_t bytes_of(const std::string& dtype, const Shape& shape) {
    static const std::map<std::string, std::uint64_t> bits{
        {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6},     {"F6_E3M2", 6},     {"U8", 8},   {"I8", 8},
        {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16},
        {"F8_E8M0", 8}, {"F16", 16},    {"BF16", 16},       {"I32", 32},        {"U32", 32}, {"F32", 32},
        {"C64", 64},    {"F64", 64},    {"I64", 64},        {"U64", 64}};
    require(bits.count(dtype) == 1, "unknown dtype " + quoted(dtype));
    require(shape.size() <= 64, "more than 64 dimensions");
    std::uint64_t elements = 1;
    const auto multiply = [&elements](std::uint64_t factor) {
        require(elements <= std::numeric_limits<std::uint64_t>::max() / factor, "a size that overflows");
        elements *= factor;
    };
    for (const std::uint64_t size : shape) multiply(std::max<std::uint64_t>(size, 1));
    if (std::find(shape.begin(), shape.end(), 0U) != shape.end()) return 0;
    multiply(bits.at(dtype));
    require(elements % 8 == 0, "elements that do not fill whole bytes");
    return elements / 8;
}

inline void entry_of_metadata(const json& entry) { entry.get<std::map<std::string, std::string>>(); }

/// What a header says of a tensor; its offset is from the end of the header.
inline Tensor entry_of_tensor(const json& entry) {
    require(entry.is_object() && entry.size() == 3, "expected dtype, shape and data_offsets");
    Tensor tensor{entry.at("dtype"), numbers(entry.at("shape")), {}, 0, 0};
    tensor.size = bytes_of(tensor.dtype, tensor.shape);
    const Shape span = numbers(entry.at("data_offsets"));
    const bool fits = span.size() == 2 && span[0] <= span[1] && span[1] - span[0] == tensor.size;
    require(fits, "data_offsets do not fit dtype and shape");
    tensor.offset = span[0];
    return tensor;
}

/// One file. Every tensor's bytes are inside it when this returns.
inline Checkpoint open_file(const fs::path& path) try {
    require(fs::is_regular_file(path), "no such file");
    const std::uint64_t file_size = fs::file_size(path);
    std::ifstream file(path, std::ios::binary);
    unsigned char prefix[8];
    const bool has_prefix = file_size >= 8 && file.read(reinterpret_cast<char*>(prefix), 8);
    require(has_prefix, "less than 8 bytes, or not readable");
    std::uint64_t length = 0;
    for (int place = 7; place >= 0; --place) length = length << 8 | prefix[place];  // little-endian
    require(0 < length && length <= 100'000'000 && length <= file_size - 8, "a header that the file has no room for");
    std::string header(length, ' ');
    require(bool(file.read(header.data(), static_cast<std::streamsize>(length))), "cut short while it was read");
    header.erase(header.find_last_not_of(' ') + 1);
    require(!header.empty() && header.front() == '{' && header.back() == '}', "a header that is no JSON object");

    const json entries = parse(header);
    Checkpoint tensors;
    std::vector<Tensor*> in_order;
    for (const auto& [name, entry] : entries.items()) {
        if (name == "__metadata__") within(name, entry_of_metadata, entry);
        else in_order.push_back(&tensors.emplace(name, within(quoted(name), entry_of_tensor, entry)).first->second);
    }
    require(!tensors.empty(), "holds no tensor");
    std::sort(in_order.begin(), in_order.end(), [](const Tensor* a, const Tensor* b) {
        return std::pair(a->offset, a->size) < std::pair(b->offset, b->size);
    });
    const std::uint64_t start = 8 + length;
    std::uint64_t position = 0;
    for (Tensor* tensor : in_order) {
        require(tensor->offset == position, "a hole or an overlap between tensors");
        position += tensor->size;
        tensor->offset += start;
        tensor->file = path;
    }
    require(position == file_size - start, "is cut short, or has trailing bytes");
    return tensors;
} catch (const std::exception& error) {
    throw Malformed(path.string() + ": " + error.what());
}

/// The shards that an index names.
inline Checkpoint open_index(const fs::path& path) try {
    const json index = parse_file(path);
    require(index.is_object() && index.contains("weight_map") && index["weight_map"].is_object(), "has no weight_map");
    const auto homes = index["weight_map"].get<std::map<std::string, std::string>>();
    std::set<fs::path> shards;
    for (const auto& home : homes) {
        const fs::path shard(home.second);
        const bool leaves = shard.is_absolute() || std::find(shard.begin(), shard.end(), "..") != shard.end();
        require(!leaves && shard.extension() == ".safetensors", quoted(home.second) + " is no shard of this folder");
        shards.insert(shard);
    }
    Checkpoint tensors;
    for (const fs::path& shard : shards) {
        for (auto& [name, tensor] : open_file(path.parent_path() / shard)) {
            require(homes.count(name) == 1 && homes.at(name) == shard, quoted(name) + ": is not in its shard");
            tensors.emplace(name, std::move(tensor));
        }
    }
    require(!homes.empty() && tensors.size() == homes.size(), "a shard lacks a tensor of the weight_map");
    return tensors;
} catch (const Malformed&) {
    throw;
} catch (const std::exception& error) {
    throw Malformed(path.string() + ": " + error.what());
}

/// A `.safetensors` file, the index of a sharded checkpoint, or a folder with the one or the other.
inline Checkpoint open(const fs::path& path) {
    require(fs::exists(path), path.string() + ": no such file or folder");
    if (!fs::is_directory(path)) return path.extension() == ".json" ? open_index(path) : open_file(path);
    const fs::path single = path / "model.safetensors", index = path / "model.safetensors.index.json";
    require(fs::exists(single) || fs::exists(index), path.string() + ": no checkpoint in this folder");
    if (fs::exists(single) && fs::exists(index)) throw Malformed(path.string() + ": a single file and an index");
    return fs::exists(index) ? open_index(index) : open_file(single);
}

/// Gives `sink(data, size)` the bytes of a tensor from `begin` up to `end`, a part at a time.
template <typename Sink>
void read(const Tensor& tensor, std::uint64_t begin, std::uint64_t end, Sink&& sink) {
    std::ifstream file(tensor.file, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(tensor.offset + begin));
    std::vector<char> buffer(std::min<std::uint64_t>(end - begin, 1 << 20));
    for (std::uint64_t left = end - begin; left > 0;) {
        const std::size_t count = std::min<std::uint64_t>(left, buffer.size());
        if (!file.read(buffer.data(), static_cast<std::streamsize>(count)))
            throw Malformed(tensor.file.string() + ": cut short while it was read");
        sink(buffer.data(), count);
        left -= count;
    }
}

}  // namespace safetensors
