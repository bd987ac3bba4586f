#include "base/log.h"

#include <cstdlib>
#include <iostream>
#include <mutex>
#include <string_view>
#include <unordered_set>

namespace fsattn {

bool is_plan_logged() {
  static const bool logged = [] {
    const char* value = std::getenv("FSATTN_LOG");
    return value != nullptr && std::string_view(value) == "plan";
  }();
  return logged;
}

void log_once(const std::string& line) {
  static std::mutex mutex;
  static std::unordered_set<std::string> written;
  const std::lock_guard lock(mutex);
  if (written.insert(line).second) std::cerr << "fsattn: " << line << "\n";
}

}  // namespace fsattn
