#include "cpu/gate.h"

#include <algorithm>
#include <cmath>

#include "base/math.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"

namespace fsattn::cpu {
namespace {

constexpr int kBranches = 3;
// Tokens of one task: a few hundred kilobytes of rows, far above the cost of handing out a task.
constexpr int64_t kTaskTokens = 64;

template <class T>
T* row_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// Written so that exp never overflows.
template <class Acc>
Acc sigmoid(Acc x) {
  const Acc e = std::exp(-std::fabs(x));
  return (x < 0 ? e : Acc{1}) / (Acc{1} + e);
}

template <class T>
void load_gates(const Rows& gates, GateActivation activation, int64_t token, int64_t head,
                Compute<T>* values) {
  const T* row = row_of<const T>(gates, token, head);
  for (int i = 0; i < kBranches; ++i) {
    values[i] = load(row[i]);
    if (activation == GateActivation::kSigmoid) values[i] = sigmoid(values[i]);
  }
}

template <class F>
void for_each_token(int64_t total, const F& f) {
  parallel_for(ceil_div(total, kTaskTokens), Schedule::kStatic, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * kTaskTokens, total);
    for (int64_t token = task * kTaskTokens; token < end; ++token) f(token);
  });
}

template <class T>
void run_fwd(const GateFwdParams& p, const RowKernels<T>& kernels) {
  for_each_token(p.shape.total, [&](int64_t token) {
    Compute<T> gates[kBranches];
    for (int64_t head = 0; head < p.shape.num_heads; ++head) {
      if (head == 0 || p.gates.head_stride != 0) {
        load_gates<T>(p.gates, p.shape.activation, token, head, gates);
      }
      const T* branches[] = {row_of<const T>(p.o_cmp, token, head),
                             row_of<const T>(p.o_sel, token, head),
                             row_of<const T>(p.o_win, token, head)};
      kernels.gate(gates, branches, row_of<T>(p.o, token, head), p.shape.head_dim);
    }
  });
}

template <class T>
void store_gate_grad(const GateBwdParams& p, int64_t token, int64_t head, const Compute<T>* gates,
                     const Compute<T>* sums) {
  T* row = row_of<T>(p.dgates, token, head);
  for (int i = 0; i < kBranches; ++i) {
    const bool is_logit = p.shape.activation == GateActivation::kSigmoid;
    const Compute<T> slope = is_logit ? gates[i] * (Compute<T>{1} - gates[i]) : Compute<T>{1};
    store(row[i], sums[i] * slope);
  }
}

template <class T>
void run_bwd(const GateBwdParams& p, const RowKernels<T>& kernels) {
  using Acc = Compute<T>;
  const bool per_head = p.dgates.head_stride != 0;
  for_each_token(p.shape.total, [&](int64_t token) {
    Acc gates[kBranches] = {};
    Acc sums[kBranches] = {};
    for (int64_t head = 0; head < p.shape.num_heads; ++head) {
      if (head == 0 || per_head) load_gates<T>(p.gates, p.shape.activation, token, head, gates);
      const T* branches[] = {row_of<const T>(p.o_cmp, token, head),
                             row_of<const T>(p.o_sel, token, head),
                             row_of<const T>(p.o_win, token, head)};
      T* d_branches[] = {row_of<T>(p.do_cmp, token, head), row_of<T>(p.do_sel, token, head),
                         row_of<T>(p.do_win, token, head)};
      Acc dots[kBranches];
      kernels.gate_grad(gates, row_of<const T>(p.dout, token, head), branches, d_branches, dots,
                        p.shape.head_dim);
      for (int i = 0; i < kBranches; ++i) sums[i] = per_head ? dots[i] : sums[i] + dots[i];
      if (per_head) store_gate_grad<T>(p, token, head, gates, sums);
    }
    if (!per_head) store_gate_grad<T>(p, token, 0, gates, sums);
  });
}

}  // namespace

void gate_fwd(int, const GateFwdParams& params, Stream) {
  const Isa isa = active_isa();
  with_storage_type(params.shape.dtype,
                    [&]<class T>() { run_fwd<T>(params, row_kernels<T>(isa)); });
}

void gate_bwd(int, const GateBwdParams& params, Stream) {
  const Isa isa = active_isa();
  with_storage_type(params.shape.dtype,
                    [&]<class T>() { run_bwd<T>(params, row_kernels<T>(isa)); });
}

}  // namespace fsattn::cpu
