// The environment variable FSATTN_LOG=plan prints every new problem and its plan once to stderr.
#pragma once
#include <string>

namespace fsattn {

// Whether FSATTN_LOG=plan was set when the first call asked.
bool is_plan_logged();

// Writes `line` to stderr unless it was written before. Threads may call it at the same time.
void log_once(const std::string& line);

}  // namespace fsattn
