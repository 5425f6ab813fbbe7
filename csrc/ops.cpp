// Schemas of the tensor operations of `torch.ops.worldenv`; nothing else. Kernels register themselves for their
// device in cpu/*.cpp and cuda/*.cu, fakes and autograd are in Python beside the public functions (worldenv/ops).
//
// The stable ABI keeps this quick to compile and lets one build serve torch 2.11 and later. Checks in the kernels
// guard memory only; messages a user should read come from the Python functions.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(worldenv, m) {
  // Attention of one new frame over a packed ring cache (one layer). `isa` -1 takes the best the CPU has.
  m.def(
      "frame_attention(Tensor q, Tensor k, Tensor v, Tensor cache_k, Tensor cache_v, Tensor table, Tensor cached, "
      "int isa=-1) -> Tensor");
  // Write the frame in progress of every row into its pending slot, table[b, cached[b]].
  m.def(
      "frame_cache_append(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, Tensor table, Tensor cached) "
      "-> ()");
  // Clipped policy-gradient loss: loss [], metrics [8], grad_mu and grad_log_scale for a unit loss gradient.
  m.def(
      "action_loss(Tensor mu, Tensor log_scale, Tensor action, Tensor behaviour_logprob, Tensor advantage, "
      "Tensor mask, Tensor? reference_mu, Tensor? reference_log_scale, int distribution, float clip_low, "
      "float clip_high, float kl_weight, float entropy_weight, int isa=-1) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same over logits [B, C, A, K] and token ids.
  m.def(
      "token_loss(Tensor logits, Tensor action, Tensor behaviour_logprob, Tensor advantage, Tensor mask, "
      "Tensor? reference_logits, float clip_low, float clip_high, float kl_weight, float entropy_weight, "
      "int isa=-1) -> (Tensor, Tensor, Tensor)");
  m.def("action_logprob(Tensor mu, Tensor log_scale, Tensor action, int distribution, int isa=-1) -> Tensor");
  m.def("token_logprob(Tensor logits, Tensor action, int isa=-1) -> Tensor");
  // GAE over [T, B]: advantage and value target.
  m.def(
      "gae(Tensor reward, Tensor value, Tensor terminated, Tensor truncated, float gamma, float lam, int isa=-1) "
      "-> (Tensor, Tensor)");
  // RMS norm over x [R,E], then rotary positions [turns,D] (cosine, sine of each pair; row r
  // takes r % turns) on every head of D channels.
  m.def("norm_rotary(Tensor x, Tensor weight, Tensor rotary, float eps, int isa=-1) -> Tensor");
  m.def(
      "norm_rotary_bwd(Tensor grad, Tensor x, Tensor weight, Tensor rotary, float eps, int isa=-1) "
      "-> (Tensor, Tensor)");
  // GELU, tanh approximation.
  m.def("gelu(Tensor x, int isa=-1) -> Tensor");
  m.def("gelu_bwd(Tensor grad, Tensor x, int isa=-1) -> Tensor");
  // Best instruction set of this CPU, as cpu/isa.h numbers them.
  m.def("best_isa() -> int");
}
