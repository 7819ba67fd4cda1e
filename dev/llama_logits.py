"""The logits of llama.cpp, for dev/check_logits.py: run by a Python that has `llama-cpp-python` and numpy only.

argv: a GGUF file, a JSON file of prompts (lists of token ids), the .npy file to write: (all tokens, vocabulary).
"""

from __future__ import annotations

import json
import sys

import llama_cpp as lib
import numpy as np

model_file, prompts_file, out = sys.argv[1:]
with open(prompts_file, encoding="utf-8") as file:
    prompts: list[list[int]] = json.load(file)
silent = lib.llama_log_callback(lambda level, text, data: None)  # kept: C calls it until the end
lib.llama_log_set(silent, None)
lib.llama_backend_init()
model = lib.llama_model_load_from_file(model_file.encode(), lib.llama_model_default_params())
if not model:
    sys.exit(f"llama.cpp cannot read {model_file}")
params = lib.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = max(map(len, prompts))
params.type_k = params.type_v = 0  # GGML_TYPE_F32: its own choice, float16, is as coarse as 0.01 here
params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums values in float16
context = lib.llama_init_from_model(model, params)
size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
batch = lib.llama_batch_init(params.n_batch, 0, 1)
rows = []
for prompt in prompts:
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    batch.n_tokens = len(prompt)
    for i, token in enumerate(prompt):
        batch.token[i], batch.pos[i], batch.logits[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, True, 1, 0
    if lib.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    rows += [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(prompt))]
np.save(out, np.stack(rows))
