// Proves that the frozen tensors of a trained safetensors checkpoint have the bits that a manifest of ckptsurg records.
//
//     verify_frozen freeze.json trained.safetensors
//
// docs/manifest.md says what a manifest holds. Its digests must be SHA-256: it is to be made with `--digest sha256`.
// Prints one line a difference: the verdict, the name as JSON, what was expected and found; then what came of it all.
// Exit codes: 0 every frozen tensor has its bits, 1 some have not, 2 usage or manifest, 3 a malformed checkpoint.

#include <openssl/evp.h>

#include <iostream>
#include <memory>
#include <optional>
#include <tuple>

#include "safetensors.hpp"

namespace {

using nlohmann::json;
using safetensors::quoted;
using safetensors::require;
using safetensors::Shape;
using safetensors::Tensor;

class Sha256 {
  public:
    Sha256() { must(context_ && EVP_DigestInit_ex2(context_.get(), EVP_sha256(), nullptr) == 1); }

    void update(const char* data, std::size_t size) { must(EVP_DigestUpdate(context_.get(), data, size) == 1); }

    std::string text() {
        unsigned char digest[EVP_MAX_MD_SIZE];
        unsigned size = 0;
        must(EVP_DigestFinal_ex(context_.get(), digest, &size) == 1);
        std::string text = "sha256:";
        for (unsigned place = 0; place < size; ++place)
            for (const int nibble : {digest[place] >> 4, digest[place] & 15}) text += "0123456789abcdef"[nibble];
        return text;
    }

  private:
    static void must(bool succeeded) { require(succeeded, "OpenSSL cannot compute SHA-256"); }

    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_{EVP_MD_CTX_new(), EVP_MD_CTX_free};
};

struct Rows {
    std::uint64_t start, stop;
    std::string digest;
};

/// What the manifest says of one tensor.
struct Record {
    std::string dtype;
    Shape shape;
    bool frozen;
    std::string digest;
    std::optional<Rows> rows;  // the frozen part, where the rest trains

    /// Whether a saver may have left it out because another name has the same tensor.
    bool may_be_tied() const { return frozen && shape.size() >= 2; }

    /// What it has in common with those that may be one with it: its bits, and the rows that are frozen.
    std::tuple<std::string, std::uint64_t, std::uint64_t> group() const {
        return {digest, rows ? rows->start : 0, rows ? rows->stop : 0};
    }
};

using Records = std::map<std::string, Record>;

std::string digest_at(const json& object, const char* key) {
    const std::string digest = object.at(key);
    require(digest.rfind("blake3:", 0) != 0, "its digests are BLAKE3; make the manifest with --digest sha256");
    const bool is_hex = digest.find_first_not_of("0123456789abcdef", 7) == std::string::npos;
    require(digest.rfind("sha256:", 0) == 0 && digest.size() == 7 + 64 && is_hex, "a malformed digest");
    return digest;
}

Record record_of(const json& entry) {
    static const std::set<std::string> known{"dtype", "shape", "frozen", "origin", "digest", "rows", "inherited"};
    for (const auto& item : entry.items())  // what is not known may change what is frozen
        require(known.count(item.key()) == 1, "unknown key " + quoted(item.key()));
    Record record{entry.at("dtype"), safetensors::numbers(entry.at("shape")), entry.at("frozen").get<bool>(),
                  digest_at(entry, "digest"), std::nullopt};
    safetensors::bytes_of(record.dtype, record.shape);
    if (entry.contains("rows")) {
        const json& rows = entry["rows"];
        const Shape range = safetensors::numbers(json::array({rows.at("start"), rows.at("stop")}));
        const bool fits = record.frozen && !record.shape.empty() && range[0] < range[1] && range[1] <= record.shape[0];
        require(fits, "its rows are no part of it");
        record.rows = Rows{range[0], range[1], digest_at(rows, "digest")};
    }
    return record;
}

/// The digest of one line of compact JSON for each tensor; of frozen tensors only, it says what must hold.
std::string root_of(const Records& records, bool only_frozen) {
    Sha256 hash;
    for (const auto& [name, record] : records) {
        if (only_frozen && !record.frozen) continue;
        json line = json::array({name, record.dtype, record.shape, record.frozen, record.digest});
        if (record.rows) line.push_back(json::array({record.rows->start, record.rows->stop, record.rows->digest}));
        if (only_frozen && record.rows) line[4] = nullptr;  // the rest may change
        const std::string text = line.dump() + '\n';
        hash.update(text.data(), text.size());
    }
    return hash.text();
}

Records read_manifest(const std::string& path) try {
    static const std::set<std::string> known{"version",     "tool",   "spec",    "base", "root",
                                             "frozen_root", "counts", "tensors", "tied", "dropped"};
    const json manifest = safetensors::parse_file(path);
    for (const auto& item : manifest.items()) require(known.count(item.key()) == 1, "unknown key " + quoted(item.key()));
    require(safetensors::numbers(json::array({manifest.at("version")})) == Shape{1}, "a version that is not known");
    Records records;
    for (const auto& item : manifest.at("tensors").get_ref<const json::object_t&>())
        records.emplace(item.first, safetensors::within(quoted(item.first), record_of, item.second));
    const bool whole = root_of(records, false) == digest_at(manifest, "root");
    require(whole && root_of(records, true) == digest_at(manifest, "frozen_root"), "edited: its roots do not match");
    const auto is_frozen = [](const auto& item) { return item.second.frozen; };
    require(std::any_of(records.begin(), records.end(), is_frozen), "nothing is frozen: there is nothing to prove");
    return records;
} catch (const std::exception& error) {
    throw std::invalid_argument(path + ": " + error.what());
}

bool has_shape(const Record& record, const Tensor& tensor) {
    if (!record.rows || tensor.shape.size() != record.shape.size()) return tensor.shape == record.shape;
    return std::equal(tensor.shape.begin() + 1, tensor.shape.end(), record.shape.begin() + 1) &&
           tensor.shape[0] >= record.rows->stop;  // rows may have been added, or taken away, behind the frozen ones
}

bool has_bits(const Record& record, const Tensor& tensor) {
    const std::uint64_t row = record.rows ? tensor.size / tensor.shape[0] : 0;  // in bytes
    const std::uint64_t begin = record.rows ? record.rows->start * row : 0;
    const std::uint64_t end = record.rows ? record.rows->stop * row : tensor.size;
    Sha256 hash;
    safetensors::read(tensor, begin, end, [&hash](const char* data, std::size_t size) { hash.update(data, size); });
    return hash.text() == (record.rows ? record.rows->digest : record.digest);
}

/// In the words of ckptsurg's reports; empty if the tensor is what it was.
std::string verdict_on(const Record& record, const Tensor& tensor) {
    if (!has_shape(record, tensor)) return "shape";
    if (tensor.dtype != record.dtype) return "dtype";
    return has_bits(record, tensor) ? "" : "changed";
}

bool verify(const Records& records, const safetensors::Checkpoint& trained) {
    std::vector<std::pair<std::string, std::string>> differences;  // name and verdict
    std::set<decltype(Record().group())> proven;  // groups of which a tensor is there unchanged
    std::size_t frozen = 0;
    for (const auto& [name, record] : records) {
        if (!record.frozen) continue;
        ++frozen;
        const auto found = trained.find(name);
        const std::string verdict = found == trained.end() ? "missing" : verdict_on(record, found->second);
        if (!verdict.empty()) differences.emplace_back(name, verdict);
        else if (record.may_be_tied()) proven.insert(record.group());
    }
    const auto has_twin = [&](const auto& difference) {
        const Record& record = records.at(difference.first);
        return difference.second == "missing" && record.may_be_tied() && proven.count(record.group()) == 1;
    };
    differences.erase(std::remove_if(differences.begin(), differences.end(), has_twin), differences.end());

    const auto described = [](const auto& one) { return one.dtype + ' ' + json(one.shape).dump(); };
    for (const auto& [name, verdict] : differences) {
        std::cout << verdict << ' ' << quoted(name);
        if (verdict == "dtype" || verdict == "shape")
            std::cout << " expected " << described(records.at(name)) << ", found " << described(trained.at(name));
        std::cout << '\n';
    }
    if (differences.empty()) std::cout << "ok: " << frozen << " frozen tensors, " << root_of(records, true) << '\n';
    else std::cout << "FAILED: " << differences.size() << " of " << frozen << " frozen tensors differ\n";
    return differences.empty();
}

}  // namespace

int main(int argc, char** argv) {
    try {
        require(argc == 3, "usage: verify_frozen MANIFEST CHECKPOINT");
        const Records records = read_manifest(argv[1]);
        return verify(records, safetensors::open(argv[2])) ? 0 : 1;
    } catch (const safetensors::Malformed& error) {
        std::cerr << "error: " << safetensors::printable(error.what()) << '\n';
        return 3;
    } catch (const std::exception& error) {
        std::cerr << "error: " << safetensors::printable(error.what()) << '\n';
        return 2;
    }
}
