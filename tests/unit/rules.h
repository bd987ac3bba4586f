// Table-driven tests of the validation: each rule breaks a valid call in one way and names the error
// that must come of it.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "api/validate.h"
#include "support/calls.h"
#include "support/test.h"

namespace fsattn::test {

template <class Call>
struct Rule {
  ErrorCode code;
  const char* message;  // the whole message or its beginning
  std::function<void(Call&, Calls&)> break_it;
};

template <class Call>
void check_rules(const char* file, int line, Call (Calls::*make)(),
                 const std::vector<Rule<Call>>& rules, DType dtype = DType::kFloat32) {
  Calls calls(dtype);
  validate((calls.*make)(), Purpose::kRun);
  for (const Rule<Call>& rule : rules) {
    Call call = (calls.*make)();
    rule.break_it(call, calls);
    try {
      validate(call, Purpose::kRun);
      report(file, line, std::string("accepted, expected: ") + rule.message);
    } catch (const Error& error) {
      const std::string what = error.what();
      if (what.rfind(rule.message, 0) != 0) {
        report(file, line, std::string("expected: ") + rule.message + "\n      found: " + what);
      }
      if (error.code() != rule.code) report(file, line, std::string("wrong code: ") + what);
    }
  }
}

}  // namespace fsattn::test

#define EXPECT_RULES(Call, make, ...)                                                 \
  ::fsattn::test::check_rules<Call>(__FILE__, __LINE__, &::fsattn::test::Calls::make, \
                                    std::vector<::fsattn::test::Rule<Call>> __VA_ARGS__)
