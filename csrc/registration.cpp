// Every operator's schema, once. The kernels register themselves at the foot of their own files, and the
// Python side adds fakes, autograd and autocast. A device without a kernel is served by the reference.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace {

// An operator and its backward. One dispatch key cannot hold both a compiled and a Triton kernel, so that each exists a
// second time, with the suffix _triton, and Python picks.
template <class Library>
void define(Library& m, const std::string& name, const std::string& forward, const std::string& backward) {
  for (const std::string& full : {name, name + "_triton"}) {
    m.def((full + forward).c_str());
    m.def((full + "_backward" + backward).c_str());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(mpma, m) {
  // query (B, Sq, H, D), key and value (B, Sk, H, D), mask (B, Sk) -> output, logsumexp (B, H, Sq)
  define(
      m, "masked_attention",
      "(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, float scale, float dropout_p,"
      " Tensor? dropout_seed) -> (Tensor, Tensor)",
      "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,"
      " Tensor? key_padding_mask, float scale, float dropout_p, Tensor? dropout_seed, bool need_query,"
      " bool need_key, bool need_value) -> (Tensor, Tensor, Tensor)");

  // qkv (B, S, 3, H, D) -> output (B, S, H, D), logsumexp (B, H, S)
  define(
      m, "masked_attention_qkvpacked",
      "(Tensor qkv, Tensor? key_padding_mask, float scale, float dropout_p, Tensor? dropout_seed)"
      " -> (Tensor, Tensor)",
      "(Tensor grad_output, Tensor qkv, Tensor output, Tensor logsumexp, Tensor? key_padding_mask,"
      " float scale, float dropout_p, Tensor? dropout_seed) -> Tensor");

  // query (Nq, H, D), key and value (Nk, H, D) -> output, logsumexp (H, Nq)
  define(
      m, "masked_attention_varlen",
      "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float dropout_p, Tensor? dropout_seed)"
      " -> (Tensor, Tensor)",
      "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,"
      " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale,"
      " float dropout_p, Tensor? dropout_seed, bool need_query, bool need_key, bool need_value)"
      " -> (Tensor, Tensor, Tensor)");

  // query (R, H, D), bank (N, H, D), topk 0 = dense
  // -> output, logsumexp (R, H), indices (R, H, K) int32 ascending by slot, (R, H, 0) when dense
  define(
      m, "memory_attention",
      "(Tensor query, Tensor memory_key, Tensor memory_value, int topk, float scale, float dropout_p,"
      " Tensor? dropout_seed) -> (Tensor, Tensor, Tensor)",
      "(Tensor grad_output, Tensor query, Tensor memory_key, Tensor memory_value, Tensor output,"
      " Tensor logsumexp, Tensor indices, float scale, float dropout_p, Tensor? dropout_seed,"
      " bool need_query, bool need_memory_key, bool need_memory_value) -> (Tensor, Tensor, Tensor)");

  // tokens (Bt, T, D), patches (Bi, P, D) -> (Bt, Bi)
  define(
      m, "token_patch_similarity",
      "(Tensor tokens, Tensor patches, Tensor? token_mask, Tensor? patch_mask,"
      " float attention_temperature, float pooling_temperature) -> Tensor",
      "(Tensor grad_output, Tensor tokens, Tensor patches, Tensor? token_mask, Tensor? patch_mask,"
      " float attention_temperature, float pooling_temperature, bool need_tokens, bool need_patches)"
      " -> (Tensor, Tensor)");

  // -> tokens to patches, patches to tokens (Bt, Bi), patch_index (Bt, Bi, T), token_index (Bt, Bi, P) int32
  define(
      m, "token_patch_max_similarity",
      "(Tensor tokens, Tensor patches, Tensor? token_mask, Tensor? patch_mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)",
      "(Tensor grad_tokens_to_patches, Tensor grad_patches_to_tokens, Tensor tokens, Tensor patches,"
      " Tensor? token_mask, Tensor? patch_mask, Tensor patch_index, Tensor token_index, bool need_tokens,"
      " bool need_patches) -> (Tensor, Tensor)");
}

namespace {

PyObject* cpu_instructions(PyObject*, PyObject*) { return PyUnicode_FromString(mpma::name_of(mpma::fastest_isa())); }

PyMethodDef methods[] = {
    {"cpu_instructions", cpu_instructions, METH_NOARGS, "The instruction set that the CPU kernels use here."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

// `import mpma_ext._C` loads the library, whose static initialisers register everything above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "MPMA's compiled operators", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
