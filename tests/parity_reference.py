"""The independent side of the parity tests: transformers' GPT-Neo in PyTorch, on a checkpoint trained here.

    python tests/parity_reference.py CHECKPOINT CONFIG.json TOKENS.npz OUT.npz

A process of its own, because `load_tf_weights_in_gpt_neo` needs eager TensorFlow. It imports nothing of this project:
CONFIG.json is read as any program would read it. TOKENS.npz holds `inputs` and `labels`, int [batch, sequence]. OUT.npz
gets `logits` [batch, sequence, vocab], the means `cross_entropy` and `objective`, the objective's gradients under the
checkpoint's variable names and shapes, and as `wrong/...` the logits of models that differ in one detail each: a
checkpoint on which these come out alike would prove nothing.
"""

import copy
import json
import sys

import numpy as np
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM
from transformers.models.gpt_neo.modeling_gpt_neo import load_tf_weights_in_gpt_neo

# transformers' parameter -> GPT-Neo's variable, within layer i
LAYER_VARIABLES = {
    "ln_1.weight": "norm_1/g",
    "ln_1.bias": "norm_1/b",
    "attn.attention.q_proj.weight": "attn/q",
    "attn.attention.k_proj.weight": "attn/k",
    "attn.attention.v_proj.weight": "attn/v",
    "attn.attention.out_proj.weight": "attn/o",
    "attn.attention.out_proj.bias": "attn/compute_output_bias/o_b",
    "ln_2.weight": "norm_2/g",
    "ln_2.bias": "norm_2/b",
    "mlp.c_fc.weight": "mlp/conv1d_main/c_fc/kernel",
    "mlp.c_fc.bias": "mlp/conv1d_main/c_fc/bias",
    "mlp.c_proj.weight": "mlp/conv1d_main/c_proj/kernel",
    "mlp.c_proj.bias": "mlp/conv1d_main/c_proj/bias",
}
OTHER_VARIABLES = {"wte.weight": "wte", "wpe.weight": "wpe", "ln_f.weight": "ln_f/g", "ln_f.bias": "ln_f/b"}


def load_model(checkpoint: str, values: dict) -> GPTNeoForCausalLM:
    """The model of a run's config.json with the weights of its checkpoint."""
    config = GPTNeoConfig(
        vocab_size=values["n_vocab"],
        max_position_embeddings=values["n_ctx"],
        hidden_size=values["n_embd"],
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        attention_types=values["attention_types"],
        window_size=values["local_attention_radius"],
        intermediate_size=4 * values["n_embd"],
        activation_function="gelu_new",  # the tanh form
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        layer_norm_epsilon=1e-5,
    )
    return load_tf_weights_in_gpt_neo(GPTNeoForCausalLM(config), config, checkpoint)


def variable_names(model: GPTNeoForCausalLM) -> dict[str, str]:
    """{transformers' parameter: the checkpoint's variable} of the whole model."""
    names = {f"transformer.{parameter}": f"gpt2/{variable}" for parameter, variable in OTHER_VARIABLES.items()}
    for i in range(model.config.num_layers):
        for parameter, variable in LAYER_VARIABLES.items():
            names[f"transformer.h.{i}.{parameter}"] = f"gpt2/h{i}/{variable}"
    return names


def results(model: GPTNeoForCausalLM, inputs: np.ndarray, labels: np.ndarray, z_loss: float) -> dict[str, np.ndarray]:
    """What OUT.npz holds."""
    logits = model(torch.from_numpy(inputs.astype(np.int64))).logits
    targets = torch.from_numpy(labels.astype(np.int64))
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    objective = cross_entropy + z_loss * torch.logsumexp(logits, dim=-1).square().mean()
    objective.backward()
    found = {
        "logits": logits.detach().numpy(),
        "cross_entropy": cross_entropy.detach().numpy(),
        "objective": objective.detach().numpy(),
    }
    names = variable_names(model)
    for parameter, value in model.named_parameters():  # names the tied head once, as transformer.wte.weight
        gradient = value.grad.numpy()
        is_linear = value.ndim == 2 and not parameter.endswith(("wte.weight", "wpe.weight"))
        found[names[parameter]] = gradient.T if is_linear else gradient  # torch's Linear stores [out, in]
    return found


def widen_windows(model: GPTNeoForCausalLM) -> None:
    """Let every position of local attention see one position more."""
    for layer in model.transformer.h:
        seen = layer.attn.attention.bias  # bool [1, 1, position, position looked at]
        of_the_one_before = seen.roll(1, dims=2)
        of_the_one_before[:, :, 0] = False
        seen |= of_the_one_before


def take_exact_gelu(model: GPTNeoForCausalLM) -> None:
    """Take gelu's exact form instead of the one with tanh."""
    for layer in model.transformer.h:
        layer.mlp.act = torch.nn.GELU()


def scale_queries(model: GPTNeoForCausalLM) -> None:
    """Divide queries by sqrt(features per head)."""
    for layer in model.transformer.h:
        attention = layer.attn.attention
        attention.q_proj.weight /= attention.head_dim**0.5


MISTAKES = {"wider_window": widen_windows, "exact_gelu": take_exact_gelu, "scaled_queries": scale_queries}


def wrong_logits(model: GPTNeoForCausalLM, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Logits with each of the mistakes."""
    found = {}
    for name, make in MISTAKES.items():
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            make(wrong)
            found[f"wrong/{name}"] = wrong(torch.from_numpy(inputs.astype(np.int64))).logits.numpy()
    return found


def main(checkpoint: str, config_path: str, tokens_path: str, out: str) -> None:
    with open(config_path, encoding="utf-8") as file:
        values = json.load(file)
    tokens = np.load(tokens_path)
    model = load_model(checkpoint, values)
    found = results(model, tokens["inputs"], tokens["labels"], values["z_loss"])
    np.savez(out, **found, **wrong_logits(model, tokens["inputs"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
