// FSATTN_LOG=plan: every new problem and its plan once, from any number of threads.
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <thread>
#include <vector>

#include "base/log.h"
#include "support/calls.h"
#include "support/test.h"

namespace fsattn::test {
namespace {

// Collects what is written to std::cerr while it lives.
class CapturedStderr {
 public:
  CapturedStderr() : kept_(std::cerr.rdbuf(text_.rdbuf())) {}
  ~CapturedStderr() { std::cerr.rdbuf(kept_); }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
  std::streambuf* kept_;
};

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

TEST(plans_are_logged_once) {
  setenv("FSATTN_LOG", "plan", 1);
  EXPECT_TRUE(is_plan_logged());
  Calls calls;
  auto call = calls.gate_fwd();
  const CapturedStderr captured;
  run(call, {});
  run(call, {});
  explain(call);
  EXPECT_EQ(count(captured.text(), "fsattn: gate fwd: cpu float32 total_q=8"), 1);
  EXPECT_EQ(count(captured.text(), "\n  -> gate fwd: cpu, workspace 0 bytes ("), 1);

  Calls other(DType::kFloat64);
  run(other.gate_fwd(), {});
  EXPECT_EQ(count(captured.text(), "fsattn: gate fwd: cpu float64 total_q=8"), 1);
}

TEST(lines_of_threads_do_not_mix) {
  const CapturedStderr captured;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int line = 0; line < 50; ++line) log_once("line " + std::to_string(line) + ".");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(count(captured.text(), "\n"), 50);
  for (int line = 0; line < 50; ++line) {
    EXPECT_EQ(count(captured.text(), "fsattn: line " + std::to_string(line) + ".\n"), 1);
  }
}

}  // namespace
}  // namespace fsattn::test

FSATTN_TEST_MAIN()
