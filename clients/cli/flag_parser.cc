#include "clients/cli/flag_parser.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "clients/cli/exit_status.h"

namespace keepset::cli {
namespace {

// Levenshtein distance.
int64_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<int64_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int64_t>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int64_t diagonal = row[0];
    row[0] = static_cast<int64_t>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int64_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

constexpr int64_t kMaxSuggestedEdits = 3;

}  // namespace

std::string NearestName(absl::string_view word, absl::Span<const std::string> candidates) {
  std::string best;
  int64_t best_distance =
      std::min<int64_t>(kMaxSuggestedEdits, static_cast<int64_t>(word.size()) / 2) + 1;
  for (const std::string& candidate : candidates) {
    const int64_t distance = EditDistance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

FlagParser::FlagParser(std::string command, std::string synopsis, std::string summary)
    : command_(std::move(command)), synopsis_(std::move(synopsis)), summary_(std::move(summary)) {}

FlagParser& FlagParser::Add(absl::string_view name, absl::string_view placeholder,
                            absl::string_view help, Repeat repeat,
                            std::function<absl::Status(const std::string&)> set) {
  flags_.push_back(
      {std::string(name), std::string(placeholder), std::string(help), repeat, std::move(set)});
  return *this;
}

FlagParser& FlagParser::Text(absl::string_view name, absl::string_view placeholder,
                             absl::string_view help, std::optional<std::string>* out) {
  return Add(name, placeholder, help, Repeat::kOnce, [out](const std::string& value) {
    *out = value;
    return absl::OkStatus();
  });
}

FlagParser& FlagParser::List(absl::string_view name, absl::string_view placeholder,
                             absl::string_view help, std::vector<std::string>* out) {
  return Add(name, placeholder, help, Repeat::kMany, [out](const std::string& value) {
    out->push_back(value);
    return absl::OkStatus();
  });
}

FlagParser& FlagParser::Int(absl::string_view name, absl::string_view placeholder,
                            absl::string_view help, std::optional<int64_t>* out) {
  return Add(name, placeholder, help, Repeat::kOnce,
             [out, flag = std::string(name)](const std::string& value) {
               int64_t parsed;
               if (!absl::SimpleAtoi(value, &parsed)) {
                 return UsageError(absl::StrCat(flag, "=", value, ", want an integer"));
               }
               *out = parsed;
               return absl::OkStatus();
             });
}

FlagParser& FlagParser::Real(absl::string_view name, absl::string_view placeholder,
                             absl::string_view help, std::optional<double>* out) {
  return Add(name, placeholder, help, Repeat::kOnce,
             [out, flag = std::string(name)](const std::string& value) {
               double parsed;
               if (!absl::SimpleAtod(value, &parsed) || std::isnan(parsed)) {
                 return UsageError(absl::StrCat(flag, "=", value, ", want a number"));
               }
               *out = parsed;
               return absl::OkStatus();
             });
}

FlagParser& FlagParser::Switch(absl::string_view name, absl::string_view help, bool* out) {
  return Add(name, "", help, Repeat::kOnce, [out](const std::string&) {
    *out = true;
    return absl::OkStatus();
  });
}

FlagParser& FlagParser::Alias(absl::string_view spelling, absl::string_view name) {
  aliases_.push_back({std::string(spelling), std::string(name)});
  return *this;
}

FlagParser::Flag* FlagParser::Find(absl::string_view spelling) {
  for (const AliasName& alias : aliases_) {
    if (alias.spelling == spelling) spelling = alias.name;
  }
  for (Flag& flag : flags_) {
    if (flag.name == spelling) return &flag;
  }
  return nullptr;
}

absl::Status FlagParser::Unknown(absl::string_view spelling) const {
  std::vector<std::string> names;
  for (const Flag& flag : flags_) names.push_back(flag.name);
  const std::string nearest = NearestName(spelling, names);
  return UsageError(
      absl::StrCat("unknown flag ", spelling,
                   nearest.empty() ? "" : absl::StrCat(", did you mean ", nearest, "?"),
                   " (keepset ", command_, " --help lists them)"));
}

absl::StatusOr<std::vector<std::string>> FlagParser::Parse(absl::Span<const std::string> arguments,
                                                           int min_positionals,
                                                           int max_positionals) {
  std::vector<std::string> positionals;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--") {
      positionals.insert(positionals.end(), arguments.begin() + i + 1, arguments.end());
      break;
    }
    if (argument.size() < 2 || argument[0] != '-') {
      positionals.push_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string spelling = argument.substr(0, equals);
    Flag* flag = Find(spelling);
    if (flag == nullptr) return Unknown(spelling);
    if (flag->seen && flag->repeat == Repeat::kOnce) {
      return UsageError(absl::StrCat(spelling, " is given twice, want it once"));
    }
    flag->seen = true;
    std::string value;
    if (flag->placeholder.empty()) {
      if (equals != std::string::npos) {
        return UsageError(absl::StrCat(argument, ": ", spelling, " takes no value"));
      }
    } else if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return UsageError(
          absl::StrCat(spelling, " has no value, want ", spelling, " ", flag->placeholder));
    }
    KEEPSET_RETURN_IF_ERROR(flag->set(value));
  }
  const int count = static_cast<int>(positionals.size());
  if (count < min_positionals || count > max_positionals) {
    return UsageError(absl::StrCat(count, " arguments beside flags, usage: keepset ", synopsis_));
  }
  return positionals;
}

std::string FlagParser::Help() const {
  std::string out = absl::StrCat("usage: keepset ", synopsis_, "\n\n", summary_, "\n\n");
  size_t width = std::string("--help").size();
  std::vector<std::string> heads;
  for (const Flag& flag : flags_) {
    std::string head = flag.name;
    for (const AliasName& alias : aliases_) {
      if (alias.name == flag.name) head = absl::StrCat(alias.spelling, ", ", head);
    }
    if (!flag.placeholder.empty()) absl::StrAppend(&head, " ", flag.placeholder);
    width = std::max(width, head.size());
    heads.push_back(std::move(head));
  }
  for (size_t i = 0; i < flags_.size(); ++i) {
    absl::StrAppendFormat(&out, "  %-*s  %s\n", static_cast<int>(width), heads[i], flags_[i].help);
  }
  absl::StrAppendFormat(&out, "  %-*s  %s\n", static_cast<int>(width), "--help", "this text");
  return out;
}

bool FlagParser::HelpAsked(absl::Span<const std::string> arguments) {
  for (const std::string& argument : arguments) {
    if (argument == "--") return false;
    if (argument == "--help" || argument == "-h") return true;
  }
  return false;
}

}  // namespace keepset::cli
