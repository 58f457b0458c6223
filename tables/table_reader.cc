#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"
#include "tables/table_kinds.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

constexpr int64_t kNewestVersion = 1;
constexpr std::size_t kMaxNameBytes = 128;
constexpr absl::string_view kMetadataKey = "keepset";
constexpr absl::string_view kCommonKeys[] = {"format",    "format_version", "kind",
                                             "name",      "version",        "model",
                                             "algorithm", "provenance",     "evaluation"};
constexpr absl::string_view kSources[] = {"offline-calibration", "offline-independent-ablation",
                                          "uniform", "hand-written"};

// Names and versions become metric labels, log fields and file names, and requests address tables
// as NAME, NAME@VERSION, NAME@sha256:HEX or NAME:ALIAS.
constexpr absl::string_view kNamePunctuation = "._-+/=";
constexpr absl::string_view kVersionPunctuation = "._-+/=:@";
constexpr absl::string_view kDigestPrefix = "sha256:";

std::string Spaced(absl::string_view characters) {
  return absl::StrJoin(absl::StrSplit(characters, absl::ByLength(1)), " ");
}

absl::StatusOr<std::string> LabelField(const Json& document, absl::string_view key,
                                       absl::string_view punctuation, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(std::string value, StringField(document, key, where));
  const bool known = std::all_of(value.begin(), value.end(), [punctuation](char c) {
    return absl::ascii_isalnum(c) || absl::StrContains(punctuation, c);
  });
  if (value.empty() || value.size() > kMaxNameBytes || !known ||
      !absl::ascii_isalnum(value.front())) {
    return FieldError(where, key, PreviewJson(document[std::string(key)]),
                      absl::StrCat("1..", kMaxNameBytes, " characters of A-Z a-z 0-9 ",
                                   Spaced(punctuation), " with a letter or digit first"));
  }
  return value;
}

absl::StatusOr<std::string> VersionField(const Json& document, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(std::string version,
                           LabelField(document, "version", kVersionPunctuation, where));
  if (absl::StartsWith(version, kDigestPrefix)) {
    return FieldError(
        where, "version", PreviewJson(version),
        absl::StrCat("a version without ", kDigestPrefix, " in front, which is how digests begin"));
  }
  return version;
}

// The order of versions is a convenience; a file without a readable time is as good as any other.
absl::Time CreatedAt(const Json& provenance) {
  const auto created = provenance.find("created");
  absl::Time time;
  if (created == provenance.end() || !created->is_string() ||
      !absl::ParseTime(absl::RFC3339_full, created->get<std::string>(), &time, nullptr)) {
    return absl::InfinitePast();
  }
  return time;
}

absl::StatusOr<std::string> ProvenanceSource(const Json& provenance, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(std::string source,
                           StringField(provenance, "source", absl::StrCat(where, ": provenance")));
  if (std::find(std::begin(kSources), std::end(kSources), source) == std::end(kSources)) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, ": provenance.source=", PreviewJson(source), ", want one of ",
                     absl::StrJoin(kSources, ", "), "; simulated or synthetic tables are refused"));
  }
  return source;
}

absl::Status CheckFormat(const Json& document, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string format, StringField(document, "format", where));
  if (format != "keepset.table") {
    return FieldError(where, "format", PreviewJson(format), "keepset.table");
  }
  KEEPSET_ASSIGN_OR_RETURN(const int64_t version,
                           IntField(document, "format_version", 1, INT64_MAX, where));
  if (version > kNewestVersion) {
    return absl::FailedPreconditionError(absl::StrCat(where, ": format_version=", version,
                                                      ", want at most ", kNewestVersion,
                                                      "; written by a newer version"));
  }
  return absl::OkStatus();
}

absl::StatusOr<TableKind> FindKind(const Json& document, absl::string_view where) {
  KEEPSET_ASSIGN_OR_RETURN(const std::optional<std::string> stated,
                           OptionalStringField(document, "kind", where));
  const std::string name = stated.value_or("compilerkv");
  std::vector<absl::string_view> names;
  for (const TableKind& kind : TableKinds()) {
    if (kind.name == name) return kind;
    names.push_back(kind.name);
  }
  return absl::FailedPreconditionError(absl::StrCat(where, ": kind=", PreviewJson(name),
                                                    ", want one of ", absl::StrJoin(names, ", ")));
}

// Objects that are free in form but must be objects where present.
absl::Status CheckFreeObjects(const Json& document, absl::string_view where) {
  for (const char* key : {"algorithm", "evaluation"}) {
    if (document.contains(key)) KEEPSET_RETURN_IF_ERROR(ObjectField(document, key, where).status());
  }
  return absl::OkStatus();
}

template <typename Names>
bool Contains(const Names& names, absl::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

std::vector<std::string> ListIgnored(const SafetensorsFile& file, const Json& document,
                                     const TableKind& kind) {
  std::vector<std::string> ignored;
  for (const auto& [key, value] : document.items()) {
    if (!Contains(kCommonKeys, key) && !Contains(kind.keys, key)) {
      ignored.push_back(absl::StrCat("key ", absl::CHexEscape(key)));
    }
  }
  for (const auto& [key, value] : file.all_metadata()) {
    if (key != kMetadataKey) ignored.push_back(absl::StrCat("metadata ", absl::CHexEscape(key)));
  }
  for (const TensorInfo& tensor : file.tensors()) {
    if (!Contains(kind.tensors, tensor.name)) {
      ignored.push_back(absl::StrCat("tensor ", absl::CHexEscape(tensor.name)));
    }
  }
  return ignored;
}

absl::StatusOr<std::shared_ptr<const DecisionTable>> TableOf(
    std::shared_ptr<const SafetensorsFile> shared_file) {
  const SafetensorsFile& file = *shared_file;
  const std::string& where = file.label();
  const std::string* metadata = file.metadata(kMetadataKey);
  if (metadata == nullptr) {
    return FieldError(where, "__metadata__.keepset", "(missing)", "the table's JSON document");
  }
  TableHeader header;
  header.metadata_json = *metadata;
  KEEPSET_ASSIGN_OR_RETURN(header.document,
                           ParseStrictJsonObject(*metadata, absl::StrCat(where, ": keepset")));
  const Json& document = header.document;
  KEEPSET_RETURN_IF_ERROR(CheckFormat(document, where));
  KEEPSET_ASSIGN_OR_RETURN(const TableKind kind, FindKind(document, where));
  KEEPSET_ASSIGN_OR_RETURN(header.identity.name,
                           LabelField(document, "name", kNamePunctuation, where));
  KEEPSET_ASSIGN_OR_RETURN(header.identity.version, VersionField(document, where));
  KEEPSET_ASSIGN_OR_RETURN(const Json provenance, ObjectField(document, "provenance", where));
  KEEPSET_ASSIGN_OR_RETURN(header.provenance_source, ProvenanceSource(provenance, where));
  header.created = CreatedAt(provenance);
  KEEPSET_ASSIGN_OR_RETURN(const Json model, ObjectField(document, "model", where));
  KEEPSET_ASSIGN_OR_RETURN(header.model,
                           ParseModelFingerprint(model.dump(), absl::StrCat(where, ": model")));
  if (header.model.architecture.empty()) {
    return FieldError(absl::StrCat(where, ": model"), "architecture", "(missing)",
                      "the architecture's name");
  }
  KEEPSET_RETURN_IF_ERROR(CheckFreeObjects(document, where));
  header.ignored = ListIgnored(file, document, kind);
  header.identity.digest = file.Digest();
  return kind.parse(std::move(shared_file), std::move(header));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const DecisionTable>> ReadTable(const std::string& path) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                           SafetensorsFile::Open(path, ReadMode::kCopy));
  return TableOf(std::move(file));
}

absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseTable(absl::Span<const std::byte> bytes,
                                                                absl::string_view label) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                           SafetensorsFile::Parse(bytes, label));
  return TableOf(std::move(file));
}

absl::StatusOr<std::shared_ptr<const DecisionTable>> ParseOwnedTable(std::string bytes,
                                                                     absl::string_view label) {
  KEEPSET_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                           SafetensorsFile::ParseOwned(std::move(bytes), label));
  return TableOf(std::move(file));
}

absl::StatusOr<std::shared_ptr<const DecisionTable>> MapTable(const std::string& path,
                                                              absl::string_view digest) {
  KEEPSET_ASSIGN_OR_RETURN(std::shared_ptr<const SafetensorsFile> file,
                           SafetensorsFile::Open(path, ReadMode::kMap));
  KEEPSET_ASSIGN_OR_RETURN(std::shared_ptr<const DecisionTable> table, TableOf(file));
  if (table->identity().digest != digest) {
    return absl::DataLossError(
        absl::StrCat(path, ": digest=", table->identity().digest, ", want ", digest));
  }
  file->ReleasePages();
  return table;
}

}  // namespace keepset::tables
