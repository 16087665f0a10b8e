"""The model in plain float64 numpy, written from the papers: no code shared with models/, one position at a time."""

import numpy as np

from config import ModelConfig
from tests.reference_activations import NUMBERS, REFERENCE

Weights = dict[str, np.ndarray]


class ReferenceModel:
    """Logits of one row of tokens under `config` with `weights` by checkpoint name."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config = config
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """int [length] -> [length, n_vocab]"""
        config = self.config
        x = np.stack([self._get("wte")[token] + self._position(p) for p, token in enumerate(tokens)])
        for layer in range(config.n_layer):
            scope = "" if config.share_parameters else f"h{layer}"
            kind = config.layer_attention[layer]
            share = 0.5 if config.macaron else 1.0
            if config.macaron:
                x = x + share * self._mlp(x, f"{scope}/mlp_macaron")
            if kind != "none":
                x = x + self._gate(f"{scope}/norm_rezero_1") * self._attention(
                    self._normalize(x, f"{scope}/norm_1"), kind, f"{scope}/attn"
                )
            normed = self._normalize(x, f"{scope}/norm_2")
            out = self._experts(normed, scope) if layer in config.moe_layers else self._mlp(normed, f"{scope}/mlp")
            x = x + self._gate(f"{scope}/norm_rezero_2") * share * out
        x = self._layer_norm(x, "ln_f")
        if config.no_weight_tie:
            head = "wte_final_linear/conv1d_main/linear_out"
            return x @ self._get(f"{head}/kernel") + self._get(f"{head}/bias")
        return x @ self._get("wte").T

    def _get(self, name: str) -> np.ndarray:
        return self.weights[f"gpt2/{name}"]

    def _position(self, position: int) -> np.ndarray | float:
        if self.config.rotary_emb:
            return 0.0
        if self.config.axial_pos_emb:
            columns = self.config.axial_pos_emb[1]
            first, second = self._get("axial_wpe_1"), self._get("axial_wpe_2")
            return (first[position // columns] + second[position % columns]) / 2
        return self._get("wpe")[position]

    def _layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * self._get(f"{name}/g") + self._get(f"{name}/b")

    def _normalize(self, x: np.ndarray, name: str) -> np.ndarray:
        if self.config.rezero:
            return x
        if self.config.scalenorm:
            centred = x - x.mean(-1, keepdims=True)
            return self._get(f"{name}/g") * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return self._layer_norm(x, name)

    def _gate(self, name: str) -> np.ndarray | float:
        return self._get(f"{name}/g") if self.config.rezero else 1.0

    def _mlp(self, x: np.ndarray, scope: str) -> np.ndarray:
        def dense(x: np.ndarray, name: str) -> np.ndarray:
            where = f"{scope}/conv1d_main/{name}"
            return x @ self._get(f"{where}/kernel") + self._get(f"{where}/bias")

        def activate(x: np.ndarray) -> np.ndarray:
            return self._activate(x, self.config.activation_function, f"{scope}/conv1d_main")

        hidden = dense(x, "c_fc")
        if self.config.mlp_glu:
            value, gate = np.split(hidden, 2, axis=-1)
            return dense(value * activate(gate), "c_proj")
        return dense(activate(hidden), "c_proj")

    def _activate(self, x: np.ndarray, name: str, scope: str) -> np.ndarray:
        numbers = [self._get(f"{scope}/activation_{name}/{number}") for number in NUMBERS.get(name, [])]
        return REFERENCE[name](x, *numbers)

    def _experts(self, x: np.ndarray, scope: str) -> np.ndarray:
        """Each position through the two experts with the largest gates (arXiv:1701.06538, arXiv:2006.16668)."""
        policy = self.config.moe_params.get("moe_second_policy_eval", "random")
        least = {"random": 0, "all": 0, "none": 2, "threshold": self.config.moe_params.get("moe_second_threshold_eval")}
        wi, wo = self._get(f"{scope}/wi/kernel"), self._get(f"{scope}/wo/kernel")
        out = np.zeros_like(x)
        for i, row in enumerate(x):
            gates = _softmax(row @ self._get(f"{scope}/top_2_gating/kernel"))
            first, second = np.argsort(-gates)[:2]
            shares = gates[[first, second]] / gates[[first, second]].sum()
            for expert, share in zip((first, second), shares, strict=True):
                if expert == first or share > least[policy]:
                    hidden = self._activate(row @ wi[expert], self.config.moe_activation, f"{scope}/wi")
                    out[i] += share * (hidden @ wo[expert])
        return out

    def _attention(self, x: np.ndarray, kind: str, scope: str) -> np.ndarray:
        heads, size = self.config.n_head, self.config.head_size
        q, k, v = ((x @ self._get(f"{scope}/{name}")).reshape(-1, heads, size) for name in "qkv")
        if self.config.rotary_emb:
            q, k = _rotate(q), _rotate(k)
        memory = self.config.num_mem_kv
        mem_k = self._get(f"{scope}/attention/mem_k") if memory else np.zeros([0, heads, size])
        mem_v = self._get(f"{scope}/attention/mem_v") if memory else np.zeros([0, heads, size])
        out = np.zeros_like(q)
        causal = not self.config.mlm_training
        linear_mix = _linear_mix if causal else _whole_linear_mix
        for i in range(len(x)):
            reach = self.config.local_attention_radius - 1 if kind == "local" else len(x)
            seen = slice(max(0, i - reach), i + 1 if causal else i + reach + 1)
            for head in range(heads):
                keys = np.concatenate([mem_k[:, head], k[seen, head]])
                values = np.concatenate([mem_v[:, head], v[seen, head]])
                mix = linear_mix if kind == "linear" else _softmax_mix
                out[i, head] = mix(q[i, head], keys, values)
        mixed = out.reshape(len(x), heads * size)
        return mixed @ self._get(f"{scope}/o") + self._get(f"{scope}/compute_output_bias/o_b")


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()


def _softmax_mix(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    return _softmax(keys @ query) @ values


def _linear_mix(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    query, keys = _softmax(query), np.exp(keys)
    return query @ (keys.T @ values) / (query @ (keys.sum(0) + 1e-6))


def _whole_linear_mix(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    each_over_sequence = np.stack([_softmax(feature) for feature in keys.T])  # [features, positions]
    return _softmax(query) @ each_over_sequence @ values


def _rotate(x: np.ndarray) -> np.ndarray:
    """[length, heads, size]: complex numbers of the two halves, turned."""
    length, _, size = x.shape
    points = x[..., : size // 2] + 1j * x[..., size // 2 :]
    angles = np.arange(length)[:, None] * 10_000.0 ** (-2 * np.arange(size // 2) / size)
    turned = points * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)
