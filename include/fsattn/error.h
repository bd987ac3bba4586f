#pragma once
#include <stdexcept>
#include <string>

namespace fsattn {

enum class ErrorCode {
  kInvalidArgument,  // a value breaks a documented rule (Python: ValueError)
  kInvalidType,      // a dtype or device breaks a documented rule (Python: TypeError)
  kUnsupported,      // the input is valid, but no kernel of this build and device takes it
                     // (Python: NotImplementedError)
  kCuda,             // the CUDA runtime reported a failure (Python: RuntimeError)
  kInternal,         // a rule that this library guarantees to itself does not hold
};

// The only exception type that the library throws. The message names the argument, the rule and
// the value found.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace fsattn
