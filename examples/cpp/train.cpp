// A training loop of one's own that obeys a manifest: what is frozen has no gradient, and no step of the optimizer.
//
//     train base.safetensors freeze.json data.safetensors trained.safetensors [SLIP]
//
// The model is a multilayer perceptron: `layers.N.weight` [outputs, inputs] and `layers.N.bias` [outputs], F32, N from
// 0 on, with ReLU between layers. The data are `images` F32 [n, inputs] and `labels` I64 [n]. The optimizer is SGD with
// momentum and weight decay. For machines that are little-endian, as the format is.
//
// SLIP freezes by one of two common mistakes, which verify_frozen then finds:
//     zero-gradient   the gradient of a frozen tensor is zero, and the optimizer steps it like any other
//     substring       what trains has "layers.1" in its name; so have layers.1 and layers.10

#include <cmath>
#include <cstring>
#include <iostream>

#include "safetensors.hpp"

namespace {

using nlohmann::json;
using safetensors::Checkpoint;
using safetensors::require;
using safetensors::Shape;

constexpr int steps = 60;
constexpr std::size_t batch = 64;
constexpr float learning_rate = 0.02F, momentum = 0.9F, weight_decay = 1e-3F;

struct Parameter {
    std::string name;
    Shape shape;
    std::vector<float> values, gradient, velocity;
    bool has_gradient, is_stepped;
};

struct Layer {
    Parameter weight, bias;
    std::size_t outputs() const { return weight.shape[0]; }
    std::size_t inputs() const { return weight.shape[1]; }
};

template <typename Element>
std::vector<Element> load(const Checkpoint& from, const std::string& name, const std::string& dtype, std::size_t rank) {
    require(from.count(name) == 1, name + " is missing");
    const safetensors::Tensor& tensor = from.at(name);
    require(tensor.dtype == dtype && tensor.shape.size() == rank, name + " has another dtype or rank");
    std::vector<Element> elements(tensor.size / sizeof(Element));
    char* place = reinterpret_cast<char*>(elements.data());
    safetensors::read(tensor, 0, tensor.size, [&place](const char* data, std::size_t size) {
        std::memcpy(place, data, size);
        place += size;
    });
    return elements;
}

Parameter load_parameter(const Checkpoint& base, const json& records, const std::string& slip, const std::string& name,
                         std::size_t rank) {
    Parameter one{name, {}, load<float>(base, name, "F32", rank), {}, {}, true, true};
    one.shape = base.at(name).shape;
    one.gradient = one.velocity = std::vector<float>(one.values.size());
    require(!records.at(name).contains("rows"), name + " is frozen in a part, which this loop does not know");
    const bool frozen = slip == "substring" ? name.find("layers.1") == std::string::npos
                                            : records.at(name).at("frozen").get<bool>();
    one.has_gradient = !frozen;
    one.is_stepped = !frozen || slip == "zero-gradient";
    return one;
}

std::vector<Layer> load_model(const Checkpoint& base, const json& records, const std::string& slip) {
    std::vector<Layer> layers;
    for (std::size_t number = 0; base.count("layers." + std::to_string(number) + ".weight") == 1; ++number) {
        const std::string name = "layers." + std::to_string(number);
        layers.push_back({load_parameter(base, records, slip, name + ".weight", 2),
                          load_parameter(base, records, slip, name + ".bias", 1)});
        const Layer& layer = layers.back();
        require(layer.bias.shape[0] == layer.outputs(), name + ": weight and bias do not fit");
        require(number == 0 || layers[number - 1].outputs() == layer.inputs(), name + " does not fit the one before");
    }
    require(layers.size() * 2 == base.size(), "the base is no perceptron of this form");
    return layers;
}

/// Adds the gradient of one sample, shape [inputs of the first layer], and answers its cross-entropy.
float accumulate(std::vector<Layer>& layers, std::vector<float> input, std::size_t label) {
    std::vector<std::vector<float>> activations{std::move(input)};
    for (const Layer& layer : layers) {
        std::vector<float> sums = layer.bias.values;
        for (std::size_t row = 0; row < layer.outputs(); ++row)
            for (std::size_t column = 0; column < layer.inputs(); ++column)
                sums[row] += layer.weight.values[row * layer.inputs() + column] * activations.back()[column];
        if (&layer != &layers.back())
            for (float& sum : sums) sum = std::max(sum, 0.0F);
        activations.push_back(std::move(sums));
    }
    std::vector<float> error = activations.back();  // with respect to a layer's sums
    require(label < error.size(), "a label that the model has no output for");
    const float most = *std::max_element(error.begin(), error.end());
    float total = 0;
    for (float& value : error) total += value = std::exp(value - most);
    for (float& value : error) value /= total;
    const float loss = -std::log(std::max(error[label], 1e-30F));
    error[label] -= 1;
    for (std::size_t number = layers.size(); number-- > 0;) {
        Layer& layer = layers[number];
        std::vector<float> below(layer.inputs());
        for (std::size_t row = 0; row < layer.outputs(); ++row) {
            if (layer.bias.has_gradient) layer.bias.gradient[row] += error[row] / batch;
            for (std::size_t column = 0; column < layer.inputs(); ++column) {
                const float active = activations[number][column];
                const std::size_t place = row * layer.inputs() + column;
                if (layer.weight.has_gradient) layer.weight.gradient[place] += error[row] * active / batch;
                if (active > 0) below[column] += error[row] * layer.weight.values[place];
            }
        }
        error = std::move(below);
    }
    return loss;
}

void step(Parameter& one) {
    for (std::size_t place = 0; one.is_stepped && place < one.values.size(); ++place) {
        const float gradient = one.gradient[place] + weight_decay * one.values[place];
        one.velocity[place] = momentum * one.velocity[place] + gradient;
        one.values[place] -= learning_rate * one.velocity[place];
        one.gradient[place] = 0;
    }
}

void save(const std::vector<Layer>& layers, const std::string& path) {
    json header = json::object();
    std::string data;
    for (const Layer& layer : layers)
        for (const Parameter* one : {&layer.weight, &layer.bias}) {
            const std::size_t begin = data.size();
            data.append(reinterpret_cast<const char*>(one->values.data()), one->values.size() * sizeof(float));
            header[one->name] = {{"dtype", "F32"}, {"shape", one->shape}, {"data_offsets", {begin, data.size()}}};
        }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    const std::uint64_t length = text.size();
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof length);
    file << text << data << std::flush;
    require(bool(file), path + ": cannot be written");
}

void train(const std::vector<std::string>& arguments) {
    const std::string slip = arguments.size() == 5 ? arguments[4] : "";
    require(slip.empty() || slip == "zero-gradient" || slip == "substring", "no such slip");
    const json manifest = safetensors::parse_file(arguments[1]);
    std::vector<Layer> layers = load_model(safetensors::open(arguments[0]), manifest.at("tensors"), slip);
    const Checkpoint data = safetensors::open(arguments[2]);
    const auto images = load<float>(data, "images", "F32", 2);
    const auto labels = load<std::int64_t>(data, "labels", "I64", 1);
    const std::size_t inputs = layers.front().inputs();
    require(!labels.empty() && images.size() == labels.size() * inputs, "images and labels do not fit");
    for (int number = 0; number < steps; ++number) {
        float loss = 0;
        for (std::size_t taken = 0; taken < batch; ++taken) {
            const std::size_t sample = (number * batch + taken) % labels.size();
            const auto image = images.begin() + static_cast<std::ptrdiff_t>(sample * inputs);
            const std::vector<float> input(image, image + static_cast<std::ptrdiff_t>(inputs));
            loss += accumulate(layers, input, static_cast<std::size_t>(labels[sample])) / batch;
        }
        for (Layer& layer : layers) step(layer.weight), step(layer.bias);
        if (number == 0 || number == steps - 1) std::cout << "step " << number + 1 << ": loss " << loss << '\n';
    }
    save(layers, arguments[3]);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        require(argc == 5 || argc == 6, "usage: train BASE MANIFEST DATA OUT [zero-gradient|substring]");
        train({argv + 1, argv + argc});
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "error: " << safetensors::printable(error.what()) << '\n';
        return 2;
    }
}
